"""Running the study: what its comparisons need, then all of them, as many at once as told."""

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.study.captions import write_captions
from bench.study.decoder import train_decoder
from bench.study.text import write_text_model
from bench.study.vit import write_vit
from fused_route.training.cli import main
from fused_route.training.comparison.plan import Comparison, read_comparison
from fused_route.training.comparison.work import TRAINED, end_with_parent

STUDY = Path("docs", "study")
COMPARISONS = (
    "centre", "prefix", "adapter", "controls", "rank-4", "rank-64", "ceiling", "synthetic-captions",
)  # fmt: skip
CACHE, RUNS = Path(".cache", "study"), Path("runs", "study")
EVERY = 2.0  # seconds between two looks at what is done


def comparison_file(name: str) -> Path:
    """Where a comparison of the study is told.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in COMPARISONS:
        raise ValueError(f"comparison must be one of {', '.join(COMPARISONS)}; got {name!r}")
    return STUDY / "comparisons" / f"{name}.yaml"


def prepare() -> None:
    """Makes models and data under .cache/study and encodes the images; what is there stays."""
    write_text_model(CACHE / "models" / "text")
    write_vit(CACHE / "models" / "vit")
    write_captions(CACHE / "captions")
    train_decoder(CACHE / "captions", CACHE / "models" / "decoder")
    for recipe in ("recipe.yaml", "synthetic-captions-recipe.yaml"):
        if main(["encode", str(STUDY / recipe)]):
            raise ValueError(f"the images of {STUDY / recipe} are not encoded: see above")


def trainings(comparison: Comparison) -> int:
    """How many a comparison is: of each arm a run a seed, the first one for each learning rate."""
    for_rates = max(len(comparison.rates) - 1, 0)
    return len(comparison.arms) * (len(comparison.seeds) + for_rates)


def trained(out: Path) -> int:
    """How many of them are done in a folder."""
    return sum(1 for _ in out.glob(f"*/*/*/{TRAINED}"))


def run(names: Sequence[str], jobs: int, out: Path = RUNS) -> int:
    """Runs comparisons, or goes on with them; returns how many failed.

    Args:
        names: of the comparisons, in the order in which they are begun.
        jobs: how many at once; each gets as many threads as the cores allow.
        out: folder of their folders; OUT/NAME.log is what a comparison printed.
    """
    left = list(dict.fromkeys(names))
    files = {name: comparison_file(name) for name in left}
    total = sum(trainings(read_comparison(file)) for file in files.values())
    threads = max(1, (os.cpu_count() or 1) // jobs)
    out.mkdir(parents=True, exist_ok=True)
    running: dict[str, Any] = {}
    failed = 0
    with tqdm(total=total, desc=f"{len(files)} comparisons", unit="run") as bar:
        try:
            while left or running:
                while left and len(running) < jobs:
                    name = left.pop(0)
                    running[name] = _started(files[name], out / name, threads)
                time.sleep(EVERY)
                for name in [name for name, process in running.items() if not process.is_alive()]:
                    failed += _ended(running.pop(name), out / name, bar)
                bar.update(sum(trained(out / name) for name in files) - bar.n)
        except BaseException:
            for process in running.values():
                process.terminate()
                process.join()
            raise
    return failed


def _started(file: Path, out: Path, threads: int) -> Any:
    """A process of `fused-route compare`, which ends with this one."""
    process = get_context("spawn").Process(target=_compare, args=(file, out, threads))
    process.start()
    return process


def _ended(process: Any, out: Path, bar: "tqdm[Any]") -> bool:
    """Whether a process failed; says so."""
    process.join()
    if process.exitcode:
        status = f"ended with status {process.exitcode}: see {out}.log"
        bar.write(f"{out.name} {status}", file=sys.stderr)
    return bool(process.exitcode)


def _compare(file: Path, out: Path, threads: int) -> None:
    end_with_parent()
    log = os.open(out.with_name(f"{out.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    sys.exit(main(["compare", str(file), "--out", str(out)]))
