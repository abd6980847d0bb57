"""What runs amount to: means, spreads, and intervals of differences on the same items."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
CHUNK = 2**22  # counts that are drawn at a time

Items = Mapping[str, Mapping[str, float]]  # scores by task and id


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


def paired_bootstrap(
    by_task: Sequence[np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Difference:
    """The mean over tasks of mean differences, with its percentile bootstrap interval over items.

    Items are drawn with replacement within their task. What a resample's mean is follows from how
    often each distinct difference occurs in it, so these counts are drawn: multinomial.

    Args:
        by_task: (items,) each, as of `differences`.
        resamples: how many.
        seed: of the draws.
        level: of the interval.
    """
    draw = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in by_task:
        distinct, counts = np.unique(values, return_counts=True)
        shares, size = counts / counts.sum(), len(values)
        step = max(1, CHUNK // len(distinct))
        for start in range(0, resamples, step):
            stop = min(start + step, resamples)
            drawn = draw.multinomial(size, shares, size=stop - start)
            means[start:stop] += drawn @ distinct / size
    means /= len(by_task)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    observed = float(np.mean([values.mean() for values in by_task]))
    return Difference(observed, float(low), float(high))
