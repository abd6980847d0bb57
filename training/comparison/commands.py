"""What `fused-route compare` prints."""

import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fused_route.training.comparison.plan import (
    Comparison,
    read_comparison,
    recipes,
    told_settings,
)
from fused_route.training.comparison.report import REPORT, table, write_report
from fused_route.training.comparison.results import Arm, notes_of, unequal
from fused_route.training.comparison.runs import Runs, check, run, selection
from fused_route.training.comparison.work import TRAIN, budget
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.folder import alone_in
from fused_route.training.packages import missing
from fused_route.training.tables import print_table


def compare(
    file: str,
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    arms: Sequence[str] | None = None,
    dry: bool = False,
) -> int:
    """Runs what is left of a comparison and writes its report; 1 where a run failed."""
    if find_spec("matplotlib") is None:  # before hours of training, not after
        raise missing("matplotlib")
    comparison = read_comparison(file)
    told = recipes(comparison, overrides)
    given = told_settings(comparison, told, overrides)
    runs = Runs(comparison, told, given, out or Path("runs", f"compare-{Path(file).stem}"))
    chosen = selection(runs, arms)
    check(runs)
    again = _command(file, out, arms, overrides)
    if dry:
        _dry_run(runs, chosen)
        print(f"next: fused-route {again}")
        return 0
    with alone_in(runs.out):
        check(runs)  # another may have been at work until now
        failed = run(runs, chosen, lambda: write_report(runs))
        found = write_report(runs)
    _say(runs, found)
    print(f"report: {runs.out / REPORT}")
    best = max(
        (arm for arm in found if arm.score is not None),
        key=lambda arm: arm.score.mean if arm.score is not None else 0.0,
        default=None,
    )
    if failed or best is None:
        print(f"{failed} of the runs failed: see above, then run the same", file=sys.stderr)
        print(f"next: fused-route {again}")
        return 1
    print(f"next: fused-route {_asking(runs, best)}")
    return 0


def _say(runs: Runs, arms: Sequence[Arm]) -> None:
    """The table, without flags; flags and notes on standard error."""
    print_table([line[:-1] for line in table(runs, arms)])
    for arm in arms:
        for flag in arm.flags:
            print(f"flag: {arm.name}: {flag}", file=sys.stderr)
    for note in notes_of(runs):
        print(f"note: {note}", file=sys.stderr)


def _command(
    file: str, out: Path | None, arms: Sequence[str] | None, overrides: Sequence[str]
) -> str:
    told = ["compare", file, *([] if out is None else ["--out", str(out)])]
    return shlex.join([*told, *(x for arm in arms or () for x in ("--arm", arm)), *overrides])


def _asking(runs: Runs, best: Arm) -> str:
    """The command that asks the best arm something."""
    adapter = str(runs.folder(best.name, best.seeds[0]) / TRAIN)
    tasks = {LAYOUTS[task.layout].task for task in runs.recipes[best.name].tasks.values()}
    if tasks == {"caption"}:
        return shlex.join(["generate", "--adapter", adapter]) + " --image FILE"
    return shlex.join(["predict", "--adapter", adapter]) + ' --image FILE --question "…"'


def _dry_run(runs: Runs, arms: Sequence[str]) -> None:
    """Runs, budgets and flags; nothing is trained or encoded."""
    comparison = runs.comparison
    budgets: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys([comparison.baseline, *arms]):
        try:
            budgets[arm] = budget(runs.recipes[arm])
        except ValueError as error:
            print(f"flag: {arm}: would fail: {error}", file=sys.stderr)
    base = [budgets[comparison.baseline]] if comparison.baseline in budgets else []
    lines = [["arm", "runs", "done", "trainable", "length", "rows in a step"]]
    for arm in arms:
        found = budgets.get(arm)
        done = f"{len(runs.done(arm))}"
        lines.append([arm, str(len(comparison.seeds)), done, *_budget_cells(found)])
        for flag in unequal([found], base) if found is not None else ():
            print(f"flag: {arm}: {flag}", file=sys.stderr)
    print_table(lines)
    for note in notes_of(runs):
        print(f"note: {note}", file=sys.stderr)
    print(f"{_count(comparison, len(arms))} in {runs.out}")


def _budget_cells(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["–", "–", "–"]
    length = f"{found['steps']:,} steps" if "steps" in found else f"{found['epochs']:g} epochs"
    rows = ", ".join(f"{name} {size}" for name, size in found["batch"].items())
    return [f"{found['trainable']:,}", length, rows]


def _count(comparison: Comparison, arms: int) -> str:
    text = f"{arms * len(comparison.seeds)} runs"
    if comparison.rates:
        rates = ", ".join(f"{rate:g}" for rate in comparison.rates)
        text += (
            f", and before them {arms} × {len(comparison.rates)} for the learning rate ({rates})"
        )
    return text
