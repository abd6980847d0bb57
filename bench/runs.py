"""A result file with its processes taken together: what tables, figures and comparisons read."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import formula
from bench.cases import Case
from bench.results import TIMINGS, Record, read
from bench.tables import number

REFERENCE, FUSED, FROZEN = "reference", "fused", "frozen"
YARDSTICKS = ("peft", FROZEN, "full", "copy")  # they compute something else than the operation
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # torch's names: those of cases


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
    """A result file.

    Args:
        measured: by (name of a case, provider), in the order measured.
        missing: as in `Results`.
    """

    path: Path
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    measured: dict[tuple[str, str], Measured]
    missing: dict[str, list[str]] = field(default_factory=dict)

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
        """Who has a record of these cases: the reference, fused, then the others as measured."""
        found = dict.fromkeys(m.provider for m in self.of(cases))
        return sorted(found, key=lambda p: (p != REFERENCE, p != FUSED))

    @property
    def left_out(self) -> str:
        """A sentence on who was asked for and has no record of any case; or nothing."""
        there = {m.provider for m in self.measured.values()}
        missing = dict.fromkeys(p for who in self.missing.values() for p in who)
        names = [provider for provider in missing if provider not in there]
        said = f" Left out, without a record, {len(names)} providers: {', '.join(names)}."
        return said if names else ""

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
    except ValueError as error:
        raise ValueError(f"{path} is no result file of python -m bench: {error}") from None
    environment = {**results.environment, "versions": results.environment.get("versions") or {}}
    return Run(path, environment, results.ceilings, measured, results.missing)


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
