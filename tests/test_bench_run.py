"""Processes of `python -m bench`: what is warmed, and what is written down of one that dies."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import measure, parts, protocol, results, run
from bench.__main__ import main
from bench.cases import Case, grid
from bench.measure import Maker, Settings
from bench.results import Record, Results

CPU = torch.device("cpu")
RUN = ["--grid", "smoke", "--case", "op/adapter/*", "--device", "cpu", "--seconds", "0.02",
       "--provider", "reference", "--provider", "published"]  # fmt: skip
CASES = grid("smoke", ["op/adapter/*"])
ALL = {(case.name, name) for case in CASES for name in ("reference", "published")}


class Died(BaseException):
    """Nothing in a process sees its own death."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "ceilings", lambda *_: {"copy": 1e9, "matmul": 1e9})
    monkeypatch.setenv("COMMIT", "one")


def record(case: Case, name: str, process: int = 0) -> Record:
    return Record(case.name, case.to_json(), name, process, times={"wall": {"both": [1.0] * 3}})


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs bench with children in this process, each measuring by `fake`, which may die."""

    def start(fake: Callable[[Case, list[str]], Iterator[Record]], code: int, *more: str) -> int:
        def child(command: list[str], check: bool) -> SimpleNamespace:
            assert command[:3] == [sys.executable, "-m", "bench"]
            try:
                return SimpleNamespace(returncode=main(command[3:]))
            except Died:
                return SimpleNamespace(returncode=code)

        given = [*RUN, "--processes", "1", "--out", str(tmp_path / "r.json"), *more]
        monkeypatch.setattr(sys, "argv", ["bench", *given])
        monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=child))
        monkeypatch.setattr(measure, "measure", lambda case, names, _: fake(case, names))
        return main(given)

    return start


def dies_at_gram(case: Case, names: list[str]) -> Iterator[Record]:
    """With the first of its providers measured."""
    for i, name in enumerate(names):
        if i and case.route == "gram" and case.Nv == 1:
            raise Died
        yield record(case, name)


@pytest.mark.parametrize(("code", "how"), [(-11, "signal 11"), (-9, "signal 9"), (1, "status 1")])
def test_what_a_process_died_at_is_an_error_and_the_rest_goes_on(
    code: int, how: str, tmp_path: Path, started: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert started(dies_at_gram, code) == 1
    found = {(r.name, r.provider): r.error for r in results.read(tmp_path / "r.json").records}
    assert found.keys() == ALL
    assert {key: error for key, error in found.items() if error} == {
        (CASES[1].name, "published"): f"the process ended with {how}"
    }
    said = capsys.readouterr()
    assert f"{CASES[1].name} published: the process ended with {how}" in said.out
    assert f"process 0 ended with {how}" in said.err
    assert not parts.at(tmp_path / "r.json", 0).exists()


@pytest.mark.parametrize("code", [-2, -15])
def test_a_process_that_was_stopped_has_no_error(
    code: int, tmp_path: Path, started: Callable[..., int]
) -> None:
    assert started(dies_at_gram, code) == 1
    found = results.read(tmp_path / "r.json").records
    assert [r.error for r in found] == [None] * 2  # of the case before
    lines = parts.part(tmp_path / "r.json", 0).read_text().splitlines()
    assert len(lines) == 3 and not any(json.loads(line)["error"] for line in lines)


def test_a_run_that_is_interrupted_says_how_it_goes_on(
    tmp_path: Path, started: Callable[..., int], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupted(case: Case, names: list[str]) -> Iterator[Record]:
        yield record(case, names[0])
        raise KeyboardInterrupt

    assert started(interrupted, 0) == 1  # of the process alone
    said = capsys.readouterr().err
    assert "process 0 ended with status 130" in said and "interrupted" not in said
    assert [r.error for r in results.read(tmp_path / "r.json").records] == []

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "repeated", stops)
    assert main([*RUN, "--out", str(tmp_path / "r.json")]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "python -m bench run: interrupted; the same command goes on"


def test_a_death_that_is_no_case_s_is_not_tried_again(
    tmp_path: Path, started: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one blamed that another process was at when it was killed."""
    case = {"case": CASES[0].to_json(), "providers": ["reference"]}
    parts.at(tmp_path / "r.json", 0).write_text(json.dumps(case))
    deaths = []

    def dies(*_: object) -> None:
        deaths.append(1)
        raise Died

    monkeypatch.setattr(protocol, "ceilings", dies)
    assert started(dies_at_gram, -11) == 1
    assert len(deaths) == 1 and not (tmp_path / "r.json").exists()


def test_a_process_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*RUN, "--out", str(tmp_path / "r.json"), "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *given])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    assert main(given) == 1
    said = capsys.readouterr().err
    assert "process 0 could not be started: " in said and "No such file" in said


def arguments(tmp_path: Path, *more: str) -> Namespace:
    parser = ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args([*RUN, "--out", str(tmp_path / "r.json"), "--processes", "2", *more])


def noted(tmp_path: Path, process: int, *done: tuple[Case, str]) -> None:
    where = results.place(results.environment(CPU))
    for case, name in done:
        parts.append(parts.part(tmp_path / "r.json", process), record(case, name, process), where)


def test_only_what_a_process_has_still_to_measure_is_warmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated: list[tuple[str, str]] = []

    def makers_of(case: Case, names: list[str], _: Settings) -> dict[str, Maker]:
        def gate(name: str) -> Callable[[], None]:
            return lambda: gated.append((case.name, name))

        return {name: Maker(gate(name), lambda i: pytest.fail("made")) for name in names}

    inductor = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(inductor, "autotune_local_cache", True)
    monkeypatch.setattr(measure, "makers_of", makers_of)
    first, second, _ = CASES
    noted(tmp_path, 0, (first, "reference"), (first, "published"), (second, "reference"))
    noted(tmp_path, 1, (first, "reference"), (first, "published"))
    out = str(tmp_path / "r.json")
    for share in ("0/2", "1/2"):
        assert main([*RUN, "--processes", "2", "--out", out, "--share", share]) == 0
    assert len(gated) == 4  # the third case's too, which the other share has
    assert set(gated) == ALL - {(first.name, "reference"), (first.name, "published")}
    assert inductor.autotune_local_cache is False  # what shares the card decides nothing
    monkeypatch.setenv("COMMIT", "two")
    gated.clear()
    assert main([*RUN, "--processes", "2", "--out", out, "--share", "0/1"]) == 0
    assert set(gated) == ALL


def test_where_nothing_is_left_nothing_is_warmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[int] = []
    monkeypatch.setattr(run, "chosen", lambda _: (CASES, ["reference", "published"]))
    monkeypatch.setattr(results, "environment", lambda _: {"device": "A GPU", "commit": "one"})
    monkeypatch.setattr(run, "warm", lambda again, n, stop: shares.append(n))
    monkeypatch.setattr(run, "repeated", lambda *_: True)
    monkeypatch.setattr(run, "conclude", lambda _: 0)
    Results({"device": "A GPU", "commit": "one"}, {}, []).write(tmp_path / "r.json")
    given = arguments(tmp_path, "--device", "cuda", "--warm", "2")
    assert run.run(given) == 0
    for process in range(2):
        for case in CASES:
            noted(tmp_path, process, (case, "reference"), (case, "published"))
        assert run.run(given) == 0
    assert shares == [2, 2, 0]
    run.warm(["/nowhere"], 0, None)
