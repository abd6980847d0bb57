"""Bad inputs as a table: what is called, which argument is bad, what the refusal must say."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_route import RoutingInput

KINDS = {
    "type": "another type",
    "none": "None where a value is needed",
    "bool": "True or False where a number is asked for, or a number for them",
    "text": "text where a number or a tensor is asked for",
    "shape": "tensors of another shape, width, batch or count",
    "dtype": "tensors of another dtype",
    "device": "tensors on another device",
    "not finite": "NaN or infinity as a setting",
    "range": "numbers out of range",
    "huge": "numbers that nothing holds",
    "name": "unknown names, patterns and files",
    "empty": "empty values",
    "conflict": "values that exclude each other",
}


@dataclass(frozen=True)
class Later:
    """A value that needs a folder of its own."""

    make: Callable[[Path], Any]
    label: str


@dataclass(frozen=True)
class Bad:
    """A value that an argument does not take.

    Attributes:
        kind: a key of `KINDS`.
        accepted: part of the message that says what is accepted.
        given: part of it that shows what was given; None: any usual way to show the value.
        named: how the message calls the argument, where not by its name.
        also: other arguments of the call that differ from the valid ones.
    """

    kind: str
    value: Any
    accepted: str
    given: str | None = None
    named: str | None = None
    also: dict[str, Any] = field(default_factory=dict)


def bad(
    kind: str,
    value: Any,
    accepted: str,
    given: str | None = None,
    named: str | None = None,
    **also: Any,
) -> Bad:
    return Bad(kind, value, accepted, given, named, also)


@dataclass(frozen=True)
class Subject:
    """Something that can be called.

    Attributes:
        name: as the documentation calls it.
        make: from an empty folder to what is called and arguments that it takes; anew for each row.
        rows: bad values by argument.
    """

    name: str
    make: Callable[[Path], tuple[Callable[..., Any], dict[str, Any]]]
    rows: dict[str, list[Bad]]


def label(value: Any) -> str:
    """A value, short, for the names of tests."""
    if isinstance(value, Later):
        return value.label
    if isinstance(value, Tensor):
        kind = f"{value.dtype}{list(value.shape)}".removeprefix("torch.")
        return kind if value.device.type == "cpu" else f"{kind} on {value.device}"
    if isinstance(value, RoutingInput):
        given = {name: getattr(value, name) for name in ("mask", "sample_index", "x_v", "operand")}
        return f"RoutingInput with {', '.join(k for k, v in given.items() if v is not None)}"
    if hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    shown = repr(value) if type(value).__repr__ is not object.__repr__ else type(value).__name__
    shown = type(value).__name__ if "\n" in shown or " at 0x" in shown else shown
    shown = shown.replace("\\", "")  # which pytest would double
    return shown if len(shown) < 60 else f"{shown[:40]}..."


def ways_to_show(value: Any) -> list[str]:
    """Texts of which a message about this value has one."""
    if isinstance(value, Tensor):
        shown = str(value).partition("(")[0]
        return [str(tuple(value.shape)), str(value.dtype), str(value.device), f"{shown}(", "Tensor"]
    ways = [type(value).__name__, *(["missing"] if value is None else [])]
    if isinstance(value, str):
        return [*ways, repr(value), value] if value else [*ways, repr(value), "empty"]
    return [*ways, repr(value), str(value)]


def no_tensors(accepted: str = "tensor", *, optional: bool = False) -> list[Bad]:
    """What is no tensor at all; `optional` where None is accepted."""
    rows = [bad("type", [1.0], accepted), bad("text", "image", accepted)]
    rows += [bad("type", 1.0, accepted), bad("bool", True, accepted)]
    return rows if optional else [bad("none", None, accepted), *rows]


def no_whole_numbers(
    accepted: str = "whole number of at least 1", *, least: int = 1, optional: bool = False
) -> list[Bad]:
    rows = [bad("range", least - 1, accepted), bad("range", -7, accepted)]
    rows += [bad("bool", True, accepted), bad("text", "2", accepted), bad("type", 2.5, accepted)]
    rows += [bad("type", [2], accepted), bad("type", torch.ones(2), accepted)]
    rows += [bad("not finite", math.nan, accepted), bad("not finite", math.inf, accepted)]
    rows += [bad("huge", 10**30, "whole number"), bad("type", 2.0, accepted)]
    return rows if optional else [bad("none", None, accepted), *rows]


def no_numbers(accepted: str = "finite number", *, optional: bool = False) -> list[Bad]:
    rows = [bad("not finite", value, accepted) for value in (math.nan, math.inf, -math.inf)]
    rows += [bad("bool", True, accepted), bad("text", "2", accepted), bad("type", 1j, accepted)]
    rows += [bad("type", [1.0], accepted), bad("type", torch.ones(2), accepted)]
    rows += [
        bad("bool", False, accepted),
        bad("huge", 10**400, accepted, given="1000000"),
        bad("type", {}, accepted),
    ]
    return rows if optional else [bad("none", None, accepted), *rows]


def no_probabilities(accepted: str = "[0, 1)") -> list[Bad]:
    numbers = [bad("range", value, accepted) for value in (1.0, -0.1, 2, 1e300)]
    return numbers + [
        Bad(row.kind, row.value, "", row.given) for row in no_numbers("finite number")
    ]


def no_truths() -> list[Bad]:
    accepted = "True or False"
    rows = [bad("none", None, accepted), bad("text", "no", accepted), bad("text", "", accepted)]
    rows += [bad("bool", 1, accepted), bad("bool", 0, accepted), bad("type", [], accepted)]
    return [*rows, bad("type", torch.ones(1), accepted)]


def no_names(accepted: str, *, optional: bool = False) -> list[Bad]:
    """What is not one of the names that the message must list, among them `accepted`."""
    rows = [bad("name", "grum", accepted), bad("name", accepted.upper(), accepted)]
    rows += [bad("name", f"{accepted} ", accepted), bad("empty", "", accepted)]
    rows += [bad("type", 3, accepted), bad("type", [accepted], accepted)]
    rows += [bad("type", accepted.encode(), accepted), bad("bool", True, accepted)]
    return rows if optional else [bad("none", None, accepted), *rows]


def identified(subjects: list[Subject]) -> dict[str, tuple[Subject, str, Bad]]:
    """Every row by a name of its own."""
    rows: dict[str, tuple[Subject, str, Bad]] = {}
    for subject in subjects:
        for argument, bads in subject.rows.items():
            for row in bads:
                given = {argument: row.value, **row.also}
                shown = ", ".join(f"{name}={label(value)}" for name, value in given.items())
                name = f"{subject.name}({shown})"
                again = sum(other.partition(" #")[0] == name for other in rows)
                rows[f"{name} #{again + 1}" if again else name] = subject, argument, row
    return rows
