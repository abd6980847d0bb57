"""Checks of single arguments: each names the argument, what was given and what is accepted."""

import math
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor


def one_of(argument: str, given: object, accepted: Collection[str]) -> None:
    """ValueError unless `given` is one of the accepted names."""
    if not isinstance(given, str) or given not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(accepted)}; got {given!r}")


MOST = 2**31 - 1  # of a size: what tensors and kernels count with


def whole(argument: str, given: Any, least: int = 1) -> int:
    """A whole number of at least `least`, and no more than fits 32 bits; ValueError otherwise."""
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None or not least <= number <= MOST:
        too_many = "" if number is None or number <= MOST else f" and at most {MOST}"
        raise ValueError(
            f"{argument} must be a whole number of at least {least}{too_many}, got {given!r}"
        )
    return number


def finite(argument: str, given: Any) -> float:
    """A finite number; ValueError otherwise."""
    try:
        number = math.nan if isinstance(given, (bool, str)) else float(given)
    except (TypeError, ValueError, OverflowError):
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


def shown(given: object) -> str:
    """A value in an error: a tensor by what it is, anything else as it is written."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {tuple(given.shape)} on {given.device}"
    if given is None or isinstance(given, (str, bytes, int, float, tuple, list, dict, set)):
        text = repr(given)
        return text if len(text) <= 80 else f"{text[:60]} … ({len(text)} characters)"
    return f"a {type(given).__name__}"


def floating(argument: str, given: Any) -> Tensor:
    """A tensor of floating-point numbers; ValueError otherwise."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise ValueError(f"{argument} must be a floating-point tensor, got {shown(given)}")
    return given


def segments(argument: str, given: Any, of: int | None = None) -> tuple[int, ...]:
    """Distinct indices of segments, each below `of` where it is known; ValueError otherwise."""
    least = "distinct segments" if of is None else f"distinct segments from 0 to {of - 1}"
    indices: list[int] = []
    if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)):
        try:
            indices = [whole(argument, index, least=0) for index in given]
        except ValueError:
            indices = []
    outside = of is not None and any(index >= of for index in indices)
    if not indices or len(set(indices)) < len(indices) or outside:
        raise ValueError(f"{argument} must be {least}, one at least, got {shown(given)}")
    return tuple(indices)


def autocasts(device: torch.device) -> bool:
    """Whether torch.autocast is on for this device; it does not know all of them."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
