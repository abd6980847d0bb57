"""Checks of single arguments: each names the argument, what was given and what is accepted."""

import math
import operator
from collections.abc import Collection
from typing import Any


def one_of(argument: str, given: object, accepted: Collection[str]) -> None:
    """ValueError unless `given` is one of the accepted names."""
    if not isinstance(given, str) or given not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(accepted)}; got {given!r}")


def whole(argument: str, given: Any, least: int = 1) -> int:
    """A whole number of at least `least`; ValueError otherwise."""
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{argument} must be a whole number of at least {least}, got {given!r}")
    return number


def finite(argument: str, given: Any) -> float:
    """A finite number; ValueError otherwise."""
    try:
        number = math.nan if isinstance(given, (bool, str)) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < math.inf:  # NaN is not; a compiler's symbolic number can be compared
        raise ValueError(f"{argument} must be a finite number, got {given!r}")
    return number


def probability(argument: str, given: Any) -> float:
    """A number in [0, 1); ValueError otherwise."""
    if not 0.0 <= finite(argument, given) < 1.0:
        raise ValueError(f"{argument} must be in [0, 1), got {given!r}")
    return float(given)


def truth(argument: str, given: Any) -> bool:
    """True or False; ValueError for anything else."""
    if not isinstance(given, bool):
        raise ValueError(f"{argument} must be True or False, got {given!r}")
    return given
