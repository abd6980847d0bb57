"""What the study found, from the folders of its runs into docs/study/results."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.study.run import RUNS, STUDY
from fused_route.training.comparison.report import CURVES, DIFFERENCES, REPORT, RESULTS
from fused_route.training.comparison.work import ITEMS

RESULTS_FOLDER = STUDY / "results"
SCORES = "items.npz"


def publish(names: Sequence[str], out: Path = RUNS, to: Path = RESULTS_FOLDER) -> list[Path]:
    """Copies reports, figures and raw numbers of what is done; returns the folders written.

    items.npz has the score of every item of every run: "ids/TASK", and "ARM/seed-N/TASK" in their
    order.
    """
    written = []
    for name in names:
        if not (out / name / RESULTS).is_file():
            continue
        folder = to / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in (REPORT, RESULTS, CURVES, DIFFERENCES):
            if (out / name / file).is_file():
                shutil.copyfile(out / name / file, folder / file)
        _write_items(out / name, folder / SCORES)
        written.append(folder)
    return written


def _write_items(comparison: Path, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    ids: dict[str, list[str]] = {}
    for file in sorted(comparison.glob(f"runs/*/*/{ITEMS}")):
        arm, seed = file.parts[-3:-1]
        for task, scores in json.loads(file.read_text(encoding="utf-8")).items():
            order = ids.setdefault(task, list(scores))
            arrays[f"{arm}/{seed}/{task}"] = np.array([scores[key] for key in order])
    arrays |= {f"ids/{task}": np.array(order) for task, order in ids.items()}
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
