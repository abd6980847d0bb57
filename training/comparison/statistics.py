"""What runs amount to: means, spreads, and intervals of differences on the same items."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
CHUNK = 2**22  # counts that are drawn at a time

Items = Mapping[str, Mapping[str, float]]  # scores by task and id
Groups = Mapping[str, Mapping[str, str]]  # what an item is about, by task and id


class Spread(NamedTuple):
    """Mean and sample standard deviation (n − 1; None for one value)."""

    mean: float
    sd: float | None


class Difference(NamedTuple):
    """Mean difference of two arms, and the bounds of its interval."""

    mean: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one value at least."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None)
    return Spread(mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)))


def differences(ours: Sequence[Items], theirs: Sequence[Items]) -> list[np.ndarray]:
    """By task, (items,): each item's score in `ours` less that in `theirs`, averaged over runs.

    Raises:
        ValueError: no runs, or runs that were scored on other items.
    """
    if not ours or not theirs:
        raise ValueError("a difference needs a run of either arm")
    first = ours[0]
    for run in (*ours, *theirs):
        if {t: set(x) for t, x in run.items()} != {t: set(x) for t, x in first.items()}:
            raise ValueError("runs were scored on other items: their difference is not paired")
    found = []
    for task, items in first.items():
        one, other = (
            np.array([[run[task][key] for key in items] for run in runs]).mean(0)
            for runs in (ours, theirs)
        )
        found.append(one - other)
    return found


def grouped(first: Items, groups: Groups | None) -> list[np.ndarray | None]:
    """By task, (items,): the number of each item's group, in the order of `differences`."""
    if groups is None:
        return [None] * len(first)
    found: list[np.ndarray | None] = []
    for task, items in first.items():
        numbers: dict[str, int] = {}
        of = [numbers.setdefault(groups[task][key], len(numbers)) for key in items]
        found.append(np.array(of))
    return found


def without_group(items: Items, groups: Groups) -> int:
    """How many items have no group."""
    return sum(key not in groups.get(task, {}) for task, of in items.items() for key in of)


def paired_bootstrap(
    by_task: Sequence[np.ndarray],
    groups: Sequence[np.ndarray | None] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Difference:
    """The mean over tasks of mean differences, with its percentile bootstrap interval over items.

    Items are drawn with replacement within their task; where they are grouped, whole groups are:
    questions about one image are right and wrong together, and alone would make intervals too
    narrow. What a resample's mean is follows from how often each distinct (sum of a group, its
    size) occurs in it, so these counts are drawn: multinomial.

    Args:
        by_task: (items,) each, as of `differences`.
        groups: (items,) each, as of `grouped`; None: every item is one.
        resamples: how many.
        seed: of the draws.
        level: of the interval.
    """
    draw = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values, of in zip(by_task, groups or [None] * len(by_task), strict=True):
        numbers = np.arange(len(values)) if of is None else of
        summed = np.stack([np.bincount(numbers, values), np.bincount(numbers)], 1)
        distinct, counts = np.unique(summed, axis=0, return_counts=True)
        step = max(1, CHUNK // len(distinct))
        for start in range(0, resamples, step):
            stop = min(start + step, resamples)
            shares = counts / counts.sum()
            drawn = draw.multinomial(len(summed), shares, size=stop - start)
            sums, sizes = (drawn @ distinct).T
            means[start:stop] += sums / sizes
    means /= len(by_task)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    observed = float(np.mean([values.mean() for values in by_task]))
    return Difference(observed, float(low), float(high))
