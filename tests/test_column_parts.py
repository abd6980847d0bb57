"""K1 with its columns in parts, for few rows: the same bits as with all of them in one program."""

from typing import Any
from unittest import mock

import pytest
from kernel_cases import Call, Layer, assert_equal, gradients, run, trained
from tile_tables import tiles
from torch import Tensor

from fused_route import Routing
from fused_route.kernels import config
from fused_route.kernels.launch import Launch

pytestmark = pytest.mark.interpret

# 50 columns in steps of 16: parts of two steps, and of one that is not full.
BLOCKS: dict[str, Any] = {"BM": 16, "BN": 16}


def results(layer: Layer, call: Call, programs: int) -> tuple[dict[str, Tensor], set[int]]:
    """y and all gradients, and in how many parts K1 did its columns."""
    seen: set[int] = set()
    launch = Launch.__call__

    def noted(self: Launch, absent: object, grid: tuple[int, int, int], *rest: object) -> None:
        if self.kernel.fn.__name__ == "routed_forward":
            seen.add(grid[2])
        launch(self, absent, grid, *rest)  # type: ignore[arg-type]

    t = trained(layer, call)
    with (
        mock.patch.dict(config.FORWARD_PROGRAMS, {0: programs}),
        mock.patch.object(Launch, "__call__", noted),
        tiles(**BLOCKS),
    ):
        p = 0.25 if call.drops else 0.0
        return gradients(run(layer, call, t, p, "triton"), t), seen


@pytest.mark.parametrize(("host", "route", "Nv", "drops"), [
    ("adapter", "mul", 1, False), ("adapter", "gram", 1, True), ("adapter", "gram", 3, False),
    ("linear", "add", 1, False), ("given", "expand", 1, False), ("qkv", "gram", 3, True),
    ("given_qkv", "mul", 1, False), ("adapter", "none", 1, False),
])  # fmt: skip
def test_parts_have_the_bits_of_the_whole(host: str, route: str, Nv: int, drops: bool) -> None:
    layer, call = Layer(host, S=2, T=9, d=50, n=50, Nv=Nv), Call(Routing(route), drops=drops)
    blocks = 2  # of 16 rows, or of a sample each
    whole, one = results(layer, call, blocks)
    assert one == {1}
    for programs, expected in ((2 * blocks, 2), (3 * blocks + 1, 3), (132, 4)):
        parts, seen = results(layer, call, programs)
        assert seen == {expected}
        assert_equal(whole, parts)


def test_packed_rows_in_parts() -> None:
    layer, call = Layer(S=3, d=50), Call(Routing("mul"), lengths=[5, 0, 9])
    (whole, one), (parts, seen) = results(layer, call, 1), results(layer, call, 132)
    assert one == {1} and seen == {4}
    assert_equal(whole, parts)


@pytest.mark.parametrize(("blocks", "steps", "parts"), [
    (1, 3, 3), (1, 200, 132), (44, 3, 3), (45, 3, 2), (66, 12, 2), (67, 12, 1), (5000, 12, 1),
    (0, 3, 3),
])  # fmt: skip
def test_as_many_parts_as_there_are_idle_multiprocessors(
    blocks: int, steps: int, parts: int
) -> None:
    assert config.parts(9, blocks, steps) == parts
    assert config.parts(8, blocks, steps) == config.parts(None, blocks, steps) == 1


def test_parts_may_have_all_registers() -> None:
    tile = config.Tile(16, 64, 4, 3, 96)
    assert config.alone(tile) == config.Tile(16, 64, 4, 3, 255)
