"""A report of result files: tables and figures in Markdown, and a short version in the terminal."""

import math
import statistics
from collections import Counter
from pathlib import Path

from bench import figures, formula
from bench.cases import HOSTS, Case
from bench.figures import labels
from bench.results import TIMINGS, without_time
from bench.runs import FROZEN, FUSED, REFERENCE, YARDSTICKS, Measured, Run, Time, load
from bench.tables import Table, markdown, number, show

NOTHING = "–"
COLUMNS = 5  # providers side by side, which a page of 800 pixels holds
SHORT = 24  # rows in the terminal
ALWAYS = ("model", "host", "route")  # in the name of a layer or step
LONGEST = 300  # letters of an error; the result file has all of it
NOTE = """Times are medians of the processes' medians; ± is (most − least) / median over processes.
*wall*: eager calls with the host's time. *graph*: replay of a CUDA graph with a cold cache; its
backward is the difference of the other two. *kernels*: sum of the times of device kernels, copies
and sets of memory (up to commit bf837d1 without copies and sets). *Modelled* numbers come from
formulas (`bench/formula.py`) and the run's ceilings; all others are measured. The floor is the
least time that those allow for reading inputs, writing outputs and the products; "of floor" is
floor / time, so 100% is the most there is. Speed-up is the reference's time / the provider's; of
the providers, peft, frozen, full and copy compute something else than the operation: yardsticks.
*Cached features*: a step without its vision model, whose features of the images are given.
"error" and – (not measured) are explained under Errors. MB = 10⁶ bytes, GB = 10⁹."""


def main(files: list[Path], out: Path | None = None) -> int:
    """Writes report.md and its figures, and prints the short version.

    Args:
        files: result files, a section each.
        out: the folder; None: beside the first file, with its stem.

    Raises:
        ValueError: a file is no result file, there is none, or `out` cannot be written.
    """
    if not files:
        raise ValueError("files: none given; python -m bench run writes one")
    runs = [load(file) for file in files]
    folder = out or runs[0].path.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sections = []
        for i, run in enumerate(runs, start=1):
            prefix = f"{i}-" if len(runs) > 1 else ""
            sections += [*section(run), *_figures(run, folder, prefix)]
        report = folder / "report.md"
        report.write_text("\n\n".join(["# Measurements", NOTE, *sections]) + "\n")
    except OSError as error:
        raise ValueError(f"out {folder} cannot be written: {error.strerror}") from None
    for run in runs:
        print_short(run)
    print(f"next: read {report}")
    return 0


def section(run: Run) -> list[str]:
    """What a run measured, as parts of a Markdown page, without figures."""
    parts = [f"## {run.environment['device']}, commit {run.environment.get('commit')}"]
    parts += [markdown(header(run)), *filter(None, [unmeasured(run)])]
    for host in HOSTS:
        if cases := [case for case in run.cases("op") if case.host == host]:
            parts += [f"### Operation: {host}", *_operation(run, cases)]
    for kind, title in (("layer", "Layers"), ("step", "Training steps")):
        if cases := run.cases(kind):
            parts += [f"### {title}", f"All rows: {labels(cases, ALWAYS)[1]}."]
            for timing in run.timings(cases, "both") or ["wall"]:
                parts += _titled(f"{timing}, forward + backward", model_table(run, cases, timing))
    parts += ["### Cost of a route over `none`", *_routes(run)]
    parts += ["### Correctness gate", "Worst ratio to eager torch's own error; at most 2 passes."]
    parts += [markdown(gate_table(run)), "### Errors"]
    for table in (error_table(run), absence_table(run), missing_table(run)):
        parts += [markdown(table, text=4)] if len(table) > 1 else []
    return [*parts, "No process ended with an error."] if len(error_table(run)) == 1 else parts


def header(run: Run) -> Table:
    """Where and when, at which ceilings, in how many processes."""
    about = run.environment
    versions = {"python": about.get("python"), **about["versions"]}
    counts = sorted({m.processes for m in run.measured.values()})
    ceilings = "not measured"
    if run.ceilings:
        copy, matmul = run.ceilings["copy"] / 1e9, run.ceilings["matmul"] / 1e12
        ceilings = f"copy {number(copy)} GB/s, {run.dtype} matmul {number(matmul)} TFLOP/s"
    return [
        ["", ""],
        ["file", run.path.name],
        ["device", str(about["device"])],
        ["driver", str(about.get("driver") or NOTHING)],
        ["threads of the host", str(about.get("threads", NOTHING))],
        ["versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)],
        ["commit", str(about.get("commit"))],
        ["date", str(about.get("date"))],
        ["ceilings", ceilings],
        ["processes of a case", " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))],
    ]


def unmeasured(run: Run) -> str:
    """What this run says nothing about, in sentences."""
    all_of = run.measured.values()
    missing = [t for t in TIMINGS if not any(t == timing for m in all_of for timing, _ in m.times)]
    missing = [f"times by {timing}" for timing in missing]
    for key, name in (("peak", "peak memory"), ("saved", "saved bytes"), ("moved", "bytes moved")):
        missing += [] if any(key in m.bytes for m in all_of) else [name]
    missing += [] if any(m.launches for m in all_of) else ["launches"]
    said = f"Not measured: {', '.join(missing)}." if missing else ""
    said += run.left_out
    if run.environment.get("kind") == "cpu":
        ran = any(m.times for m in all_of if m.provider == FUSED)
        how = "ran in Triton's interpreter, whose times say nothing" if ran else "was not timed"
        said += f" On a CPU there are no GPU kernels to measure: {FUSED} {how}."
    if not run.ceilings:
        return said + " Without ceilings there is no floor."
    others = {case.dtype for case in run.cases("op")} - {run.dtype}
    said += f" No floor for {', '.join(sorted(others))}: no ceilings." if others else ""
    return said.strip()


def _operation(run: Run, cases: list[Case]) -> list[str]:
    """Tables of one host: both passes, memory, then each pass folded away."""
    parts = [f"All rows: {labels(cases)[1] or NOTHING}."]
    for which in ("both", "forward", "backward"):
        inner = []
        for providers in _chunks(run.providers(cases)):
            inner += _titled(f"µs, {_say(which)}", time_table(run, cases, which, providers))
        if REFERENCE in run.providers(cases):
            for providers in _chunks([p for p in run.providers(cases) if p != REFERENCE], 7):
                table = speedup_table(run, cases, which, providers)
                inner += _titled(f"Speed-up over reference, {_say(which)}", table)
        if which == "both":
            for providers in _chunks(run.providers(cases)):
                inner += _titled("Memory and launches", memory_table(run, cases, providers))
            parts += inner
        elif inner and run.timings(cases, which):
            parts += [f"<details><summary>{_say(which)}</summary>", *inner, "</details>"]
    return parts


def _say(which: str) -> str:
    return "forward + backward" if which == "both" else which


def _chunks(providers: list[str], most: int = COLUMNS) -> list[list[str]]:
    """In as few groups of at most `most` as there can be, none much smaller than another."""
    groups = -(-len(providers) // most)
    size = -(-len(providers) // max(1, groups))
    return [providers[i : i + size] for i in range(0, len(providers), max(1, size))]


def _titled(title: str, table: Table) -> list[str]:
    return [f"**{title}**", markdown(table)] if len(table) > 1 else []


def time_table(run: Run, cases: list[Case], which: str, providers: list[str]) -> Table:
    """µs ± spread: a row for each case and timing, a column for each provider, then the floor.

    The floor's columns stand where fused stands, or without it the reference.
    """
    subject = FUSED if FUSED in run.providers(cases) else REFERENCE
    floors = [run.floor(case, which) if subject in providers else None for case in cases]
    with_floor = any(floors)
    table = [["case", "timing", *providers]]
    table[0] += ["floor (modelled)", f"{subject}: of floor"] if with_floor else []
    for case, name, floor in zip(cases, labels(cases)[0], floors, strict=True):
        for timing in run.timings([case], which) or [NOTHING]:
            row = [name, timing, *(time_cell(run, case, p, timing, which) for p in providers)]
            if with_floor:
                time = run.time(case, subject, timing, which)
                row += [number(floor) if floor else NOTHING, _ratio(floor, time, percent=True)]
            table.append(row)
            name = ""
    return table


def time_cell(run: Run, case: Case, provider: str, timing: str, which: str, unit: float = 1) -> str:
    """Median and spread in `unit` µs; "error" where the provider has errors and no times."""
    time, found = run.time(case, provider, timing, which), run.at(case, provider)
    if time is None:
        return "error" if found and found.errors and not found.times else NOTHING
    return time.cell(unit)


def _ratio(over: float | None, time: Time | None, percent: bool = False) -> str:
    """over / time; – where one is missing or, as differences can be, not positive."""
    if over is None or time is None or over <= 0 or time.median <= 0:
        return NOTHING
    ratio = over / time.median
    if percent:
        return f"{100 * ratio:.{0 if ratio >= 0.095 else 1}f}%"
    return f"{ratio:.2f}×"


def speedup_table(run: Run, cases: list[Case], which: str, providers: list[str]) -> Table:
    """Time of the reference / time of each provider, of the same timing."""
    table = [["case", "timing", *providers]]
    for case, name in zip(cases, labels(cases)[0], strict=True):
        for timing in run.timings([case], which):
            row = [_against(run, case, p, timing, which) for p in providers]
            table.append([name, timing, *row])
            name = ""
    return table


def _against(run: Run, case: Case, provider: str, timing: str, which: str) -> str:
    reference = run.time(case, REFERENCE, timing, which)
    time = run.time(case, provider, timing, which)
    return _ratio(reference.median if reference else None, time)


def memory_table(run: Run, cases: list[Case], providers: list[str]) -> Table:
    """MB at the peak and saved, launches, kernels, GB moved: rows for what anyone measured."""
    table = [["case", "", *providers]]
    for case, name in zip(cases, labels(cases)[0], strict=True):
        found = [run.at(case, provider) for provider in providers]
        cells = [_memory(m) if m else {} for m in found]
        for what in dict.fromkeys(key for column in cells for key in column):
            table.append([name, what, *(column.get(what, NOTHING) for column in cells)])
            name = ""
    return table


def _memory(m: Measured) -> dict[str, str]:
    """Of one provider, by the names of the rows, in their order."""
    modelled = formula.moved(m.case, m.provider)
    values = {
        "peak MB": _scaled(m.bytes.get("peak"), 1e6),
        "saved MB": _scaled(m.bytes.get("saved"), 1e6),
        "launches, f + b": " + ".join(map(str, m.launches)) if m.launches else None,
        "device kernels": None if m.kernels is None else f"{m.kernels:g}",
        "GB moved": _scaled(m.bytes.get("moved"), 1e9),
        "GB moved (modelled)": _scaled((modelled or {}).get("both"), 1e9),
    }
    return {name: value for name, value in values.items() if value is not None}


def _scaled(value: float | None, unit: float) -> str | None:
    return None if value is None else number(value / unit)


def model_table(run: Run, cases: list[Case], timing: str) -> Table:
    """ms, tokens/s (rows of text / s) and memory of layers or steps, a row for each provider."""
    heads = ["case", "provider", "ms", "tokens/s", "speed-up over reference", "time / frozen"]
    table = [[*heads, "peak MB", "saved MB"]]
    for case, name in zip(cases, labels(cases, ALWAYS)[0], strict=True):
        frozen = run.time(case, FROZEN, timing, "both")
        for provider in run.providers([case]):
            found, time = run.at(case, provider), run.time(case, provider, timing, "both")
            sizes = found.bytes if found else {}
            over = f"{time.median / frozen.median:.2f}×" if time and frozen else NOTHING
            table.append([
                name, provider, time_cell(run, case, provider, timing, "both", unit=1000),
                number(1e6 * case.M / time.median) if time else NOTHING,
                _against(run, case, provider, timing, "both"), over,
                *(_scaled(sizes.get(key), 1e6) or NOTHING for key in ("peak", "saved")),
            ])  # fmt: skip
            name = ""
    return table


def _routes(run: Run) -> list[str]:
    table = route_table(run)
    if len(table) < 2:
        return ["No case was measured with `none` and another route."]
    said = "Time / time with `none`, same provider and sizes, forward + backward"
    return [f"{said}: median, and the range where there are several sizes.", markdown(table, 4)]


def route_table(run: Run) -> Table:
    """Median of ratios to `none` over sizes, by host, provider and timing; a column a route."""
    plain = {_sizes(m.case, m.provider): m for m in run.measured.values() if m.case.route == "none"}
    ratios: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for m in run.measured.values():
        base = plain.get(_sizes(m.case, m.provider))
        if base is None or m.case.route == "none" or m.provider in YARDSTICKS:
            continue
        for (timing, which), time in m.times.items():
            under = base.times.get((timing, which))
            if which == "both" and under and under.median > 0:
                key = (" ".join(filter(None, (m.case.model, m.case.host))), m.provider, timing)
                row = ratios.setdefault((m.case.kind, *key), {})
                row.setdefault(m.case.route, []).append(time.median / under.median)
    routes = list(dict.fromkeys(route for row in ratios.values() for route in row))
    table = [["", "host", "provider", "timing", *routes]]
    return table + [
        [*key, *(_range(row.get(route)) for route in routes)] for key, row in ratios.items()
    ]


def _sizes(case: Case, provider: str) -> tuple[str, ...]:
    """Everything but the route."""
    return (provider, *(str(v) for k, v in case.to_json().items() if k != "route"))


def _range(ratios: list[float] | None) -> str:
    if not ratios:
        return NOTHING
    middle = f"{statistics.median(ratios):.2f}×"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f}–{max(ratios):.2f})"


def gate_table(run: Run) -> Table:
    """The worst ratio of each provider, where, and how many cases had one."""
    table = [["provider", "worst in", "worst ratio", "cases gated"]]
    for provider in run.providers(run.cases("op", "layer", "step")):
        mine = [m for m in run.measured.values() if m.provider == provider]
        gates = {m.name: m.gate for m in mine if m.gate is not None}
        gates = {name: math.inf if math.isnan(gate) else gate for name, gate in gates.items()}
        name = max(gates, key=lambda name: gates[name], default=NOTHING)
        ratio = NOTHING
        if gates:
            ratio = f"{gates[name]:.2f}" + (" (over 2)" if gates[name] > 2 else "")
        table.append([provider, name, ratio, f"{len(gates)} of {len(mine)}"])
    return table


def error_table(run: Run) -> Table:
    """Every error, once for each case and provider, with the number of processes."""
    rows = [
        [m.name, m.provider, f"{count} of {m.processes}", _cut(error)]
        for m in run.measured.values()
        for error, count in m.errors.items()
    ]
    return [["case", "provider", "processes", "error"], *rows]


def absence_table(run: Run) -> Table:
    """Timings that were not taken though the others were, by their reason."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for m in run.measured.values():
        for timing, why in m.absent.items():
            found.setdefault((timing, why), []).append(m)
    table = [["timing not taken", "why", "providers", "in"]]
    for (timing, why), group in found.items():
        providers = ", ".join(dict.fromkeys(m.provider for m in group))
        names = dict.fromkeys(m.name for m in group)
        where = next(iter(names)) if len(names) == 1 else f"{len(names)} cases"
        table.append([timing, _cut(why), providers, where])
    return table


def missing_table(run: Run) -> Table:
    """What was asked for and not begun, because the time was up."""
    rows = [[name, ", ".join(who)] for name, who in run.missing.items()]
    return [["no time was left for", "providers"], *rows]


def _cut(error: str) -> str:
    return error if len(error) <= LONGEST else f"{error[:LONGEST]}…"


def _figures(run: Run, folder: Path, prefix: str) -> list[str]:
    try:
        captions = figures.draw(run, folder, prefix)
    except ImportError as error:
        return ["### Figures", f"None: the package {error.name} is missing."]
    images = [f"![{caption}]({file})" for file, caption in captions.items()]
    return ["### Figures", *images] if images else []


def print_short(run: Run) -> None:
    """The first providers and cases of a run, with its errors and what was not measured."""
    cases = run.cases("op", "layer", "step")
    print(f"\n{run.environment['device']}, {run.environment.get('commit')}, {run.path.name}")
    print(f"µs, forward + backward; all rows: {labels(cases[:SHORT])[1] or NOTHING}\n")
    show(short_table(run))
    if len(cases) > SHORT:
        print(f"{len(cases) - SHORT} more cases in the report")
    if more := run.providers(cases)[COLUMNS:]:
        print(f"also in the report: {', '.join(more)}")
    if said := unmeasured(run):
        print(said)
    print(*without_time(run.missing), sep="\n", end="\n" if run.missing else "")
    for timing, why, who, where in absence_table(run)[1:]:
        print(f"no {timing} time: {who}, {where}: {' '.join(why.split())}")
    errors = Counter((provider, error) for _, provider, _, error in error_table(run)[1:])
    for (provider, error), count in errors.items():
        print(f"error: {provider}, {count} cases: {' '.join(error.split())}")


def short_table(run: Run) -> Table:
    """Medians in µs of the timing that most providers have; fused over reference and floor."""
    cases = run.cases("op", "layer", "step")
    providers = run.providers(cases)[:COLUMNS]
    cases = cases[:SHORT]
    table = [["case", "timing", *providers, "speed-up", "of floor"]]
    for case, name in zip(cases, labels(cases)[0], strict=True):
        timing = figures.timing(run, [case]) or NOTHING
        cells = [time_cell(run, case, p, timing, "both").split(" ")[0] for p in providers]
        row = [name, timing, *cells]
        fused = run.time(case, FUSED, timing, "both")
        floor = _ratio(run.floor(case, "both"), fused, percent=True)
        table.append([*row, _against(run, case, FUSED, timing, "both"), floor])
    return table
