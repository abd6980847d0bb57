"""A comparison's results: per arm over its seeds, against the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fused_route.training.comparison.runs import Runs
from fused_route.training.comparison.statistics import (
    Difference,
    Spread,
    differences,
    grouped,
    paired_bootstrap,
    spread,
    without_group,
)

# What has to be the same for all arms, as a flag names it.
EQUAL = {"trainable": "number of parameters", "steps": "steps", "batch": "rows in a step"}


@dataclass(frozen=True)
class Arm:
    """An arm over the seeds that are done; None where none is.

    Attributes:
        name: of the arm.
        settings: that make it, as of `plan.Told`.
        seeds: that are done.
        score: main score over seeds.
        scores: every score over seeds, by name.
        difference: to the baseline on the same items, over the seeds that both have done.
        shared: these seeds.
        items: how many items.
        trainable, steps: of each distinct number, as a rule one.
        seconds: of training, with its validation, over the runs that were not interrupted.
        peak_mib: the highest of the runs.
        memory: of what.
        curve: (step, validation score, mean over seeds).
        band: its standard deviation at each step; None for one seed.
        rate: the learning rate, where it was chosen for the arm.
        rates: scores on the validation split by learning rate.
        flags: what keeps the arm from an equal comparison, or is missing.
    """

    name: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    score: Spread | None
    scores: dict[str, Spread]
    difference: Difference | None
    shared: tuple[int, ...]
    items: int
    trainable: tuple[int, ...]
    steps: tuple[int, ...]
    seconds: Spread | None
    peak_mib: float | None
    memory: str | None
    curve: list[tuple[int, float]]
    band: list[float] | None
    rate: float | None
    rates: dict[str, float | None]
    flags: tuple[str, ...]


def arms_of(runs: Runs) -> list[Arm]:
    """Every arm of a comparison, as far as it is done."""
    return [_arm(runs, name) for name in runs.comparison.arms]


def _arm(runs: Runs, name: str) -> Arm:
    records = _records(runs, name)
    base = _records(runs, runs.comparison.baseline)
    found = list(records.values())
    compared = _against(runs, name, sorted(records.keys() & base.keys()))
    curve, band = _curve([record["curve"] for record in found])
    chosen = runs.chosen(name) or {"rate": None, "scores": {}}
    names = set.intersection(*(set(record["scores"]) for record in found)) if found else set()
    in_order = [key for key in (found[0]["scores"] if found else {}) if key in names]
    return Arm(
        name=name,
        settings=runs.told.own[name],
        seeds=tuple(records),
        score=spread([record["score"] for record in found]) if found else None,
        scores={key: spread([record["scores"][key] for record in found]) for key in in_order},
        difference=compared.difference,
        shared=compared.seeds,
        items=compared.items,
        curve=curve,
        band=band,
        rate=chosen["rate"],
        rates=chosen["scores"],
        flags=(*unequal(found, list(base.values())), *_missing(runs, name), *compared.flags),
        **_costs(found),
    )


def _costs(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What runs took, by the names of `Arm`."""
    timed = [record["seconds"] for record in found if record["seconds"] is not None]
    peaks = [record["peak_mib"] for record in found if record["peak_mib"] is not None]
    return {
        "trainable": tuple(sorted({record["trainable"] for record in found})),
        "steps": tuple(sorted({record["steps"] for record in found})),
        "seconds": spread(timed) if timed else None,
        "peak_mib": max(peaks, default=None),
        "memory": found[0]["memory"] if found else None,
    }


def _records(runs: Runs, name: str) -> dict[int, dict[str, Any]]:
    found = {seed: runs.record(name, seed) for seed in runs.comparison.seeds}
    return {seed: record for seed, record in found.items() if record is not None}


class _Compared(NamedTuple):
    difference: Difference | None = None
    seeds: tuple[int, ...] = ()
    items: int = 0
    flags: tuple[str, ...] = ()


def _against(runs: Runs, name: str, shared: Sequence[int]) -> _Compared:
    """The difference to the baseline over these seeds; nothing for the baseline itself."""
    baseline = runs.comparison.baseline
    if name == baseline or not shared:
        return _Compared()
    ours, theirs = ([runs.items(arm, seed) for seed in shared] for arm in (name, baseline))
    try:
        paired = differences(ours, theirs)
    except ValueError as error:  # must not stop the runs that are left
        return _Compared(flags=(f"not compared: {error}",))
    groups, flags = runs.images, list[str]()
    if groups is not None and (lost := without_group(ours[0], groups)):
        groups = None
        flags.append(f"interval by items, not images: {lost:,} of them are no more in the data")
    found = paired_bootstrap(paired, grouped(ours[0], groups))
    return _Compared(found, tuple(shared), sum(map(len, paired)), tuple(flags))


def _curve(
    curves: Sequence[Sequence[Sequence[float]]],
) -> tuple[list[tuple[int, float]], list[float] | None]:
    """Mean and sd at the steps that all runs have."""
    by_step = [{int(step): value for step, value in curve} for curve in curves]
    steps = [step for step in (by_step[0] if by_step else {}) if all(step in c for c in by_step)]
    over = [spread([curve[step] for curve in by_step]) for step in steps]
    band = [s.sd for s in over if s.sd is not None]
    means = [(step, s.mean) for step, s in zip(steps, over, strict=True)]
    return means, band if len(band) == len(over) > 0 else None


def unequal(arm: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each budget of an arm's runs that is not the baseline's, if both are known."""
    flags = []
    for key, what in EQUAL.items():
        ours, theirs = (_distinct(runs, key) for runs in (arm, baseline))
        if ours and theirs and ours != theirs:
            flags.append(f"other {what}: {' and '.join(ours)} against {' and '.join(theirs)}")
    return flags


def _distinct(runs: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return sorted({_shown(run[key]) for run in runs if key in run})


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(f"{name} {value[name]}" for name in sorted(value))


def _missing(runs: Runs, name: str) -> list[str]:
    flags = []
    for seed in runs.comparison.seeds:
        error = runs.error(name, seed)
        if error is not None:
            flags.append(f"seed {seed} failed: {error}")
        elif runs.record(name, seed) is None:
            flags.append(f"seed {seed} is not done")
    return flags


def notes_of(runs: Runs) -> list[str]:
    """What a reader has to know beside the numbers."""
    comparison, notes = runs.comparison, []
    split = comparison.split
    same: list[str] = []
    for recipe in runs.recipes.values():
        for name, task in recipe.tasks.items():
            scored = getattr(task, split, None) if split in ("test", "validation") else split
            if task.validation is not None and scored == task.validation:
                same.append(name)
    if same:
        rates = "checkpoints and learning rates" if comparison.rates else "checkpoints"
        notes.append(
            f"{split!r} of tasks.{same[0]} is the validation split too: {rates} were chosen by "
            "what is scored, and scores are higher than on new data"
        )
    records = [r for arm in comparison.arms for r in _records(runs, arm).values()]
    commits = {str(record["commit"]) for record in records}
    machines = {str(record["machine"]) for record in records}
    for what, values in (("versions of the code", commits), ("machines", machines)):
        if len(values) > 1:
            notes.append(f"runs of several {what}: {'; '.join(sorted(values))}")
    interrupted = sum(record["seconds"] is None for record in records)
    if interrupted:
        notes.append(f"seconds are without {interrupted} interrupted runs, which went on later")
    return notes
