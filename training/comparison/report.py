"""The report of a comparison: report.md, results.json and its figures."""

import json
from collections.abc import Sequence
from typing import Any

from fused_route.training.comparison.figures import differences
from fused_route.training.comparison.results import Arm, arms_of, notes_of
from fused_route.training.comparison.runs import Runs
from fused_route.training.comparison.statistics import LEVEL, RESAMPLES, Spread
from fused_route.training.comparison.work import code
from fused_route.training.experiment.folder import write_json
from fused_route.training.files import atomic_file
from fused_route.training.plots import learning_curves
from fused_route.training.tables import markdown_table, without_nan

REPORT, RESULTS = "report.md", "results.json"
BANDED = 9  # arms, whose standard deviations can be told apart in a figure
CURVES, DIFFERENCES = "learning_curves.png", "differences.png"


def write_report(runs: Runs) -> list[Arm]:
    """Writes report.md, results.json and figures of what is done, each whole or not at all."""
    arms = arms_of(runs)
    notes = notes_of(runs)
    figures = _figures(runs, arms)
    write_json(runs.out / RESULTS, without_nan(_content(runs, arms, notes)))
    with atomic_file(runs.out / REPORT) as file:
        file.write(_markdown(runs, arms, notes, figures).encode())
    return arms


def _figures(runs: Runs, arms: Sequence[Arm]) -> dict[str, str]:
    """Draws what there is to draw; captions by file."""
    drawn: dict[str, str] = {}
    curves = {arm.name: arm.curve for arm in arms if arm.curve}
    by = _selected_by(runs)
    few = len(curves) <= BANDED
    if curves and by == "score":
        learning_curves(
            curves,
            runs.out / CURVES,
            baselines={},
            bands={arm.name: arm.band for arm in arms if arm.band is not None and few},
            value="validation score",
            unit="",
            title="Validation score, times 100, during training",
        )
        drawn[CURVES] = "Validation score during training"
    compared = {arm.name: arm.difference for arm in arms if arm.difference is not None}
    if compared:
        differences(compared, runs.out / DIFFERENCES, baseline=runs.comparison.baseline)
        drawn[DIFFERENCES] = f"Difference to {runs.comparison.baseline}"
    return drawn


def _selected_by(runs: Runs) -> str:
    """What validation gives: "score", or "loss", of which no curve is drawn."""
    chosen = {recipe.select for recipe in runs.recipes.values()}
    return "score" if chosen == {"score"} else "loss"


def _content(runs: Runs, arms: Sequence[Arm], notes: Sequence[str]) -> dict[str, Any]:
    comparison = runs.comparison
    records = [
        {"arm": name, "seed": seed, **(runs.record(name, seed) or {})}
        for name in comparison.arms
        for seed in runs.done(name)
    ]
    failed = [
        {"arm": name, "seed": seed, "error": runs.error(name, seed)}
        for name in comparison.arms
        for seed in comparison.seeds
        if runs.error(name, seed) is not None
    ]
    return {
        "comparison": dict(vars(comparison)),
        "common": runs.told.common,
        "interval": {"of": _drawn(runs), "level": LEVEL, "resamples": RESAMPLES},
        "notes": list(notes),
        "arms": [_plain(arm) for arm in arms],
        "failed": failed,
        "runs": records,
        "written_by": code(),
    }


def _plain(arm: Arm) -> dict[str, Any]:
    """With the names of named tuples."""

    def named(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return value._asdict()
        return {k: named(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {name: named(value) for name, value in vars(arm).items()}


def table(runs: Runs, arms: Sequence[Arm]) -> list[list[str]]:
    """Headings, then a line of cells for each arm; scores times 100."""
    baseline = runs.comparison.baseline
    heading = ["arm", "score", f"against {baseline} [95 %]", "trainable", "steps", "seconds"]
    lines = [[*heading, "peak MiB", "flags"]]
    for arm in arms:
        difference = "–"
        if arm.difference is not None:
            mean, low, high = (100 * x for x in arm.difference)
            difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(
            [
                arm.name,
                _percent(arm.score),
                difference,
                ", ".join(f"{n:,}" for n in arm.trainable) or "–",
                ", ".join(f"{n:,}" for n in arm.steps) or "–",
                "–" if arm.seconds is None else f"{arm.seconds.mean:.0f}",
                "–" if arm.peak_mib is None else f"{arm.peak_mib:,.0f}",
                "; ".join(arm.flags) or "–",
            ]
        )
    return lines


def _percent(found: Spread | None) -> str:
    if found is None:
        return "–"
    spread = "" if found.sd is None else f" ± {100 * found.sd:.2f}"
    return f"{100 * found.mean:.2f}{spread}"


def _explained(runs: Runs, arms: Sequence[Arm]) -> str:
    """What the numbers are."""
    seeds = sorted({len(arm.seeds) for arm in arms if arm.seeds})
    over = " or ".join(map(str, seeds)) or "no"
    spread = (
        f"mean ± sample standard deviation over {over} seeds"
        if seeds and seeds[-1] > 1
        else "of one seed: the spread between runs is not known"
    )
    items = max((arm.items for arm in arms), default=0)
    memory = next((arm.memory for arm in arms if arm.memory), "of a run")
    text = f"Score on {runs.comparison.split!r}, times 100, {spread}."
    if items:
        text += (
            f" Differences on the same {items:,} items, each averaged over the seeds that both "
            f"arms have, with the interval of {RESAMPLES:,} paired bootstrap resamples of the "
            f"{_drawn(runs)}: how another draw of them would change it, not another seed."
        )
    return f"{text} Seconds of training with its validation; peak memory of a run ({memory})."


def _drawn(runs: Runs) -> str:
    """What is resampled: images, each with all its items, or items where these are not known."""
    return "items" if runs.images is None else "images"


def _scores(arms: Sequence[Arm]) -> list[list[str]]:
    names = list(dict.fromkeys(name for arm in arms for name in arm.scores if name != "score"))
    lines = [["score", *(arm.name for arm in arms)]]
    return lines + [[name, *(_percent(arm.scores.get(name)) for arm in arms)] for name in names]


def _markdown(
    runs: Runs, arms: Sequence[Arm], notes: Sequence[str], figures: dict[str, str]
) -> str:
    told = runs.comparison
    parts = [f"# {told.recipe}: {len(arms)} arms, seeds {', '.join(map(str, told.seeds))}"]
    parts += [markdown_table(table(runs, arms)), _explained(runs, arms)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += [f"![{caption}]({file})" for file, caption in figures.items()]
    if any(arm.scores for arm in arms):
        parts += ["## All scores", markdown_table(_scores(arms))]
    if any(arm.rates for arm in arms):
        parts += ["## Learning rates, by the validation split"]
        parts += [markdown_table(_rates(runs, arms))]
    parts += ["## Arms", markdown_table([["arm", "settings"], *map(_settings, arms)])]
    common = [[name, json.dumps(value)] for name, value in runs.told.common.items()]
    if common:
        parts += ["For all of them:", markdown_table([["setting", "value"], *common])]
    written = code()
    versions = ", ".join(f"{name} {number}" for name, number in written["versions"].items())
    parts.append(f"{versions}; commit {written['commit'] or 'unknown'}; {written['machine']}.")
    parts.append(f"All numbers: [{RESULTS}]({RESULTS}).")
    return "\n\n".join(parts) + "\n"


def _settings(arm: Arm) -> list[str]:
    told = {**arm.settings, **({} if arm.rate is None else {"training.learning_rate": arm.rate})}
    return [arm.name, ", ".join(f"{name}: {value}" for name, value in told.items()) or "–"]


def _rates(runs: Runs, arms: Sequence[Arm]) -> list[list[str]]:
    """Scores times 100, or losses, of which the negatives are kept: more is better."""
    names = list(dict.fromkeys(rate for arm in arms for rate in arm.rates))
    lines = [["arm", *names, "taken"]]
    for arm in arms:
        cells = [arm.rates.get(rate) for rate in names]
        form = "{:.2f}" if runs.recipes[arm.name].select == "score" else "loss {:.4f}"
        unit = 100 if runs.recipes[arm.name].select == "score" else -1
        shown = ["–" if x is None else form.format(unit * x) for x in cells]
        lines.append([arm.name, *shown, "–" if arm.rate is None else f"{arm.rate:g}"])
    return lines
