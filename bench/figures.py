"""Figures of a run: times side by side, and cost against one size. PNG, for light and dark pages.

Text and axes are a mid grey and the ground is transparent; a figure is 8 inches wide, 1600 pixels,
to be shown at 800.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.cases import HOSTS, Case
from bench.runs import FROZEN, FUSED, REFERENCE, Run
from bench.tables import number

GREY = "#808080"  # 3.9 : 1 on white, 4.8 : 1 on GitHub's dark ground
# Okabe and Ito's colours, blue and yellow moved to where both grounds show them; a family of
# providers has one colour and differs in marker and dashes.
BLUE, ORANGE, GREEN, ROSE, SKY, RED, OCHRE = (
    "#2B7BBA", "#D98C00", "#009E73", "#C9699E", "#3AA0DC", "#D55E00", "#9A7B00",
)  # fmt: skip
LOOKS: dict[str, tuple[str, str, str]] = {  # provider -> colour, marker, line
    REFERENCE: (BLUE, "o", "-"),
    FUSED: (RED, "D", "-"),
    "published": (SKY, "v", "-"),
    "compile": (GREEN, "s", "-"),
    "compile-folded": (GREEN, "P", "--"),
    "max-autotune": (GREEN, "X", ":"),
    "matmul-order": (ORANGE, "^", "-"),
    "peft": (ROSE, "<", "-"),
    FROZEN: (GREY, "h", "-"),
    "full": (OCHRE, ">", "-"),
    "copy": (GREY, "H", ":"),
}
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.parse_math": False,
}
WIDTH, DPI = 8, 200

# What a curve runs along: axis -> the field of `Case` that varies, and what the axis is called.
AXES = {
    "M": ("S", "M, rows of text"),
    "r": ("r", "r, rank"),
    "Nv": ("Nv", "Nv, visual tokens"),
    "d": ("d", "d, width"),
    "layers": ("layers", "layers"),
}
POINTS = 3  # of the shortest curve
FLOOR = "floor (modelled)"


def look(provider: str) -> tuple[str, str, str]:
    """Colour, marker and line style: the same in every figure of every run."""
    spare = ("*", "p", "d", "8", "1", "2")
    mark = spare[zlib.crc32(provider.encode()) % len(spare)]
    return LOOKS.get(provider, (OCHRE, mark, "-."))


def labels(cases: Sequence[Case], always: tuple[str, ...] = ("route",)) -> tuple[list[str], str]:
    """What each case is called beside the others, and what they share.

    Args:
        always: parts that are named even where all cases share them.
    """
    parts = [_parts(case) for case in cases]
    varied = [key for key in _parts(cases[0]) if len({part[key] for part in parts}) > 1]

    def called(keys: Sequence[str]) -> list[str]:
        return [" ".join(part[key] for key in part if key in keys and part[key]) for part in parts]

    named = [key for key in _parts(cases[0]) if key in always or key in varied]
    without_T = [key for key in named if key != "T"]
    if len(set(called(without_T))) == len(set(called(named))):  # T goes with M
        named = without_T
    shared = {key: part for key, part in parts[0].items() if key not in named + varied and part}
    return called(named), " ".join(shared.values())


def _parts(case: Case) -> dict[str, str]:
    parts = {"kind": case.kind, "model": case.model, "host": case.host, "route": case.route}
    parts |= {key: f"{key}{getattr(case, key)}" for key in ("d", "r", "M", "T", "Nv")}
    parts["layers"] = f"L{case.layers}" if case.layers else ""
    parts["features"] = f"{case.features} features" if case.features != "computed" else ""
    return {**parts, "dropout": f"p{case.dropout:g}", "dtype": case.dtype}


def draw(run: Run, folder: Path, prefix: str = "") -> dict[str, str]:
    """Writes every figure that the run has cases for.

    Args:
        folder: is there.
        prefix: of the files' names.

    Returns:
        Captions by the files' names.

    Raises:
        ImportError: matplotlib is missing.
    """
    captions = {}
    for kinds, name, what in (
        (("op",), "times", "operations"), (("layer", "step"), "models", "layers and steps"),
    ):  # fmt: skip
        if chosen := handful(run, kinds):
            file = f"{prefix}{name}.png"
            bars(run, chosen, folder / file)
            captions[file] = f"Time of {what}, forward + backward"
    for axis, groups in curves(run).items():
        file = f"{prefix}scaling-{axis}.png"
        drawn = one_each(groups)
        scaling(run, axis, drawn, folder / file)
        count = f" ({len(drawn)} of {len(groups)} curves)" if len(drawn) < len(groups) else ""
        captions[file] = f"Time against {AXES[axis][1]}{count}"
    return captions


def timing(run: Run, cases: Sequence[Case]) -> str | None:
    """The timing that most providers have of these cases: of a graph before the wall's."""
    names = ("graph", "wall", *run.timings(cases, "both"))
    counts = {name: sum((name, "both") in m.times for m in run.of(cases)) for name in names}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def handful(run: Run, kinds: tuple[str, ...]) -> list[Case]:
    """Six at most: of each host the smallest and the largest that is timed, with `mul` if it is."""
    chosen: list[Case] = []
    for host in HOSTS:
        cases = [c for c in run.cases(*kinds) if c.host == host and timing(run, [c])]
        plain = [c for c in cases if c.route == "mul" and not c.dropout] or cases
        plain.sort(key=lambda c: (c.kind == "step", c.M, c.d, c.r, c.layers))
        chosen += dict.fromkeys([*plain[:1], *plain[-1:]])
    return chosen


def curves(run: Run) -> dict[str, list[list[Case]]]:
    """By axis, the timed cases that differ along it alone, `POINTS` or more, sorted."""
    cases = [c for c in run.cases("op", "layer", "step") if timing(run, [c])]
    found: dict[str, list[list[Case]]] = {}
    for axis, (field, _) in AXES.items():
        groups: dict[tuple[Any, ...], list[Case]] = {}
        for case in cases:
            fixed = tuple(value for key, value in case.to_json().items() if key != field)
            groups.setdefault(fixed, []).append(case)
        long = [group for group in groups.values() if len(group) >= POINTS]
        if long:
            found[axis] = [sorted(group, key=lambda c: int(getattr(c, axis))) for group in long]
    return found


def one_each(groups: list[list[Case]]) -> list[list[Case]]:
    """A curve of each kind, model and host: the longest, with `mul` and without dropout if any."""
    chosen: dict[tuple[str, ...], list[Case]] = {}
    for group in sorted(groups, key=lambda g: (-len(g), g[0].route != "mul", g[0].dropout)):
        chosen.setdefault((group[0].kind, group[0].model, group[0].host), group)
    return list(chosen.values())[:6]


def bars(run: Run, cases: Sequence[Case], path: Path) -> None:
    """A panel a case, a bar a provider, and the floor as a line.

    A provider that has other times, but not the one that is drawn, is named with that in words.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("cases is empty: nothing to draw")
    rows = [[p for p in run.providers([c]) if _is_timed(run, c, p)] for c in cases]
    counts = [max(map(len, rows[i : i + 2])) for i in range(0, len(rows), 2)]
    with _panels(path, len(cases), [0.62 + 0.2 * n for n in counts]) as (figure, panels):
        for i, (axes, case, providers) in enumerate(zip(panels, cases, rows, strict=True)):
            _bars(axes, run, case, providers, counts[i // 2])
        legend = {n: h for axes in panels for h, n in zip(*_legend(axes), strict=True)}
        if legend:
            _below(figure, legend)


def _legend(axes: Any) -> Any:
    return axes.get_legend_handles_labels()


def _below(figure: Any, legend: dict[str, Any]) -> None:
    """The legend, the floor last, in as many columns as the figure's width holds."""
    legend |= {FLOOR: legend.pop(FLOOR)} if FLOOR in legend else {}
    columns = -(-len(legend) // -(-len(legend) // 6))
    style = {"frameon": False, "fontsize": 9, "handlelength": 2.3, "columnspacing": 1.2}
    place = "outside lower center"
    figure.legend(legend.values(), legend.keys(), loc=place, ncols=columns, **style)


def _is_timed(run: Run, case: Case, provider: str) -> bool:
    found = run.at(case, provider)
    return found is not None and bool(found.times)


def _bars(axes: Any, run: Run, case: Case, providers: list[str], count: int) -> None:
    """The bars of a case in a panel with room for `count`."""
    name = timing(run, [case]) or ""
    times = [run.time(case, provider, name, "both") for provider in providers]
    most = max(time.median for time in times if time)
    unit, scale = _unit(most)
    # values stand in a column of their own, where neither bars nor the floor cross them
    place = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right", "fontsize": 9}
    for y, (provider, time) in enumerate(zip(providers, times, strict=True)):
        axes.barh(y, time.median if time else 0, 0.68, color=look(provider)[0], linewidth=0)
        said = number(scale * time.median) if time else f"no {name} time"
        axes.annotate(said, (1, y), **place)
    if (floor := run.floor(case, "both")) is not None:
        axes.axvline(floor, color=GREY, linestyle="--", linewidth=1.4, label=FLOOR)
    axes.set(xlim=(0, 1.2 * max(most, floor or 0)), ylim=(count - 0.5, -0.5), xticks=())
    axes.set_yticks(range(len(providers)), providers)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{_title([case])}\n{unit}, {name}", fontsize=9)


def _title(cases: Sequence[Case]) -> str:
    """What the cases share, without what is so in most."""
    usual = {"op", "Nv1", "p0", "bf16"}
    return " ".join(part for part in labels(cases, ())[1].split() if part not in usual)


def _unit(most: float) -> tuple[str, float]:
    """Its name, and µs in it, for times up to so many µs."""
    return ("ms", 1e-3) if most >= 10_000 else ("µs", 1.0)


def scaling(run: Run, axis: str, groups: Sequence[Sequence[Case]], path: Path) -> None:
    """A panel a group: µs of forward + backward against the axis, both logarithmic.

    Args:
        axis: of `AXES`.
        groups: cases that differ along it alone, sorted.

    Raises:
        ValueError: no groups.
    """
    if not groups:
        raise ValueError("groups is empty: nothing to draw")
    rows = -(-len(groups) // 2)
    with _panels(path, len(groups), [3.0] * rows) as (figure, panels):
        legend: dict[str, Any] = {}
        for axes, group in zip(panels, groups, strict=True):
            _scaling(axes, run, axis, group)
            legend |= {name: handle for handle, name in zip(*_legend(axes), strict=True)}
        _below(figure, legend)


def _scaling(axes: Any, run: Run, axis: str, group: Sequence[Case]) -> None:
    name, xs = timing(run, group) or "", [getattr(case, axis) for case in group]
    lines = {p: [run.time(case, p, name, "both") for case in group] for p in run.providers(group)}
    unit, scale = _unit(max(time.median for times in lines.values() for time in times if time))
    for provider, times in lines.items():
        found = [(x, scale * t.median) for x, t in zip(xs, times, strict=True) if t]
        if points := [(x, y) for x, y in found if y > 0]:
            colour, marker, line = look(provider)
            style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.7}
            axes.plot(*zip(*points, strict=True), linestyle=line, label=provider, **style)
    floors = [(getattr(c, axis), scale * us) for c in group if (us := run.floor(c, "both"))]
    if floors:
        style = {"color": GREY, "linestyle": (0, (5, 2)), "linewidth": 1.5}
        axes.plot(*zip(*floors, strict=True), label=FLOOR, **style)
    axes.set(xscale="log", yscale="log", xlabel=AXES[axis][1], ylabel=f"{unit}, {name}")
    _ticks(axes, xs)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
    axes.set_title(_title(group), fontsize=9)


def _ticks(axes: Any, xs: list[int]) -> None:
    """Labels at the cases' own values, less those that would touch, and a few round times."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    steps = (1.0,) if high > 300 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    apart, kept = 0.14 * math.log(xs[-1] / xs[0]), xs[:1]
    for x in xs[1:]:
        kept += [x] if math.log(x / kept[-1]) >= apart else []
    axes.set_xticks(kept, [f"{x:,}" for x in kept], fontsize=8.5)
    for side in (axes.xaxis, axes.yaxis):
        side.set_minor_locator(NullLocator())


@contextmanager
def _panels(path: Path, count: int, heights: list[float]) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with so many panels, two abreast, in rows of these inches; written at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    columns, size = min(2, count), (WIDTH, sum(heights) + 0.5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
        panels = list(grid.flat)
        for axes in panels[count:]:
            axes.set_axis_off()
        yield figure, panels[:count]
        figure.savefig(path, format="png", dpi=DPI, transparent=True)
