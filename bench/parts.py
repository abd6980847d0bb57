"""What the processes of a run wrote: a file of lines for each, and the result file made of them.

A line is a record with "where" it was measured and in which "call": a failed one is tried again by
the next call. The files of lines are not under version control; what the result file alone has is
taken over from it, and a result file of another place is moved aside.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import results
from bench.checked import RECORD
from bench.results import Record, Results

Key = tuple[str, str]  # names of a case and of a provider


def part(out: Path, process: int) -> Path:
    """Where a process writes its records."""
    return out.with_name(f"{out.stem}.process{process}.jsonl")


def at(out: Path, process: int) -> Path:
    """Where a process writes what it is at, for who finds it dead."""
    return out.with_name(f"{out.stem}.process{process}.at.json")


def append(lines: Path, record: Record, where: str, call: str = "") -> None:
    """Adds a record to a process's file, on a line of its own after one that a kill cut off."""
    before = lines.read_text() if lines.exists() else ""
    with lines.open("a") as file:
        file.write("" if not before or before.endswith("\n") else "\n")
        file.write(json.dumps({**asdict(record), "where": where, "call": call}) + "\n")


def records_in(lines: Path, where: str) -> list[Record]:
    """Those of a process in this place, the last of each case and provider.

    An error replaces no record that has times.
    """
    return [record for record, _ in _tries(lines, where).values()]


def done(lines: Path, where: str, call: str) -> set[Key]:
    """What a process need not try again: what has no error, or its error from this very call."""
    tries = _tries(lines, where).items()
    return {key for key, (record, of) in tries if record.error is None or of == call}


def _tries(lines: Path, where: str) -> dict[Key, tuple[Record, str]]:
    """Records with their calls, by case and provider; a line that a kill cut off is none."""
    found: dict[Key, tuple[Record, str]] = {}
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            given = json.loads(line)
            call = given.pop("call", "")
            if given.pop("where") != where:
                continue
            RECORD("record", given)
            record = Record(**given)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        key = (record.name, record.provider)
        if record.error is None or key not in found or found[key][0].error is not None:
            found[key] = record, call
    return found


def take_over(out: Path, where: str) -> None:
    """Gives the processes' files what the result file alone has, so that it counts as done.

    A file of another place, or one that cannot be read, is moved aside.
    """
    known: dict[int, dict[Key, Record]] = {}
    for record in _before(out, where).records:
        lines, key = part(out, record.process), (record.name, record.provider)
        there = known.setdefault(
            record.process, {(r.name, r.provider): r for r in records_in(lines, where)}
        )
        if key not in there or (there[key].error is not None and record.error is None):
            append(lines, record, where)
            there[key] = record


def _before(out: Path, where: str) -> Results:
    """A result file of this place; an empty one where there is none, any other moved aside."""
    nothing = Results({}, {}, [])
    if not out.exists():
        return nothing
    try:
        found = results.read(out)
    except ValueError as error:
        results.set_aside(out, str(error))
        return nothing
    if results.place(found.environment) == where:
        return found
    if found.records:
        results.set_aside(out, f"{out} is of other code, versions or another device")
    return nothing


def merge(out: Path, about: dict[str, Any], asked: dict[str, list[str]]) -> None:
    """Writes the result file from what all processes wrote in this place.

    Args:
        about: "environment" and "ceilings"; without the latter, those of the file stay.
        asked: providers by the case's name: those that have no record yet are written as missing,
            beside what was missing before.
    """
    where = results.place(about["environment"])
    records = [record for lines in _parts(out) for record in records_in(lines, where)]
    before = _before(out, where)
    moved = {(r.name, r.provider): r.bytes["moved"] for r in before.records if "moved" in r.bytes}
    add_moved(out, records, moved)
    asked = {
        name: list(dict.fromkeys([*before.missing.get(name, ()), *asked.get(name, ())]))
        for name in {**before.missing, **asked}
    }
    whole = {(record.name, record.provider) for record in records}
    left = {name: [p for p in who if (name, p) not in whole] for name, who in asked.items()}
    missing = {name: who for name, who in left.items() if who}
    ceilings = about["ceilings"] or before.ceilings
    Results(about["environment"], ceilings, records, missing).write(out)


def _parts(out: Path) -> Iterator[Path]:
    yield from sorted(out.parent.glob(f"{out.stem}.process*.jsonl"))


def moved_file(out: Path) -> Path:
    """Where `python -m bench profile` writes the bytes that were moved."""
    return out.with_name(f"{out.stem}.moved.jsonl")


def add_moved(out: Path, records: list[Record], before: dict[Key, float] | None = None) -> None:
    """Adds what was profiled, now or `before`, to the records of the same case and provider."""
    lines = moved_file(out)
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    by_name = dict(before or {})
    by_name |= {(line["name"], line["provider"]): line["moved"] for line in found}
    for record in records:
        if (moved := by_name.get((record.name, record.provider))) is not None:
            record.bytes["moved"] = moved
