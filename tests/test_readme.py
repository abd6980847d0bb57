"""The README's examples run as they stand, and its table of routes is complete."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BUILT_IN
from test_attach import bert
from transformers import AutoModel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_four_examples() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=["attach", "published", "function", "route"])
def test_examples_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda path: bert())
    names: dict[str, Any] = {
        "image_features": torch.randn(2, 1280),
        "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]),
    }
    exec(compile(block, "README.md", "exec"), names)
    if "layer" in names:  # the user's own route
        with names["layer"].context.using(torch.randn(2, 64)):
            assert names["layer"](torch.randn(2, 3, 64)).shape == (2, 3, 32)


def test_every_route_is_in_the_table() -> None:
    table = README[README.index("## Routes") :]
    assert all(f"`{name}`" in table for name in BUILT_IN)
