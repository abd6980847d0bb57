"""Two runs beside each other: what became slower or faster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.runs import Measured, Run, Time, load

LEAST = 0.03  # of a time: by so much the same code differs from one call to the next
# Results whose `kernels` are without copies and sets of memory: docs/benchmarks.md.
WITHOUT_COPIES = ("475a242", "bf837d1")


@dataclass(frozen=True)
class Change:
    """One timing and pass of one provider and case that both runs have."""

    provider: str
    name: str
    timing: str
    which: str
    a: Time
    b: Time
    noise: float

    @property
    def verdict(self) -> str:
        return verdict(self.a, self.b, self.noise)

    def __str__(self) -> str:
        percent = f"{self.b.median / self.a.median - 1:+.1%}, " if self.a.median > 0 else ""
        moved = f"{self.a.median:,.1f} → {self.b.median:,.1f} µs"
        rule = f"({percent}noise {self.noise:,.1f} µs)"
        return f"{self.provider}  {self.name}  {self.timing} {self.which}: {moved} {rule}"


def noise(a: Time, b: Time) -> float:
    """µs by which two medians may differ: the widest of four ranges.

    They are, of a and of b: from the least to the most of the processes' medians, and from the
    20 % to the 80 % point. Where one of them is of one process, or nothing spreads because one
    number was taken, it is at least `LEAST` of a: how far processes differ is not known.
    """
    widest = max(0.0, a.most - a.least, b.most - b.least, a.high - a.low, b.high - b.low)
    if min(a.processes, b.processes) < 2 or widest == 0.0:
        return max(widest, LEAST * abs(a.median))
    return widest


def verdict(a: Time, b: Time, within: float | None = None) -> str:
    """ "slower" where b's median is more than `noise` above a's, "faster" where below, or "same".

    More means more: a difference of exactly the noise is "same". "slower" is a regression.

    Args:
        within: the noise, where it is not that of these two.
    """
    difference = b.median - a.median
    if abs(difference) <= (noise(a, b) if within is None else within):
        return "same"
    return "slower" if difference > 0 else "faster"


def changes(a: Run, b: Run) -> list[Change]:
    """What both have, as measured in a; none is left out for being the same.

    But for `kernels` where they are not the same in both runs: `kernels_differ`.
    """
    both = [(m, b.measured[key]) for key, m in a.measured.items() if key in b.measured]
    left_out = "kernels" if kernels_differ(a, b) else None
    return [
        Change(m.provider, m.name, *key, time, other.times[key], _noise(m, other, key))
        for m, other in both
        for key, time in m.times.items()
        if key in other.times and key[0] != left_out
    ]


def _noise(a: Measured, b: Measured, key: tuple[str, str]) -> float:
    """`noise` of a timing and pass; a difference of two has that of both.

    The backward pass of a graph is one: its own points are one number, without a range.
    """
    own = noise(a.times[key], b.times[key])
    if key != ("graph", "backward"):
        return own
    parts = [("graph", which) for which in ("both", "forward")]
    return max(own, sum(noise(a.times[k], b.times[k]) for k in parts
                        if k in a.times and k in b.times))  # fmt: skip


def kernels_differ(a: Run, b: Run) -> bool:
    """Whether `kernels` is without copies and sets of memory in one of two runs alone."""
    commits = [str(run.environment.get("commit")) for run in (a, b)]
    first, second = ("+" not in c and c.startswith(WITHOUT_COPIES) for c in commits)
    return first != second


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
        lines.append("Some times are of one process: how far processes spread is not known, and "
                     f"less than {LEAST:.0%} counts as the same.")  # fmt: skip
    if kernels_differ(a, b):
        lines.append("kernels are left out: of one file they are without copies and sets of memory "
                     "(docs/benchmarks.md).")  # fmt: skip
    return lines


def _list(title: str, entries: list[Any]) -> None:
    if entries:
        print(f"\n{title}:")
        for entry in entries:
            print(f"  {entry}")
