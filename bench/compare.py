"""A run's processes taken together, and two runs beside each other: what became slower or faster.

`Run` is what `bench.report` and `bench.figures` read too.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import formula
from bench.cases import Case
from bench.results import TIMINGS, Record, read

REFERENCE, FUSED, FROZEN = "reference", "fused", "frozen"
YARDSTICKS = ("peft", FROZEN, "full")  # they compute something else than the operation
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # torch's names: those of cases
Table = list[list[str]]  # headings, then rows


def number(x: float) -> str:
    """Three digits, or whole from 100 on: 0.123, 12.3, 1,234."""
    return f"{x:,.0f}" if abs(x) >= 99.95 else f"{x:#.3g}".rstrip(".") if x else "0"


@dataclass(frozen=True)
class Time:
    """µs of one provider, timing and pass over processes.

    Args:
        median: of the processes' medians.
        least, most: of the processes' medians.
        low, high: medians of the processes' 20 % and 80 % points.
        processes: how many; the spread of one is not known.
    """

    median: float
    least: float
    most: float
    low: float
    high: float
    processes: int

    @property
    def spread(self) -> float | None:
        """(most − least) / median; None for one process."""
        if self.processes < 2 or self.median <= 0:
            return None
        return (self.most - self.least) / self.median

    def cell(self, unit: float = 1) -> str:
        """Median in `unit` µs and, of several processes, the spread: 12.3 ±0.4%."""
        if self.spread is None:
            return number(self.median / unit)
        digits = 1 if self.spread < 0.0995 else 0
        return f"{number(self.median / unit)} ±{100 * self.spread:.{digits}f}%"


@dataclass(frozen=True)
class Measured:
    """One provider of one case over processes.

    Args:
        name: of the case.
        times: by (timing, pass).
        bytes: medians; launches, kernels: as in `Record`, of the first process that has them.
        gate: the worst.
        errors: how many processes ended with it, by message.
        absent: why a timing was not taken, by its name.
    """

    name: str
    case: Case
    provider: str
    processes: int
    times: dict[tuple[str, str], Time]
    bytes: dict[str, float]
    launches: list[int] | None
    kernels: float | None
    gate: float | None
    errors: dict[str, int]
    absent: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A result file; `measured` is by (name of a case, provider), in the order measured."""

    path: Path
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    measured: dict[tuple[str, str], Measured]

    @property
    def dtype(self) -> str:
        """Of the ceilings, as cases name it."""
        name = str(self.ceilings.get("dtype"))
        return DTYPES.get(name, name)

    def cases(self, *kinds: str) -> list[Case]:
        """The cases of these kinds, each once."""
        return list(dict.fromkeys(m.case for m in self.measured.values() if m.case.kind in kinds))

    def at(self, case: Case, provider: str) -> Measured | None:
        return self.measured.get((case.name, provider))

    def time(self, case: Case, provider: str, timing: str, which: str) -> Time | None:
        found = self.at(case, provider)
        return found.times.get((timing, which)) if found else None

    @cached_property
    def _by_case(self) -> dict[str, list[Measured]]:
        found: dict[str, list[Measured]] = {}
        for m in self.measured.values():
            found.setdefault(m.name, []).append(m)
        return found

    def of(self, cases: Iterable[Case]) -> list[Measured]:
        """What was measured of these cases, case by case."""
        return [m for case in cases for m in self._by_case.get(case.name, ())]

    def providers(self, cases: Iterable[Case]) -> list[str]:
        """Who has records of these cases: the reference, fused, then the others as measured."""
        found = dict.fromkeys(m.provider for m in self.of(cases))
        return sorted(found, key=lambda p: (p != REFERENCE, p != FUSED))

    def timings(self, cases: Iterable[Case], which: str) -> list[str]:
        """The timings that any provider has of these cases and this pass, as in `TIMINGS`."""
        found = {timing for m in self.of(cases) for timing, of in m.times if of == which}
        return [*(t for t in TIMINGS if t in found), *sorted(found.difference(TIMINGS))]

    def floor(self, case: Case, which: str) -> float | None:
        """µs that the operation takes at the ceilings; None for layers, and without ceilings.

        Ceilings are of one dtype: cases of another have no floor.
        """
        if case.kind != "op" or self.dtype != case.dtype:
            return None
        copy, matmul = self.ceilings["copy"], self.ceilings["matmul"]
        return 1e6 * formula.floor_seconds(case, which, copy, matmul)


def load(path: Path) -> Run:
    """A result file with its processes taken together.

    Raises:
        ValueError: no result file, no record in it, or a record without sense.
    """
    results = read(path)
    if not results.records:
        raise ValueError(f"{path} has no records: nothing was measured")
    groups: dict[tuple[str, str], list[Record]] = {}
    try:
        for record in results.records:
            groups.setdefault((record.name, record.provider), []).append(record)
        measured = {key: _together(records) for key, records in groups.items()}
        environment, ceilings = dict(results.environment), dict(results.ceilings)
        environment["versions"] = dict(environment.get("versions") or {})
        if ceilings:
            ceilings |= {key: float(ceilings[key]) for key in ("copy", "matmul")}
        str(environment["device"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no result file of python -m bench: {error!r}") from None
    return Run(path, environment, ceilings, measured)


def _together(records: list[Record]) -> Measured:
    first = records[0]
    errors = Counter(r.error or "no times, and no error" for r in records if r.error or not r.times)
    gates = [r.gate for r in records if r.gate is not None]
    sizes = dict.fromkeys(key for r in records for key in r.bytes)
    return Measured(
        name=first.name,
        case=first.of_case(),
        provider=first.provider,
        processes=len(records),
        times=_times(records),
        bytes={k: statistics.median(r.bytes[k] for r in records if k in r.bytes) for k in sizes},
        launches=next((r.launches for r in records if r.launches is not None), None),
        kernels=next((r.kernels for r in records if r.kernels is not None), None),
        gate=max(gates, key=lambda gate: math.inf if math.isnan(gate) else gate, default=None),
        errors=dict(errors),
        absent={timing: why for r in records for timing, why in r.absent.items()},
    )


def _times(records: list[Record]) -> dict[tuple[str, str], Time]:
    points: dict[tuple[str, str], list[list[float]]] = {}
    for record in records:
        for timing, passes in record.times.items():
            for which, point in passes.items():
                real = len(point) == 3 and all(map(math.isfinite, point))
                if not real or (point[0] <= 0 and which != "backward"):  # a graph's is a difference
                    raise ValueError(f"{timing} {which} of {record.name} is {point}")
                points.setdefault((timing, which), []).append(point)
    times = {}
    for key, found in points.items():
        medians, lows, highs = zip(*found, strict=True)
        middle, low, high = (statistics.median(values) for values in (medians, lows, highs))
        times[key] = Time(middle, min(medians), max(medians), low, high, len(found))
    return times


@dataclass(frozen=True)
class Change:
    """One timing and pass of one provider and case that both runs have."""

    provider: str
    name: str
    timing: str
    which: str
    a: Time
    b: Time

    @property
    def verdict(self) -> str:
        return verdict(self.a, self.b)

    def __str__(self) -> str:
        percent = f"{self.b.median / self.a.median - 1:+.1%}, " if self.a.median > 0 else ""
        moved = f"{self.a.median:,.1f} → {self.b.median:,.1f} µs"
        rule = f"({percent}noise {noise(self.a, self.b):,.1f} µs)"
        return f"{self.provider}  {self.name}  {self.timing} {self.which}: {moved} {rule}"


def noise(a: Time, b: Time) -> float:
    """µs by which two medians may differ: the widest of four ranges.

    They are, of a and of b: from the least to the most of the processes' medians, and from the
    20 % to the 80 % point.
    """
    return max(0.0, a.most - a.least, b.most - b.least, a.high - a.low, b.high - b.low)


def verdict(a: Time, b: Time) -> str:
    """ "slower" where b's median is more than `noise` above a's, "faster" where below, or "same".

    More means more: a difference of exactly the noise is "same". "slower" is a regression.
    """
    difference = b.median - a.median
    if abs(difference) <= noise(a, b):
        return "same"
    return "slower" if difference > 0 else "faster"


def changes(a: Run, b: Run) -> list[Change]:
    """What both have, as measured in a; none is left out for being the same."""
    both = [(m, b.measured[key]) for key, m in a.measured.items() if key in b.measured]
    return [
        Change(m.provider, m.name, *key, time, other.times[key])
        for m, other in both
        for key, time in m.times.items()
        if key in other.times
    ]


def one_sided(a: Run, b: Run) -> list[str]:
    """What a has times of and b has not: by case, who; and timings, where b has others."""
    whole: dict[str, list[str]] = {}
    lines = []
    for key, m in a.measured.items():
        other = b.measured.get(key)
        if other is None:
            whole.setdefault(m.name, []).append(m.provider)
        elif missing := [" ".join(k) for k in m.times if k not in other.times]:
            reasons = "; ".join([*other.errors, *other.absent.values()])
            why = f" ({reasons})" if reasons else ""
            lines.append(f"{m.name}: {', '.join(missing)} of {m.provider}{why}")
    return [*(f"{name}: {', '.join(who)}" for name, who in whole.items()), *lines]


def broken(a: Run, b: Run) -> list[str]:
    """What a has times of and of which b has errors alone."""
    pairs = [(m, b.measured[key]) for key, m in a.measured.items() if key in b.measured]
    return [
        f"{m.provider}  {m.name}: {'; '.join(other.errors)}"
        for m, other in pairs
        if m.times and not other.times
    ]


def main(a: Path, b: Path, force: bool = False) -> int:
    """Prints what is slower and faster in b than in a, and what only one of them has.

    Returns:
        1 where something is slower, or failed that had times; 0 otherwise.

    Raises:
        ValueError: a file is no result file, they have nothing in common, or devices differ and
            `force` is not given.
    """
    before, after = load(a), load(b)
    devices = before.environment["device"], after.environment["device"]
    if devices[0] != devices[1] and not force:
        raise ValueError(
            f"{a} was measured on {devices[0]}, {b} on {devices[1]}: times of different devices "
            "say nothing about code (--force compares them all the same)"
        )
    found = changes(before, after)
    failed = broken(before, after)
    if not found and not failed:
        raise ValueError(f"{a} and {b} have times of no provider and case in common")
    by = {word: [c for c in found if c.verdict == word] for word in ("slower", "faster", "same")}
    print("\n".join(_settings(before, after)))
    _list("failed", failed)
    _list("slower", sorted(by["slower"], key=lambda c: c.a.median - c.b.median))
    _list("faster", sorted(by["faster"], key=lambda c: c.b.median - c.a.median))
    _list(f"only in {a}", one_sided(before, after))
    _list(f"only in {b}", one_sided(after, before))
    counts = ", ".join(f"{len(changed)} {word}" for word, changed in by.items())
    print(f"\nOf {len(found)} times in both: {counts}; {len(failed)} failed.")
    print(f"next: {_advice(by['slower'], failed, b)}")
    return int(bool(by["slower"] or failed))


def _advice(slower: list[Change], failed: list[str], b: Path) -> str:
    if failed:
        return f"find out what failed: its errors are in {b}"
    if slower:
        return "measure both again on a machine at rest; what stays slower is a regression"
    return f"python -m bench report {b}"


def _settings(a: Run, b: Run) -> list[str]:
    """Both runs in a line each, and what of their environments differs."""
    lines = [
        f"{name}: {run.path} ({run.environment['device']}, commit "
        f"{run.environment.get('commit')}, {run.environment.get('date')})"
        for name, run in (("a", a), ("b", b))
    ]
    for key in ("driver", "threads", "python", "versions"):
        was, now = a.environment.get(key), b.environment.get(key)
        if was != now:
            lines.append(f"{key}: {was} → {now}")
    measured = [*a.measured.values(), *b.measured.values()]
    if any(time.processes < 2 for m in measured for time in m.times.values()):
        lines.append("Some times are of one process: how far processes spread is not in the noise.")
    return lines


def _list(title: str, entries: list[Any]) -> None:
    if entries:
        print(f"\n{title}:")
        for entry in entries:
            print(f"  {entry}")


def markdown(table: Table, text: int = 2) -> str:
    """A table as Markdown: the first columns, `text` of them, to the left, numbers to the right."""
    cells = [[_escaped(cell) for cell in row] for row in table]
    rule = [":--" if i < text else "--:" for i in range(len(cells[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")


def show(table: Table) -> None:
    """Prints a table (headings, then rows): by rich, or without it as plain columns."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120, color_system=None)
    drawn = Drawn(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(table[0]):
        drawn.add_column(heading, justify="right" if i > 1 else "left", overflow="fold")
    for row in table[1:]:
        drawn.add_row(*row)
    console.print(drawn, markup=False)
