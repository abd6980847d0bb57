"""Result files that are none: each is named in one line, with the value that does not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured_records import SMALL, Said, record, write

from bench import compare, report
from bench.__main__ import main
from bench.results import FOLDER, Record, Results

BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "foreign": lambda path: path.write_text('{"versions": {}, "runs": []}'),
    "a list": lambda path: path.write_text("[]"),
    "not there": lambda path: None,
    "no records": lambda path: write(path, []),
    "no device": lambda path: Results({}, {}, [record(SMALL, "fused", 1)]).write(path),
    "half the ceilings": lambda path: write(path, [record(SMALL, "fused", 1)], {"copy": 1}),
    "another case": lambda path: write(path, [Record("x", {"kind": "op"}, "fused")]),
    "no number": lambda path: write(path, [record(SMALL, "fused", float("nan"))]),
    "no time": lambda path: write(path, [record(SMALL, "fused", 0.0)]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    BAD[kind](path)
    good = write(tmp_path / "good.json", [record(SMALL, "fused", 1)])
    with pytest.raises(ValueError, match=r"bad\.json"):
        report.main([good, path], tmp_path / "out")
    with pytest.raises(ValueError, match=r"bad\.json"):
        compare.main(good, path)
    assert not (tmp_path / "out").exists()


def damaged(path: Path, key: str, value: Any) -> None:
    """A file whose value at that key, of dots, is another; of its last record if it is of one."""
    more: Any = {"bytes": {"peak": 1.0}, "launches": [1, 2], "kernels": 3.0}
    write(path, [record(SMALL, "fused", 1), record(SMALL, "reference", 1, **more)])
    found = json.loads(path.read_text())
    *way, last = key.split(".")
    at = found
    for name in way:
        at = at[-1] if isinstance(at := at[name], list) and name == "records" else at
    at[last] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("records.bytes.peak", "x", r"records\[1\]\.bytes\.peak must be a number, got 'x'"),
        ("records.case.d", "768", r"records\[1\]\.case\.d must be a whole number .* got '768'"),
        ("records.case.dtype", "fp8", r"records\[1\]\.case\.dtype must be one of bf16"),
        ("records.case.features", "cached", "must be computed unless kind is step"),
        ("records.launches", 3, r"records\[1\]\.launches must be a list, got 3"),
        ("records.kernels", "x", r"records\[1\]\.kernels must be a number, got 'x'"),
        ("records.provider", None, r"records\[1\]\.provider must be text, got None"),
        ("records.times.graph", [], r"times\.graph must be an object, got \[\]"),
        ("records.times.graph.both", [1], r"times\.graph\.both must be a list of 3, got \[1\]"),
        ("records.times.graph.both", [1, 2, None], r"both\[2\] must be a number, got None"),
        ("records.process", -1, r"process must be a whole number of at least 0"),
        ("records.gate", 10**400, r"gate must be a number"),
        ("records.extra", 1, r"records\[1\] has 'extra', which is none of name, case"),
        ("records", None, "records must be a list, got None"),
        ("missing", ["x"], "missing must be an object"),
        ("missing", {"x": "fused"}, r"missing\.x must be a list, got 'fused'"),
        ("environment", None, "environment must be an object, got None"),
        ("environment.versions", [1], r"environment\.versions must be an object"),
        ("ceilings.copy", 0, r"ceilings\.copy must be a positive number, got 0"),
        ("ceilings", [], "ceilings must be an object"),
    ],
)
def test_a_value_that_does_not_fit_is_named(
    key: str, value: Any, said: str, tmp_path: Path, capsys: Said
) -> None:
    path, good = tmp_path / "bad.json", tmp_path / "good.json"
    write(good, [record(SMALL, "fused", 1)])
    damaged(path, key, value)
    for command in (["report", str(path)], ["compare", str(good), str(path)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "bad.json is no result file" in line and re.search(said, line)


def test_a_file_nested_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"bad\.json .*: it is nested too deeply"):
        report.main([tmp_path / "bad.json"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("memory-counted", "generate, or memory"), ("scale", "scale"),
     ("generation-nvidia-h200-bf837d1", "generate, or memory")],
)  # fmt: skip
def test_files_of_other_commands_are_called_so(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"is no result file .* of python -m bench {said}"):
        report.main([FOLDER / f"{name}.json"])
