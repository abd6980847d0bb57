"""Figures that comparisons of arms share: their style, learning curves, differences.

Scores come as fractions and are drawn times 100. Arms are told apart by colour and marker for the
route, and by dashes or hatching for the visual prefix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fused_route.training.files import atomic_file
from fused_route.training.packages import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX = " + prefix"  # ends the name of an arm whose text model also reads the image as a token

# Okabe and Ito's colours, which stay apart under all common colour-vision deficiencies
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D00")
MARKERS = "osD^vPX"
INK, QUIET = "#222222", "#6B6B6B"
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib and has ✓ and ✗
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.parse_math": False,
    "hatch.linewidth": 0.8,
}


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: Path,
    *,
    baselines: Mapping[str, float],
    bands: Mapping[str, Sequence[float]] | None = None,
    value: str = "test accuracy",
    unit: str = " %",
    title: str = "Accuracy on sampled test questions during training",
) -> None:
    """Writes scores against training step as a PNG.

    Args:
        curves: (step, accuracy) by arm.
        path: the PNG file; its folder is made.
        baselines: accuracies that need no training, drawn as labelled horizontal lines.
        bands: half-width of the shaded band at each point of a curve, by arm; arms may be absent.
        value, unit: what the scores are, times 100.
        title: of the figure.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: nothing to draw")
    look_of = looks(curves)
    with canvas(path, 9, 6) as figure:
        axes = figure.add_subplot()
        for name, points in curves.items():
            if not points:
                continue
            _curve(axes, name, points, (bands or {}).get(name), look_of[name], unit)
        _baseline_lines(axes, baselines)
        axes.set(xlabel="training step", ylabel=value, title=title)
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0f}{unit}")
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        heading = f"arm ({value.split()[-1]} after the last step)"
        place = {"loc": "outside lower center", "frameon": False}
        figure.legend(title=heading, handlelength=3.2, ncols=3, **place)


def _curve(
    axes: Any,
    name: str,
    points: Sequence[tuple[int, float]],
    band: Sequence[float] | None,
    look: tuple[str, str, bool],
    unit: str,
) -> None:
    colour, marker, prefix = look
    steps, values = [s for s, _ in points], [100 * a for _, a in points]
    axes.plot(
        steps, values, color=colour, marker=marker, markersize=4.5, linewidth=1.8,
        linestyle=(0, (4, 1.6)) if prefix else "-",
        markerfacecolor="white" if prefix else colour,
        label=f"{name}  ({values[-1]:.1f}{unit})",
    )  # fmt: skip
    if band is not None:
        low = [v - 100 * h for v, h in zip(values, band, strict=True)]
        high = [v + 100 * h for v, h in zip(values, band, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _baseline_lines(axes: Any, baselines: Mapping[str, float]) -> None:
    """Horizontal lines, each labelled beside the axes; close labels are moved apart."""
    ordered = sorted(baselines.items(), key=lambda item: item[1])
    for _, value in ordered:
        axes.axhline(100 * value, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(100.5, high))
    bottom = float("-inf")
    for name, value in ordered:
        bottom = max(100 * value, bottom + 0.075 * (high - low))
        text = f"{name}\n{100 * value:.1f} %"
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "color": QUIET}
        axes.annotate(text, (1.01, bottom), fontsize=8.5, annotation_clip=False, **place)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str, bool]]:
    """(colour, marker, has a prefix) by arm; an arm and its prefix variant share the first two."""
    found: dict[str, tuple[str, str, bool]] = {}
    routes: dict[str, tuple[str, str]] = {"none": (QUIET, "o")}
    for name in names:
        route = name.removesuffix(PREFIX)
        i = len(routes) - 1
        routes.setdefault(
            route, (COLOURS[i % len(COLOURS)], MARKERS[(i + 1 + i // len(COLOURS)) % len(MARKERS)])
        )
        found[name] = (*routes[route], name.endswith(PREFIX))
    return found


def percent(value: float, _: float = 0) -> str:
    return f"{value:.0f} %"


@contextmanager
def canvas(
    path: Path, width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Iterator["Figure"]:
    """A figure of this size in inches; written to `path` when the block ends."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        with atomic_file(Path(path)) as file:  # Figure.savefig draws with Agg, without a display
            figure.savefig(file, format="png", dpi=150)
