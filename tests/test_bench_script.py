"""`bench/gpu.sh`: each part asks for what there is, and a part that is stopped is said to be."""

import os
import shlex
import signal
import subprocess
import time
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path

import pytest

from bench import generation
from bench.__main__ import COMMANDS, main
from bench.cases import Case, grid
from bench.providers import PROVIDERS
from bench.run import add_arguments

TOP = Path(__file__).parent.parent
SCRIPT = ["bash", str(TOP / "bench/gpu.sh")]


def with_python(does: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the script, with a program in Python's place."""
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\n{does}\n")
    stub.chmod(0o755)
    folders = {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
    return {**os.environ, **folders, "PYTHON": str(stub), "DEVICE": "cpu"}


def called_by_the_script(part: str, tmp_path: Path, **more: str) -> list[list[str]]:
    """What a part calls Python with, by a program in its place that notes it."""
    told = tmp_path / "told"
    env = with_python(f'echo "$@" >> {shlex.quote(str(told))}', tmp_path)
    done = subprocess.run([*SCRIPT, part], env={**env, **more}, capture_output=True, text=True)
    assert done.returncode == 0 and f"{part} (at most " in done.stdout, done
    assert "failed: nothing" in done.stdout
    return [shlex.split(line) for line in told.read_text().splitlines()]


def told_by_the_script(part: str, tmp_path: Path, **more: str) -> list[str]:
    """What a part asks of `python -m bench`."""
    ((module, name, *told),) = called_by_the_script(part, tmp_path, **more)
    assert (module, name) == ("-m", "bench")
    return told


GRIDS = {"steps": "steps", "long": "long", "models": "models", "ops": "headline",
         "peers": "headline", "autotune": "headline"}  # fmt: skip


def cases_of(told: list[str]) -> list[Case]:
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    arguments = parser.parse_args(told)
    return grid(arguments.grid, arguments.case)


@pytest.mark.parametrize("part", GRIDS)
def test_the_script_measures_a_grid(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_by_the_script(part, tmp_path)
    assert main([*told, "--list"]) == 0
    cases = cases_of(told)
    assert f"{len(cases)} cases" in capsys.readouterr().out
    assert {case.name for case in cases} <= {case.name for case in grid(GRIDS[part])}
    if part in ("steps", "long", "models"):
        assert cases == grid(part)
    if part == "steps":
        assert told[told.index("--last") + 1] == "compile"


def providers_of(told: list[str]) -> set[str]:
    return {name for flag, name in pairwise(told) if flag == "--provider"}


def test_parts_measure_every_provider_of_operations(tmp_path: Path) -> None:
    told = {}
    for part in ("ops", "peers", "autotune", "long"):
        (tmp_path / part).mkdir()
        told[part] = told_by_the_script(part, tmp_path / part)
    assert providers_of(told["ops"]) < providers_of(told["peers"])
    every = set[str]().union(*map(providers_of, told.values()))
    assert every == set(PROVIDERS)
    for part in ("ops", "peers"):
        assert [case.kind for case in cases_of(told[part])] == ["op"] * 16
    assert [(case.host, case.M) for case in cases_of(told["autotune"])] == [
        (host, 32_768) for host in ("adapter", "linear", "qkv")
    ]
    assert "--warm" not in told["autotune"]  # which product is fastest is found by timing them


@pytest.mark.parametrize("grids", [{}, {"HEADLINE": "smoke", "MODELS": "smoke", "STEP": "step/*"}])
def test_all_measures_cases_that_there_are(grids: dict[str, str], tmp_path: Path) -> None:
    env = {**with_python(f'echo "$@" >> {tmp_path / "told"}', tmp_path), **grids}
    subprocess.run([*SCRIPT, "all"], env=env, capture_output=True, check=True)
    told = [shlex.split(line) for line in (tmp_path / "told").read_text().splitlines()]
    kinds = [[case.kind for case in cases_of(t[2:])] for t in told if t[:2] == ["-m", "bench"]]
    assert len(kinds) == 2 and set(kinds[0]) == {"op"} and kinds[1] == ["step"]


@pytest.mark.parametrize("name", ["WORK", "OUT"])
def test_a_folder_that_cannot_be_made_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = {**with_python("true", tmp_path), name: str(tmp_path / "file" / "folder")}
    done = subprocess.run([*SCRIPT, "models"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        f"bench/gpu.sh: {name} must be a folder that can be written; got '{env[name]}'\n"
    )


@pytest.mark.parametrize(
    ("part", "writes", "said"),
    [
        ("models", (), "next: nothing was measured; read {out}/logs.tar.gz"),
        ("generate", ("generation.json",), "next: copy {out}/generation.json to bench/results/"),
        ("memory", ("memory.json",), "next: copy {out}/memory.json to bench/results/"),
        ("models", ("results.json",), "next: copy {out}/summary.json to bench/results/"),
        ("models", ("results.json", "report/report.md"),
         "next: copy {out}/summary.json to bench/results/; {out}/summary.md says more"),
    ],
)  # fmt: skip
def test_the_last_line_names_what_was_written(
    part: str, writes: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    makes = "; ".join(f"touch {work / name}" for name in writes)
    fails = "" if "report/report.md" in writes else '[ "$3" != report ]'
    env = with_python(f"mkdir -p {work / 'report'}; {makes or 'true'}; {fails}", tmp_path)
    done = subprocess.run([*SCRIPT, part], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == said.format(out=out)
    assert all(Path(word).exists() for word in done.stdout.split() if word.startswith(str(out)))


def test_another_process_of_the_operations(tmp_path: Path) -> None:
    told = told_by_the_script("ops", tmp_path, PROCESSES="2")
    assert told[told.index("--processes") + 1] == "2"


@pytest.mark.parametrize("part", ["memory", "generate"])
def test_the_script_asks_for_what_there_is(part: str, tmp_path: Path) -> None:
    name, *told = told_by_the_script(part, tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    COMMANDS[name].add_arguments(parser)
    arguments = parser.parse_args(told)
    assert (name, arguments.device) == (part, "cpu")
    assert arguments.out.parent == tmp_path / "work"
    if part == "generate":
        assert len(generation.chosen(arguments)) > 1 and 30 < arguments.budget < 100


def test_the_log_of_the_tests_has_each_result(tmp_path: Path) -> None:
    """As it comes: of those that their limit ends there is no summary."""
    (told,) = [call for call in called_by_the_script("tests", tmp_path) if "pytest" in call]
    assert "-v" in told and "-q" not in told
    assert all((TOP / word).exists() for word in told if word.startswith("tests/"))


def test_the_screen_has_the_last_lines(tmp_path: Path) -> None:
    env = with_python("[ $1 = -c ] || seq -f 'line %g' 100; exit 1", tmp_path)
    done = subprocess.run([*SCRIPT, "tests"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: tests (1)\n" in done.stdout
    assert "line 100\n" in done.stdout and "line 80\n" not in done.stdout
    assert "line 80\n" in (tmp_path / "work" / "tests.log").read_text()


def test_a_profile_finds_nsight_compute(tmp_path: Path) -> None:
    env = with_python('echo "$PATH"', tmp_path)
    subprocess.run([*SCRIPT, "profile"], env=env, capture_output=True, check=True)
    said = (tmp_path / "work" / "profile.log").read_text()
    assert "/usr/local/cuda/bin" in said.strip().split(":")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_part_that_is_stopped_failed(number: signal.Signals, code: int, tmp_path: Path) -> None:
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    does = f"trap 'touch {stopped}; exit 0' TERM; touch {started}"
    env = with_python(f"{does}; for i in $(seq 100); do sleep 0.1; done", tmp_path)
    script = subprocess.Popen([*SCRIPT, "models"], env=env, stdout=subprocess.PIPE, text=True)
    latest = time.monotonic() + 20
    while not started.exists() and time.monotonic() < latest:
        time.sleep(0.05)
    script.send_signal(number)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == code and "failed: interrupted in models\n" in said
    assert stopped.exists()  # nothing of it runs on


@pytest.mark.parametrize("part", ["all at once", "ops peers", " "])
def test_a_part_that_is_none(part: str) -> None:
    done = subprocess.run([*SCRIPT, part], capture_output=True, text=True)
    assert done.returncode == 2 and "part must be one of tests ops peers" in done.stderr
