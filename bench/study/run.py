"""Running the study: what its comparisons need, then all of them, as many at once as told."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from bench.study.captions import write_captions
from bench.study.decoder import train_decoder
from bench.study.text import write_text_model
from bench.study.vit import write_vit
from fused_route.training.comparison.plan import Comparison, read_comparison
from fused_route.training.comparison.work import TRAINED

STUDY = Path("docs", "study")
COMPARISONS = ("centre", "prefix", "adapter", "controls", "rank-4", "rank-64", "captions")
CACHE, RUNS = Path(".cache", "study"), Path("runs", "study")
COMMAND = (sys.executable, "-m", "fused_route.training")
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
    for recipe in ("recipe.yaml", "captions-recipe.yaml"):
        _call(["encode", str(STUDY / recipe)])


def _call(arguments: Sequence[str]) -> None:
    subprocess.run([*COMMAND, *arguments], check=True)


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
    files = {name: comparison_file(name) for name in names}
    told = {name: read_comparison(file) for name, file in files.items()}
    total = sum(map(trainings, told.values()))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(_compare, files[name], out / name, threads) for name in names]
        with tqdm(total=total, desc=f"{len(names)} comparisons", unit="run") as bar:
            while not all(future.done() for future in done):
                bar.update(sum(trained(out / name) for name in names) - bar.n)
                time.sleep(EVERY)
            bar.update(sum(trained(out / name) for name in names) - bar.n)
    statuses = dict(zip(names, (future.result() for future in done), strict=True))
    for name, status in statuses.items():
        if status:
            print(f"{name} ended with status {status}: see {out / name}.log", file=sys.stderr)
    return sum(map(bool, statuses.values()))


def _compare(file: Path, out: Path, threads: int) -> int:
    """A process of `fused-route compare`; its exit status."""
    command = [*COMMAND, "compare", str(file), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with out.with_name(f"{out.name}.log").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
