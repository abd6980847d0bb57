"""What a call of `python -m bench` takes over from earlier ones, and what it does not lose."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_records import SMALL, record, write

from bench import measure, parts, protocol, results
from bench.__main__ import main
from bench.cases import Case, grid
from bench.results import FOLDER, Record, Results

CASES = grid("smoke", ["op/adapter/*"])
WHO = ["reference", "published"]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(protocol, "ceilings", lambda *_: {"copy": 1e9, "matmul": 1e9})
    monkeypatch.setenv("COMMIT", "one")
    return tmp_path / "r.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was measured, by a fake: each record of 2 µs."""
    found: list[tuple[str, str]] = []

    def fake(case: Case, names: list[str], _: object) -> Iterator[Record]:
        for name in names:
            found.append((case.name, name))
            yield record(case, name, 2.0)

    monkeypatch.setattr(measure, "measure", fake)
    return found


def call(out: Path, *more: str) -> int:
    ways = [word for name in WHO for word in ("--provider", name)]
    given = ["--grid", "smoke", "--case", "op/adapter/*", "--device", "cpu", "--process", "0"]
    return main([*given, *ways, "--out", str(out), *more])


def here() -> dict[str, object]:
    return results.environment(torch.device("cpu"))


def test_what_the_file_alone_has_is_taken_over(
    out: Path, measured: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The processes' files are not under version control; another process's records stay too."""
    old = [record(CASES[0], "reference", 1.0), record(CASES[0], "reference", 1.5, process=2),
           record(SMALL, "fused", 3.0, bytes={"moved": 5.0})]  # fmt: skip
    Results(here(), {}, old).write(out)
    assert call(out) == 0
    assert (CASES[0].name, "reference") not in measured and len(measured) == 5
    found = results.read(out).records
    assert len(found) == 8 and all(each in found for each in old)
    assert "1 records of this device and code are there already" in capsys.readouterr().err
    for lines in out.parent.glob("*.jsonl"):
        lines.unlink()
    measured.clear()
    assert call(out) == 0 and measured == []
    assert all(each in results.read(out).records for each in old)
    assert [path.name for path in out.parent.glob("*.json")] == ["r.json"]


@pytest.mark.parametrize("change", ["device", "commit", "versions"])
def test_a_file_of_another_place_is_moved_aside(
    change: str, out: Path, measured: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"device": "A GPU", "commit": "two", "versions": {"torch": "1.0"}}[change]
    Results({**here(), change: other}, {}, [record(CASES[0], "reference", 1.0)]).write(out)
    before = out.read_text()
    assert call(out) == 0 and len(measured) == 6
    assert (out.parent / "r.before1.json").read_text() == before
    said = capsys.readouterr().out
    assert "r.json is of other code, versions or another device: it is r.before1.json now" in said
    assert len(results.read(out).records) == 6


def test_a_published_file_is_not_lost(out: Path, measured: list[tuple[str, str]]) -> None:
    published = (FOLDER / "nvidia-h200-bf837d1.json").read_text()
    out.write_text(published)
    assert call(out) == 0 and len(measured) == 6
    assert (out.parent / "r.before1.json").read_text() == published


@pytest.mark.parametrize("text", ["", '{"records": 3}', "[" * 100_000])
def test_a_damaged_file_is_made_again_of_what_processes_wrote(
    text: str, out: Path, measured: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(out) == 0
    out.write_text(text)
    measured.clear()
    assert call(out) == 0 and measured == []
    assert len(results.read(out).records) == 6
    assert (out.parent / "r.before1.json").read_text() == text
    said = capsys.readouterr().out
    assert "r.json is no result file" in said and "it is r.before1.json now" in said


def noted(out: Path, call: str, **more: Any) -> None:
    where = results.place(here())
    failed = record(CASES[0], "reference", 1.0, **{"times": {}, "error": "lost", **more})
    parts.append(parts.part(out, 0), failed, where, call)


def test_an_error_is_tried_again_by_the_next_call_alone(
    out: Path, measured: list[tuple[str, str]]
) -> None:
    noted(out, "first")
    assert call(out, "--call", "first") == 0
    assert (CASES[0].name, "reference") not in measured and len(measured) == 5
    measured.clear()
    assert call(out, "--call", "second") == 0
    assert measured == [(CASES[0].name, "reference")]
    (found,) = [r for r in results.read(out).records if (r.name, r.provider) == measured[0]]
    assert found.error is None and found.times["graph"]["both"][0] == 2.0
    assert call(out, "--call", "third") == 0 and len(measured) == 1


def test_an_error_of_the_file_alone_is_tried_again(
    out: Path, measured: list[tuple[str, str]]
) -> None:
    Results(here(), {}, [record(CASES[0], "reference", 1, times={}, error="lost")]).write(out)
    assert call(out) == 0 and len(measured) == 6
    assert [r.error for r in results.read(out).records] == [None] * 6


def test_an_error_replaces_no_times(out: Path) -> None:
    where, lines = results.place(here()), parts.part(out, 0)
    noted(out, "first", error="first")
    noted(out, "second", error="second")
    assert [r.error for r in parts.records_in(lines, where)] == ["second"]
    noted(out, "third", error=None)
    noted(out, "fourth", error="late")
    assert [r.error for r in parts.records_in(lines, where)] == [None]
    Results(here(), {}, [record(CASES[0], "reference", 1, times={}, error="lost")]).write(out)
    parts.take_over(out, where)
    assert [r.error for r in parts.records_in(lines, where)] == [None]


def test_a_case_that_fails_after_a_record_leaves_it(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(case: Case, names: list[str], _: object) -> Iterator[Record]:
        yield record(case, names[0], 2.0)
        raise MemoryError("no memory")

    monkeypatch.setattr(measure, "measure", fails)
    assert call(out) == 0
    lines = [json.loads(line) for line in parts.part(out, 0).read_text().splitlines()]
    errors = {(line["name"], line["provider"]): line["error"] is None for line in lines}
    assert len(lines) == 6 and errors == {
        (case.name, name): name == "reference" for case in CASES for name in WHO
    }


def test_bytes_that_the_file_alone_has_stay(out: Path, measured: list[tuple[str, str]]) -> None:
    assert call(out) == 0
    found = results.read(out)
    found.records[0].bytes["moved"] = 7.0
    found.write(out)
    assert call(out) == 0
    assert asdict(results.read(out).records[0])["bytes"] == {"moved": 7.0}


def test_a_folder_is_no_result_file(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(out.parent) == 2
    assert "must be a file, it is a folder" in capsys.readouterr().err
    assert write(out, []).exists()
