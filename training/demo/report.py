"""Results of a comparison: per run, per arm, as a table in the terminal and as a report."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_route.training.demo.figures import Example, accuracy_bars, answer_grid
from fused_route.training.files import atomic_file
from fused_route.training.plots import learning_curves
from fused_route.training.tables import markdown_table, without_nan
from fused_route.training.tables import print_table as lines_of

CURVES, BARS, ANSWERS = "learning_curves.png", "accuracy.png", "answers.png"

Accuracy = Mapping[str, float]


@dataclass(frozen=True)
class ArmResult:
    """One training run of one arm.

    Attributes:
        name: the arm, e.g. "mul + prefix"; runs that differ in the seed alone share it.
        route: the routing function, as in `Routing`.
        normalize: as in `Routing`.
        prefix: whether the text model also reads the image as a token.
        seed: of this run.
        trainable: number of trained parameters.
        seconds: wall time of the training.
        accuracy: fraction of right test answers by question type, "all" first.
        curve: (step, test accuracy) in training.
        predictions: the answer to each test question.
    """

    name: str
    route: str
    normalize: str
    prefix: bool
    seed: int
    trainable: int
    seconds: float
    accuracy: dict[str, float]
    curve: list[tuple[int, float]]
    predictions: list[str]


@dataclass(frozen=True)
class Row:
    """An arm over its seeds: means and sample standard deviations (n − 1).

    `sd` and `band`, which belong to `mean` and `curve`, are None for a single seed.
    """

    name: str
    trainable: int
    seconds: float
    mean: dict[str, float]
    sd: dict[str, float] | None
    curve: list[tuple[int, float]]
    band: list[float] | None
    results: tuple[ArmResult, ...]


def aggregate(results: Sequence[ArmResult]) -> list[Row]:
    """One `Row` an arm, in the order in which the arms first occur.

    Raises:
        ValueError: runs of one arm share a seed, or differ in settings, question types or the
            steps of their curves.
    """
    arms: dict[str, list[ArmResult]] = {}
    for result in results:
        arms.setdefault(result.name, []).append(result)
    return [_row(name, tuple(runs)) for name, runs in arms.items()]


def print_table(rows: Sequence[Row], baselines: Mapping[str, Accuracy]) -> None:
    """Prints arms and baselines (accuracy by question type) to standard output.

    Fits 100 columns. Without a terminal it is plain text of that width, free of control codes.
    """
    lines_of(_table(rows, baselines), quiet=len(baselines))
    print("\n" + _spread(rows))


def write_report(
    folder: Path,
    rows: Sequence[Row],
    baselines: Mapping[str, Accuracy],
    header: Mapping[str, str],
    examples: Sequence[Example] = (),
    *,
    curve_baselines: Accuracy | None = None,
) -> Path:
    """Writes report.md, its figures and results.json into `folder`, each whole or not at all.

    Args:
        folder: made where missing.
        rows: arms, in the order of the table.
        baselines: accuracy by question type, by name.
        header: settings and versions, listed in the report.
        examples: test questions for the third figure; none, no such figure.
        curve_baselines: accuracy of the baselines on the questions behind the learning curves,
            where these are not all; None: as in `baselines`.

    Returns:
        The path of report.md.
    """
    folder = Path(folder)
    figures = {
        CURVES: "Accuracy on test questions during training",
        BARS: "Test accuracy by question type",
    }
    bands = {row.name: row.band for row in rows if row.band is not None}
    curves = {row.name: row.curve for row in rows}
    overall = {name: accuracy["all"] for name, accuracy in baselines.items()}
    learning_curves(curves, folder / CURVES, baselines=curve_baselines or overall, bands=bands)
    accuracy_bars(rows, folder / BARS, baselines)
    if examples:
        answer_grid(examples, folder / ANSWERS)
        figures[ANSWERS] = "Test questions and what each arm answers"
    _write(folder / "results.json", _json(rows, baselines, header))
    _write(folder / "report.md", _markdown(rows, baselines, header, figures))
    return folder / "report.md"


def _row(name: str, runs: tuple[ArmResult, ...]) -> Row:
    settings = {(r.route, r.normalize, r.prefix, r.trainable, *r.accuracy) for r in runs}
    steps = [step for step, _ in runs[0].curve]
    if len(settings) > 1 or any([s for s, _ in run.curve] != steps for run in runs):
        raise ValueError(f"runs of the arm {name!r} differ in more than the seed")
    if len({run.seed for run in runs}) < len(runs):
        raise ValueError(f"two runs of the arm {name!r} have the same seed")
    by_type = {key: [run.accuracy[key] for run in runs] for key in runs[0].accuracy}
    at_step = [[run.curve[i][1] for run in runs] for i in range(len(steps))]
    several = len(runs) > 1
    return Row(
        name=name,
        trainable=runs[0].trainable,
        seconds=statistics.fmean(run.seconds for run in runs),
        mean={key: statistics.fmean(values) for key, values in by_type.items()},
        sd={key: statistics.stdev(values) for key, values in by_type.items()} if several else None,
        curve=[(s, statistics.fmean(values)) for s, values in zip(steps, at_step, strict=True)],
        band=[statistics.stdev(values) for values in at_step] if several else None,
        results=runs,
    )


def _table(rows: Sequence[Row], baselines: Mapping[str, Accuracy]) -> list[list[str]]:
    """Headings, then a line of cells for each arm and each baseline; accuracies in percent."""
    keys = list(rows[0].mean) if rows else ["all"]
    headings = ["overall" if key == "all" else key for key in keys]
    lines = [["arm", *(f"{h} %" for h in headings), "trainable", "seconds"]]
    for row in rows:
        cells = [_percent(row.mean[key], None if row.sd is None else row.sd[key]) for key in keys]
        lines.append([row.name, *cells, f"{row.trainable:,}", f"{row.seconds:.0f}"])
    for name, accuracy in baselines.items():
        lines.append([name, *(_percent(accuracy[key]) for key in keys), "–", "–"])
    return lines


def _percent(mean: float, sd: float | None = None) -> str:
    if math.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def _spread(rows: Sequence[Row]) -> str:
    """What the numbers after ± are."""
    seeds = sorted({len(row.results) for row in rows})
    if seeds and seeds[-1] > 1:
        count = " or ".join(str(n) for n in seeds)
        return f"Mean ± sample standard deviation over {count} seeds; mean seconds of a run."
    return "One seed: the spread between runs is not known."


def _markdown(
    rows: Sequence[Row],
    baselines: Mapping[str, Accuracy],
    header: Mapping[str, str],
    figures: Mapping[str, str],
) -> str:
    title, *body = _table(rows, baselines)
    parts = ["# Test accuracy by arm", markdown_table([title, *body]), _spread(rows)]
    parts += [f"![{caption}]({file})" for file, caption in figures.items()]
    parts += ["## Settings", markdown_table([["setting", "value"], *map(list, header.items())])]
    parts += ["All numbers and every answer: [results.json](results.json)."]
    return "\n\n".join(parts) + "\n"


def _json(rows: Sequence[Row], baselines: Mapping[str, Accuracy], header: Mapping[str, str]) -> str:
    """Header, baselines and every run; nan, which JSON lacks, as null."""
    content = {
        "header": dict(header),
        "baselines": {name: dict(accuracy) for name, accuracy in baselines.items()},
        "arms": [{"name": row.name, "mean": row.mean, "sd": row.sd} for row in rows],
        "results": [asdict(result) for row in rows for result in row.results],
    }
    return json.dumps(without_nan(content), ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
