"""`python -m bench scale`: what is written of it, and when."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import scale
from bench.__main__ import main
from bench.scale import Run
from fused_route.training.demo import compare


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Routes that were trained, by a fake; "gram" is interrupted."""
    found: list[str] = []

    def train(run: Run, *_: object) -> Run:
        if run.route == "gram":
            raise KeyboardInterrupt
        found.append(run.route)
        run.gain, run.loss = [1.0] * 20, [1.0] * 20
        return run

    monkeypatch.setattr(scale, "train", train)
    monkeypatch.setattr(scale, "encoder_directory", lambda: None)
    monkeypatch.setattr(scale, "load_encoder", lambda *_: (None, None))
    monkeypatch.setattr(scale, "load_efficientnet_lite0", lambda: None)
    fake = SimpleNamespace(Settings=compare.Settings, load_splits=lambda *_: ("train", "test"))
    monkeypatch.setattr(scale, "compare", fake)
    monkeypatch.setattr(
        scale, "RUNS", [Run(name, "unit", 8, 1e-3, 60) for name in ("add", "mul", "gram")]
    )
    return found


def test_what_was_trained_is_written_as_it_ends(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "scale.json"
    assert main(["scale", "--out", str(out)]) == 130
    found = json.loads(out.read_text())
    assert [run["route"] for run in found["runs"]] == trained == ["add", "mul"]
    assert [path.name for path in out.parent.iterdir()] == ["scale.json"]
    assert capsys.readouterr().err == "python -m bench scale: interrupted\n"


def test_a_file_that_cannot_be_written_trains_nothing(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "scale.json"):
        assert main(["scale", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"out={str(out)!r}" in line
    assert trained == []
