"""What a result file has to look like: the first value that does not fit is named by its key."""

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bench.cases import FEATURES, HOSTS, KINDS, ROUTES
from bench.operands import DTYPES
from fused_route.checks import one_of, probability, shown, whole

Check = Callable[[str, Any], object]  # of a key and its value; ValueError where it does not fit
# Other commands that write files beside these, by a key of theirs.
OTHERS = {"rows": "generate, or memory, which print", "runs": "scale, which prints"}


def text(key: str, given: Any) -> None:
    if not isinstance(given, str):
        raise ValueError(f"{key} must be text, got {shown(given)}")


def number(key: str, given: Any) -> None:
    """Not a number among them: who reads times says which may be."""
    is_one = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_one or (isinstance(given, int) and abs(given) > 1e300):
        raise ValueError(f"{key} must be a number, got {shown(given)}")


def positive(key: str, given: Any) -> None:
    number(key, given)
    if not 0 < given < math.inf:
        raise ValueError(f"{key} must be a positive number, got {given}")


def at_least(least: int) -> Check:
    return lambda key, given: whole(key, given, least)


def of(accepted: Collection[str]) -> Check:
    return lambda key, given: one_of(key, given, accepted)


def or_null(check: Check) -> Check:
    return lambda key, given: None if given is None else check(key, given)


def each(check: Check, length: int | None = None) -> Check:
    """A list of these, of that length if one is given."""

    def checks(key: str, given: Any) -> None:
        if not isinstance(given, list) or length not in (None, len(given)):
            said = "a list" if length is None else f"a list of {length}"
            raise ValueError(f"{key} must be {said}, got {shown(given)}")
        for i, value in enumerate(given):
            check(f"{key}[{i}]", value)

    return checks


def table(check: Check) -> Check:
    """An object whose values are these, whatever its keys."""

    def checks(key: str, given: Any) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{key} must be an object, got {shown(given)}")
        for name, value in given.items():
            check(f"{key}.{name}", value)

    return checks


def fields(needed: dict[str, Check], more: dict[str, Check], is_closed: bool = True) -> Check:
    """An object with these keys, and no others where it is closed."""
    known = {**needed, **more}

    def checks(key: str, given: Any) -> None:
        table(lambda *_: None)(key, given)
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{key} has no {missing[0]!r}")
        if is_closed and (others := [name for name in given if name not in known]):
            raise ValueError(f"{key} has {others[0]!r}, which is none of {', '.join(known)}")
        for name in filter(given.__contains__, known):
            known[name](f"{key}.{name}", given[name])

    return checks


CASE = fields(
    {
        "kind": of(KINDS), "host": of(HOSTS), "route": of(ROUTES),
        **{name: at_least(1) for name in ("d", "r", "S", "T")},
    },
    {
        "Nv": at_least(1), "dropout": probability, "dtype": of(DTYPES), "model": text,
        "layers": at_least(0), "features": of(FEATURES),
    },
)  # fmt: skip
RECORD = fields(
    {"name": text, "case": CASE, "provider": text},
    {
        "process": at_least(0), "gate": or_null(number),
        "times": table(table(each(number, 3))), "bytes": table(number),
        "launches": or_null(each(at_least(0))), "kernels": or_null(number),
        "absent": table(text), "error": or_null(text),
    },
)  # fmt: skip
ENVIRONMENT = fields(
    {"device": text},
    {"commit": or_null(text), "versions": or_null(table(or_null(text)))},
    is_closed=False,
)
CEILINGS = fields({"copy": positive, "matmul": positive}, {"dtype": text}, is_closed=False)
FILE = {
    "environment": ENVIRONMENT,
    "ceilings": lambda key, given: given == {} or CEILINGS(key, given),
    "records": each(RECORD),
    "missing": table(each(text)),
}


def result_file(path: Path) -> dict[str, Any]:
    """The JSON of a result file, each value of the type that its readers ask for.

    Raises:
        ValueError: it cannot be read, or a value does not fit, which is named.
    """
    said = f"{path} is no result file of python -m bench"
    try:
        found = json.loads(path.read_text())
    except RecursionError:
        raise ValueError(f"{said}: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{said}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{said}: it is a {type(found).__name__}, not an object")
    for key, who in OTHERS.items():
        if key in found:
            raise ValueError(f"{said} run: it has {key} of python -m bench {who} their tables")
    for key, check in FILE.items():
        if key != "missing" and key not in found:
            raise ValueError(f"{said}: it has no {key!r}")
        try:
            check(key, found.get(key, {}))
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from None
    return found
