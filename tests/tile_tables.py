"""The library with other tiles, and what it launches, for tests in Triton's interpreter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from bench.configured import configured
from fused_route import ops, plan
from fused_route.kernels import config
from fused_route.kernels.launch import Launch


@contextmanager
def tiles(image: str = "apart", **changes: Any) -> Iterator[None]:
    """Every row of the tile tables that fit any GPU, changed; and the image made apart or along."""
    table = {
        kernel: {
            key: tuple(config.Tile(**{**vars(tile), **changes}) for tile in pair)
            for key, pair in rows.items()
        }
        for kernel, rows in config.TILES.items()
    }
    products = {
        size: tuple(config.ProductTile(**{**vars(tile), **changes}) for tile in pair)
        for size, pair in config.PRODUCTS.items()
    }
    where = {"apart": lambda *of: "apart", "along": lambda *of: "along"}[image]
    with configured(TILES=table, PRODUCTS=products, image=where):
        yield


@contextmanager
def on_compute_capability(major: int | None) -> Iterator[None]:
    """As on a GPU of this major compute capability; None: not NVIDIA's."""
    both = [mock.patch.object(module, "major_of", lambda _: major) for module in (ops, plan)]
    with both[0], both[1], configured():
        yield


def kernel_of(launch: Launch, numbers: Any) -> str:
    """The name of the jitted function."""
    return str(launch.kernel.fn.__name__)


def way_of(launch: Launch, numbers: Any) -> str | None:
    """The way of samples, "long" or "short", where the launch makes an operand's gradient."""
    ways = {
        "vector_gradient": lambda: launch.constants["PAIRS"] > 1,
        "matrix_gradient": lambda: numbers[-1] > 1,
    }
    is_long = ways.get(kernel_of(launch, numbers))
    return None if is_long is None else "long" if is_long() else "short"


@contextmanager
def launched(told: Callable[[Launch, Any], Any] = kernel_of) -> Iterator[list[Any]]:
    """What is told of the launches of this block and of their numbers, in order."""
    seen: list[Any] = []
    launch = Launch.__call__

    def noted(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        seen.append(told(self, numbers))
        launch(self, absent, grid, tensors, numbers)

    with mock.patch.object(Launch, "__call__", noted):
        yield seen
