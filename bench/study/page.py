"""The study's tables, from what is published of it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.study.run import COMPARISONS, comparison_file
from bench.tables import Table, markdown
from fused_route.training.comparison.report import CURVES, DIFFERENCES, REPORT, RESULTS
from fused_route.training.data import easy_vqa

TABLES = "tables.md"
TITLES = {
    "centre": "Rank 16, LoRA, no visual token",
    "prefix": "The same routes with the image as a token before the question",
    "adapter": "Adapters in place of LoRA",
    "controls": "Controls: no image of the question's own",
    "rank-4": "Rank 4",
    "rank-64": "Rank 64",
    "ceiling": "Full fine-tuning, with lower learning rates",
    "synthetic-captions": "Synthetic captions: a decoder of ours, captions made from answers",
}
KINDS = {
    "vqa_accuracy/yes/no": "yes/no",
    "vqa_accuracy/shape": "shape",
    "vqa_accuracy/colour": "colour",
}


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """Contents of results.json of each comparison that is published, in the study's order."""
    files = {name: folder / name / RESULTS for name in COMPARISONS}
    return {n: json.loads(f.read_text(encoding="utf-8")) for n, f in files.items() if f.is_file()}


def write_tables(results: Path) -> Path:
    """Writes tables.md beside the folder of the results; returns its path."""
    path = results.parent / TABLES
    path.write_text(tables(published(results), results), encoding="utf-8")
    return path


def tables(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """All tables as Markdown; scores times 100."""
    parts = ["# Tables of the study", _explained(found)]
    for name, told in found.items():
        parts += [f"## {TITLES[name]}", _described(name, told), markdown(arms_table(told), text=1)]
        flags = [f"- {arm['name']}: {flag}" for arm in told["arms"] for flag in arm["flags"]]
        parts += ["\n".join(flags)] if flags else []
        figures = [file for file in (DIFFERENCES, CURVES) if (folder / name / file).is_file()]
        links = [f"[{file}]({folder.name}/{name}/{file})" for file in (REPORT, RESULTS, *figures)]
        parts.append(" · ".join(links))
    return "\n\n".join(parts) + "\n"


def _described(name: str, told: Mapping[str, Any]) -> str:
    told = told["comparison"]
    common = ", ".join(f"`{key}: {value}`" for key, value in told["overrides"].items())
    file = comparison_file(name)
    return f"[{file.name}](comparisons/{file.name}){', ' if common else ''}{common}"


def arms_table(told: Mapping[str, Any]) -> Table:
    """Headings, then a line for each arm: score, its difference to the baseline, and its costs."""
    kinds = [key for key in KINDS if any(key in arm["scores"] for arm in told["arms"])]
    against = told["comparison"]["baseline"]
    heading = ["arm", "score", f"against {against} [95 %]", "seed by seed"]
    lines = [[*heading, *(KINDS[kind] for kind in kinds), "lr", "parameters", "seconds", "MiB"]]
    for arm in told["arms"]:
        if arm["score"] is None:
            lines.append([arm["name"], "not done", *["–"] * (len(lines[0]) - 2)])
            continue
        lines.append(
            [
                arm["name"],
                spread(arm["score"]),
                difference(arm["difference"]),
                ", ".join(f"{100 * d:+.1f}" for d in by_seed(told, arm["name"])) or "–",
                *(f"{100 * arm['scores'][kind]['mean']:.1f}" for kind in kinds),
                _rate(told, arm),
                ", ".join(f"{n:,}" for n in arm["trainable"]),
                "–" if arm["seconds"] is None else f"{arm['seconds']['mean']:.0f}",
                "–" if arm["peak_mib"] is None else f"{arm['peak_mib']:,.0f}",
            ]
        )
    return lines


def spread(score: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation, times 100."""
    sd = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:.1f}{sd}"


def difference(found: Mapping[str, float] | None) -> str:
    """Mean [low, high], times 100."""
    if found is None:
        return "–"
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def by_seed(told: Mapping[str, Any], arm: str) -> list[float]:
    """Score of an arm less the baseline's, for each seed that both have; none for the baseline."""
    scores = {(run["arm"], run["seed"]): run["score"] for run in told["runs"]}
    base = told["comparison"]["baseline"]
    seeds = [seed for name, seed in scores if name == arm and (base, seed) in scores]
    return [] if arm == base else [scores[arm, seed] - scores[base, seed] for seed in seeds]


def _rate(told: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """The learning rate; "at the edge" where it was the largest or the smallest of those tried."""
    rates = {
        r["settings"]["training.learning_rate"] for r in told["runs"] if r["arm"] == arm["name"]
    }
    tried = told["comparison"]["rates"]
    edge = bool(tried) and arm["rate"] in (min(tried), max(tried))
    return ", ".join(f"{rate:g}" for rate in sorted(rates)) + (", edge" if edge else "")


def _explained(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was run, on what, and what the columns are."""
    runs = [run for told in found.values() for run in told["runs"]]
    others = sum(max(len(arm["rates"]) - 1, 0) for told in found.values() for arm in told["arms"])
    versions = Counter(
        ", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs
    )
    commits = sorted({short(str(run["commit"])) for run in runs})
    machines = sorted({run["machine"] for run in runs})
    prior = language_prior()
    return (
        f"Written by `python -m bench.study publish`. {len(runs)} runs, and {others} more to "
        f"choose learning rates by; {'; '.join(versions)}; commit {', '.join(commits)}; "
        f"{'; '.join(machines)}.\n\n"
        "Score: accuracy on the 9,673 test questions about 1,000 images (captions: CIDEr on 603 "
        "test images), times 100, mean ± sample standard deviation over seeds. Difference: on the "
        "same items, seeds averaged, with the 95 % interval of 10,000 paired bootstrap resamples "
        "of the images: how another draw of images would change it. How another seed did is in "
        "the next column, and is often more. lr: of three the one with the best validation "
        "(captions: the lowest loss) with the first seed, at the edge where there may be better "
        "beyond; controls: that of their route in the first table. Seconds of training with "
        "validation, "
        "one thread a run, two runs at once and other work beside them: orders of magnitude. "
        "MiB of resident memory.\n\n"
        "The most frequent answer to each question's text in all 4,000 training images: "
        f"{100 * prior['all']:.1f} (yes/no {100 * prior['yes/no']:.1f}, shape "
        f"{100 * prior['shape']:.1f}, colour {100 * prior['colour']:.1f})."
    )


def short(commit: str) -> str:
    """Eight digits, and the "+" of files that differed."""
    return commit[:8] + "+" * commit.endswith("+")


def language_prior() -> dict[str, float]:
    """Accuracy on the test questions of the most frequent training answer to the same text."""
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    return easy_vqa.accuracy_by_type(easy_vqa.question_only_baseline(train, test), test.answers)


def arm_of(found: Mapping[str, Mapping[str, Any]], comparison: str, arm: str) -> Mapping[str, Any]:
    """An arm's results.

    Raises:
        ValueError: no such comparison or arm.
    """
    arms: Sequence[Mapping[str, Any]] = found.get(comparison, {}).get("arms", ())
    for one in arms:
        if one["name"] == arm:
            return one
    known = [f"{name}: {one['name']}" for name, told in found.items() for one in told["arms"]]
    raise ValueError(f"row must be one of {', '.join(known)}; got {comparison}: {arm}")
