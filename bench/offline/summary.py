"""`python -m bench gates`: all that is known of the kernels without a GPU, in one go.

Compiled resources and their demands, bytes counted against the table, launches and saved bytes,
host time, and times that follow from bytes and FLOPs: those are *modelled*, not measured.
"""

import os
import subprocess
import sys

from bench import formula
from bench.cases import grid


def modelled_table() -> str:
    """Modelled µs of the headline operations, forward and backward, on an H100."""
    ceilings = f"{formula.H100['copy'] / 1e12:g} TB/s and {formula.H100['matmul'] / 1e12:g} TFLOP/s"
    lines = [
        f"modelled, not measured: every kernel at {ceilings}, one after the other, no launch cost",
        "",
        f"{'case':52} {'MB':>7} {'GFLOP':>7} {'floor, µs':>10} {'fused, µs':>10}",
    ]
    for case in grid("headline", ["op/*"]):
        moved = formula.moved(case, "fused")
        assert moved is not None
        floor = formula.floor_seconds(case, "both", **formula.H100) * 1e6
        fused = formula.modelled_seconds(case, "both") * 1e6
        flops = formula.flops(case, "both") / 1e9
        lines.append(
            f"{case.name:52} {moved['both'] / 1e6:7.0f} {flops:7.1f} {floor:10.1f} {fused:10.1f}"
        )
    return "\n".join(lines)


# Each in a process of its own: Triton interprets kernels, compiles them or has a driver for
# nothing, once and for all in a process. (title, arguments of python, environment)
PARTS: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    ("Bytes counted in Triton's interpreter against the table of kernels/README.md",
     ("-m", "pytest", "-q", "-m", "interpret", "tests/test_traffic.py"),
     {"TRITON_INTERPRET": "1"}),
    ("Launches and saved bytes", ("-m", "bench", "launches"), {}),
    ("Host time", ("-m", "bench", "host"), {}),
)  # fmt: skip


def main(is_quick: bool) -> int:
    """Prints every part; 1 where one fails or a compiled kernel misses a demand."""
    compiled = ("-m", "bench", "gates", "--tiles", *(["--quick"] if is_quick else []))
    failed = []
    for title, command, more in (("Compiled kernels", compiled, {}), *PARTS):
        print(f"\n{title}\n", flush=True)
        done = subprocess.run([sys.executable, *command], env={**os.environ, **more}, check=False)
        if done.returncode:
            failed.append(title)
    print(f"\nTimes\n\n{modelled_table()}\n")
    print(f"failed: {'; '.join(failed)}" if failed else "every gate holds")
    print("next: python -m bench, on a GPU")
    return int(bool(failed))
