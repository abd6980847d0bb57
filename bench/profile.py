"""`python -m bench profile`: bytes that kernels really move in device memory, by Nsight Compute.

Each kernel of one forward and backward pass starts with a cold cache, as the formula has it: what a
kernel reads comes from memory, also where the one before it has just written it.
"""

import csv
import json
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from bench import protocol, results
from bench.cases import Case
from bench.operands import Operands
from bench.parts import add_moved, moved_file
from bench.providers import PROVIDERS

METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
HOPELESS = 3  # failures without a success: no permission to read counters, most likely
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def add_arguments(parser: ArgumentParser) -> None:
    """Those of a profile."""
    parser.add_argument("file", type=Path, help="result file whose operations are profiled")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds at most")
    parser.add_argument(
        "--once", nargs=2, metavar=("CASE", "PROVIDER"), help="run one call of these"
    )


def main(arguments: Namespace) -> int:
    """Profiles every operation and provider of a result file that has not been, and adds to it."""
    if arguments.once:
        once(Case(**json.loads(arguments.once[0])), arguments.once[1])
        return 0
    if not arguments.budget > 0:
        raise ValueError(f"budget must be positive, got {arguments.budget}")
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("ncu, Nsight Compute's command, is not on the PATH: nothing to profile by")
    found = results.read(arguments.file)
    left = {
        (record.name, record.provider): record
        for record in found.records
        if record.case["kind"] == "op" and record.error is None and "moved" not in record.bytes
    }
    stop, failed, profiled = time.monotonic() + arguments.budget, 0, 0
    for (name, provider), record in tqdm(left.items(), desc="profiling", unit="case"):
        if time.monotonic() > stop or (failed == HOPELESS and not profiled):
            break
        command = once_command(ncu, arguments.file, record.of_case(), provider)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        moved = None if done.returncode else bytes_in(done.stdout)
        if moved is None:
            failed += 1
            tqdm.write(f"{name} {provider}: ncu said {(done.stdout + done.stderr)[-300:]!r}")
            continue
        with moved_file(arguments.file).open("a") as file:
            file.write(json.dumps({"name": name, "provider": provider, "moved": moved}) + "\n")
        profiled += 1
    add_moved(arguments.file, found.records)
    found.write(arguments.file)
    print(f"{profiled} profiled, {failed} failed, {len(left) - profiled - failed} left")
    print(f"next: python -m bench report {arguments.file}")
    return int(failed > 0)


def once_command(ncu: str, file: Path, case: Case, provider: str) -> list[str]:
    """One call of a provider under ncu. The card's clocks are left as they are."""
    profiler = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    ours = [sys.executable, "-m", "bench", "profile", str(file)]
    return [*profiler, "--metrics", METRICS, *ours, "--once", json.dumps(case.to_json()), provider]


def once(case: Case, provider: str) -> None:
    """One call between the marks that ncu looks for, after one that compiles."""
    device = torch.device("cuda")
    subject = PROVIDERS[provider].make(Operands.of_case(case, device))
    clock = protocol.clock_of(device)
    protocol.samples(subject, clock, 3)
    torch.cuda.profiler.start()
    protocol.one_call(subject, clock)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def bytes_in(said: str) -> float | None:
    """The sum over kernels of what ncu's table of comma-separated values says; None without one."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if '"Metric Value"' in line), None)
    if start is None:
        return None
    rows = list(csv.DictReader(lines[start:]))
    known = [row for row in rows if row["Metric Name"] in METRICS.split(",")]
    if not known:
        return None
    return sum(
        float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]] for row in known
    )
