"""What every test starts from: a fixed seed, one thread, no network, its own kind of process."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this process cannot run: Triton interprets or compiles, for all kernels."""
    foreign = "compile" if INTERPRETED else "interpret"
    left_out = [item for item in items if item.get_closest_marker(foreign)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> None:
    if INTERPRETED:
        from hasten import hasten
        from interpreter import repair

        repair()
        hasten()


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, or of the largest integer: what nobody wrote shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            with torch.no_grad():
                if made.is_floating_point() or made.is_complex():
                    return made.fill_(float("nan"))
                return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).max)

        return poison

    with torch.device("cpu"):  # keeps, for the process, which functions make tensors: torch's own
        torch.empty(0)
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def unpoisoned() -> None:
    """For tests of compilers, which would trace what torch.empty is replaced by."""


@pytest.fixture
def launchable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is one that compiled code could serve, which the interpreter would not mind.

    Addresses are multiples of 16, and a `Launch` that is told the same pointers are absent gets the
    same ones, of the same types, as before.
    """
    from fused_route.kernels.launch import Launch

    launch = Launch.__call__
    seen: dict[Any, Any] = {}

    def checked(self: Launch, absent: Any, grid: Any, tensors: Any, numbers: Any) -> None:
        assert all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        types = tuple(None if t is None else t.dtype for t in tensors)
        kinds = tuple(type(number) for number in numbers)
        assert seen.setdefault((self, absent), (types, kinds)) == (types, kinds)
        launch(self, absent, grid, tensors, numbers)

    monkeypatch.setattr(Launch, "__call__", checked)


@pytest.fixture(autouse=True)
def as_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around interpreted kernels: unwritten memory is loud, arithmetic silent as in hardware."""
    if not request.node.get_closest_marker("interpret"):
        yield
        return
    if "unpoisoned" not in request.fixturenames:
        request.getfixturevalue("poisoned")
        request.getfixturevalue("launchable")
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are scored without it: METEOR takes it four seconds to start."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo, run twice for a few steps on few images: [folder of results, feature cache].

    The first results lie beside the folder, moved there by the second run.
    """
    from small_demo import ARMS, first_images_only

    from fused_route.training.demo import compare

    folder, cache = tmp_path_factory.mktemp("runs") / "demo", tmp_path_factory.mktemp("cache")
    settings = compare.Settings(steps=3, batch=16, out=folder, cache=cache)
    with first_images_only():
        assert compare.run(settings, ARMS) == folder / "report.md"
        compare.run(replace(settings, steps=2), ARMS[:1])
    return [folder, cache]
