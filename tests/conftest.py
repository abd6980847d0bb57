"""What every test starts from: a fixed seed, one thread, no network."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo, run twice for a few steps on few images: [folder of results, feature cache].

    The first results lie beside the folder, moved there by the second run.
    """
    from small_demo import ARMS, first_images_only

    from fused_route.training import demo

    folder, cache = tmp_path_factory.mktemp("runs") / "demo", tmp_path_factory.mktemp("cache")
    settings = demo.Settings(steps=3, batch=16, out=folder, cache=cache)
    with first_images_only():
        assert demo.run(settings, ARMS) == folder / "report.md"
        demo.run(replace(settings, steps=2), ARMS[:1])
    return [folder, cache]
