"""`python -m bench`: cases measured in several processes, written down as they come.

Each process appends its records to a file of its own beside the result file, and starts where an
interrupted one stopped; the result file holds all of them, and is written anew after every case.
Another file says what a process is at: where it dies, that gets the error and the rest goes on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from bench import protocol, results
from bench.cases import GRIDS, Case, grid, share
from bench.operands import DTYPES
from bench.parts import append, at, done, merge, part, take_over
from bench.providers import PROVIDERS, check_names, obstacle, offered
from bench.results import Record
from fused_route.checks import one_of, whole

if TYPE_CHECKING:
    from bench.measure import Settings

# What is measured where nothing is said: a grid, and the providers that need no compiler's minutes.
DEFAULT_GRID = {"cuda": "headline", "cpu": "cpu"}
DEFAULT_PROVIDERS = {
    "cuda": ["reference", "published", "compile-folded", "matmul-order", "peft", "fused", "frozen",
             "full"],
    "cpu": ["reference", "published", "matmul-order", "peft", "frozen", "full"],
}  # fmt: skip


LOST = 3  # exit status of a process that lost its GPU
INTERRUPTED = 130  # of one that Ctrl-C ended, as a shell has it


def add_arguments(parser: ArgumentParser) -> None:
    """Those of a run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--grid", help=f"one of {', '.join(GRIDS)} (default: {DEFAULT_GRID})")
    parser.add_argument("--case", action="append", help="only cases whose name matches this glob")
    parser.add_argument(
        "--provider", action="append", help=f"repeatable, of {', '.join(PROVIDERS)}"
    )
    parser.add_argument(
        "--last", action="append", default=[], metavar="PROVIDER",
        help="repeatable: one that is measured when all cases have the others, for a short budget",
    )  # fmt: skip
    parser.add_argument("--device", default=device, help="cuda or cpu")
    parser.add_argument("--processes", type=int, default=3, help="how often all of it is repeated")
    parser.add_argument("--seconds", type=float, default=0.5, help="of samples for each timing")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument(
        "--warm", type=int, default=0, help="first compile in this many processes at once (GPU)"
    )
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/…)")
    parser.add_argument("--list", action="store_true", help="list cases and providers, run none")
    parser.add_argument("--process", type=int, help="only this one of the processes, in this one")
    parser.add_argument("--until", type=float, help="the time at which no case is begun any more")
    parser.add_argument("--share", help="i/n: only run the gates of every n-th case from the i-th")
    parser.add_argument("--call", help="whose errors, of this process, are not tried again")


def run(arguments: Namespace) -> int:
    """Lists or measures; 1 where a provider failed."""
    cases, names = chosen(arguments)
    if arguments.list:
        print(listing(cases, names, torch.device(arguments.device)))
        return 0
    if arguments.device == "cpu" and arguments.process is None:
        print(
            "on a CPU: plain torch against plain torch; the kernels need a GPU and are left out",
            file=sys.stderr,
        )
    if arguments.until is None and arguments.budget is not None:
        arguments.until = time.time() + arguments.budget
    out = results.for_writing(
        arguments.out or results.path_for(results.environment(torch.device(arguments.device)))
    )
    if arguments.call is None:
        arguments.call = str(time.time())
        go_on(cases, names, arguments, out)
    if arguments.share:
        return warm_up(cases, names, arguments, out)
    if arguments.process is not None:
        return measure_all(cases, names, arguments, out)
    again = [sys.executable, "-m", "bench", *sys.argv[1:], "--out", str(out)]
    again += ["--call", arguments.call]
    if arguments.until is not None:
        again += ["--until", str(arguments.until)]
    if arguments.device == "cuda" and arguments.warm:
        left = left_to_warm(cases, names, arguments, out)
        warm(again, min(arguments.warm, len(left)), arguments.until)
    went = [repeated(again, process, arguments, out) for process in range(arguments.processes)]
    if not out.exists():
        if not all(went):
            return 1
        raise ValueError(f"out={str(out)!r}: no process measured anything; see above")
    return max(conclude(out), int(not all(went)))


def go_on(cases: list[Case], names: list[str], arguments: Namespace, out: Path) -> None:
    """Takes over what an earlier call measured, and says so; its errors are tried again."""
    device = torch.device(arguments.device)
    where = results.place(results.environment(device))
    take_over(out, where)
    asked = {(case.name, name) for case in cases for name in offered(case, names, device)}
    one = arguments.process
    processes = range(arguments.processes) if one is None else [one]
    kept = sum(len(asked & done(part(out, i), where, arguments.call)) for i in processes)
    if kept:
        print(f"{kept} records of this device and code are there already and stay as they are, "
              "whatever --seconds they were measured with", file=sys.stderr)  # fmt: skip


def repeated(again: list[str], process: int, arguments: Namespace, out: Path) -> bool:
    """Starts one of the processes until it ends by itself; False, and why, where it did not.

    One that lost its GPU has written down the culprit. One that died could not: what it was at
    gets the error here. The rest may go on.
    """
    while arguments.until is None or time.time() < arguments.until:
        at(out, process).unlink(missing_ok=True)
        try:
            code = subprocess.run([*again, "--process", str(process)], check=False).returncode
        except OSError as error:
            print(f"process {process} could not be started: {error}", file=sys.stderr)
            return False
        if code == 0:
            return True
        if code == LOST:
            continue
        how = f"signal {-code}" if code < 0 else f"status {code}"
        print(f"process {process} ended with {how}", file=sys.stderr)
        is_stopped = code in (-signal.SIGINT, -signal.SIGTERM, INTERRUPTED)
        if is_stopped or not note_death(how, process, arguments, out):
            return False
    return True


def note_death(how: str, process: int, arguments: Namespace, out: Path) -> bool:
    """Errors for what a process was at when it died; whether there was anything."""
    found = at(out, process)
    if not found.exists():
        return False
    about = json.loads(found.read_text())
    environment = results.environment(torch.device(arguments.device))
    where, lines = results.place(environment), part(out, process)
    case = Case(**about["case"])
    tried = done(lines, where, arguments.call)
    left = [name for name in about["providers"] if (case.name, name) not in tried]
    for name in left:
        error = f"the process ended with {how}"
        failed = Record(case.name, case.to_json(), name, process, error=error)
        append(lines, failed, where, arguments.call)
    merge(out, {"environment": environment, "ceilings": {}}, {})
    return bool(left)


def warm(again: list[str], shares: int, stop: float | None) -> None:
    """Lets so many processes, or none, run the gates, for at most half of the time there is."""
    few_threads = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    started = [
        subprocess.Popen(
            [*again, "--share", f"{i}/{shares}"], stderr=subprocess.DEVNULL, env=few_threads
        )
        for i in range(shares)
    ]
    latest = time.time() + 600 if stop is None else (time.time() + stop) / 2
    for one in started:
        try:
            one.wait(timeout=max(1.0, latest - time.time()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def chosen(arguments: Namespace) -> tuple[list[Case], list[str]]:
    """The cases and providers that were asked for.

    Raises:
        ValueError: a name that is none, or a number that is not positive.
    """
    if arguments.device not in DEFAULT_GRID:
        raise ValueError(f"device must be cuda or cpu, got {arguments.device!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU; use --device cpu")
    for name in ("processes", "seconds", "budget"):
        given = getattr(arguments, name)
        if given is not None and not 0 < given < float("inf"):
            raise ValueError(f"{name} must be positive, got {given}")
    if arguments.process is not None:
        whole("process", arguments.process, least=0)
    if arguments.share:
        share(arguments.share)
    names = check_names(arguments.provider or DEFAULT_PROVIDERS[arguments.device])
    for name in arguments.last:
        one_of("last", name, names)
    cases = grid(arguments.grid or DEFAULT_GRID[arguments.device], arguments.case)
    device = torch.device(arguments.device)
    if not any(offered(case, names, device) for case in cases):
        why = obstacle(names[0], cases[0], device)
        raise ValueError(f"provider: none of {', '.join(names)} has any of these cases: {why}")
    return cases, names


def listing(cases: list[Case], names: list[str], device: torch.device) -> str:
    """Cases by name, with the providers that each has."""
    lines = []
    for case in cases:
        lines.append(f"{case.name:58} {' '.join(offered(case, names, device))}")
    told = "\n".join(f"  {name:15} {PROVIDERS[name].says}" for name in names)
    return "\n".join([*lines, "", f"{len(cases)} cases; providers:", told,
                      "next: the same command without --list"])  # fmt: skip


def measure_all(cases: list[Case], names: list[str], arguments: Namespace, out: Path) -> int:
    """Measures what this process has not yet, a line for each record; LOST where the GPU is."""
    from bench.measure import Settings

    device = torch.device(arguments.device)
    settings = Settings(device, arguments.seconds, arguments.process)
    lines, current = part(out, arguments.process), at(out, arguments.process)
    lines.parent.mkdir(parents=True, exist_ok=True)
    about = {"environment": results.environment(device), "ceilings": {}}
    where = results.place(about["environment"])
    asked = {case.name: offered(case, names, device) for case in cases}
    todo = in_turns(cases, asked, arguments.last, done(lines, where, arguments.call))
    if todo:
        about["ceilings"] = protocol.ceilings(device, DTYPES[cases[0].dtype])
    merge(out, about, asked)  # with what a killed run wrote last
    bar = tqdm(todo, desc=f"process {arguments.process}", unit="case", smoothing=0)
    for case, left in bar:
        bar.set_postfix_str(case.name)
        if arguments.until is not None and time.time() > arguments.until:
            continue
        results.write_whole({"case": case.to_json(), "providers": left}, current)
        if not measure_one(
            case, left, settings, lambda record: append(lines, record, where, arguments.call)
        ):
            return LOST
        merge(out, about, asked)
    current.unlink(missing_ok=True)
    return 0


def measure_one(
    case: Case, names: list[str], settings: "Settings", add: Callable[[Record], None]
) -> bool:
    """Adds the records of a case, each as soon as it is whole; False where the GPU is lost."""
    from bench.measure import GpuLost, measure, one_line

    left = list(names)
    try:
        for record in measure(case, names, settings):
            add(record)
            left.remove(record.provider)
    except GpuLost as lost:
        add(lost.record)
        return False
    except Exception as error:  # of the case as a whole: too large, most likely
        for name in left:
            failed = Record(case.name, case.to_json(), name, settings.process)
            add(replace(failed, error=one_line(error)))
    return True


def in_turns(
    cases: list[Case], asked: dict[str, list[str]], last: list[str], done: set[tuple[str, str]]
) -> list[tuple[Case, list[str]]]:
    """Each case with those of its providers that are not done; those in `last` after all cases.

    Args:
        asked: providers by the case's name; done: names of cases and their providers.
    """
    found = []
    for is_last in (False, True):
        for case in cases:
            left = [p for p in asked[case.name] if (case.name, p) not in done]
            found.append((case, [p for p in left if (p in last) == is_last]))
    return [(case, providers) for case, providers in found if providers]


def warm_up(cases: list[Case], names: list[str], arguments: Namespace, out: Path) -> int:
    """Runs some cases' gates, so that compilers have their results on disk; says nothing of them.

    Triton compiles in one thread: several processes at once save minutes on a card. What inductor
    finds fastest while they share the card is not kept on disk: who measures finds it anew.
    """
    from torch._inductor import config as inductor

    from bench.measure import Settings, makers_of

    inductor.autotune_local_cache = False
    settings = Settings(torch.device(arguments.device))
    first, of = share(arguments.share)
    for case, left in left_to_warm(cases, names, arguments, out)[first::of]:
        for maker in makers_of(case, left, settings).values():
            with contextlib.suppress(Exception):  # measured again, and said, in the run itself
                maker.gate()
    return 0


def left_to_warm(
    cases: list[Case], names: list[str], arguments: Namespace, out: Path
) -> list[tuple[Case, list[str]]]:
    """What one of the processes has still to measure: a second call warms no more than that."""
    device = torch.device(arguments.device)
    where = results.place(results.environment(device))
    of_all = [done(part(out, i), where, arguments.call) for i in range(arguments.processes)]
    asked = {case.name: offered(case, names, device) for case in cases}
    return in_turns(cases, asked, [], set.intersection(*of_all))


def conclude(out: Path) -> int:
    """Says what was found; 1 where a provider failed."""
    found = results.read(out)
    failed = [record for record in found.records if record.error is not None]
    for record in failed:
        print(f"{record.name} {record.provider}: {record.error}")
    for line in results.without_time(found.missing):
        print(line)
    processes = {record.process for record in found.records}
    print(f"{len(found.records)} records of {len(processes)} processes in {out}, "
          f"{len(failed)} failed")  # fmt: skip
    print(f"next: python -m bench report {out}")
    return int(bool(failed))
