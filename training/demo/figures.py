"""Figures of a comparison: learning curves, accuracy by question type, and answered images.

Accuracies come as fractions in [0, 1] and are drawn in percent. Arms are told apart by colour and
marker for the route, and by dashes or hatching for the visual prefix.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fused_route.training.data.images import load_image
from fused_route.training.files import atomic_file
from fused_route.training.packages import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fused_route.training.demo.report import Row

PREFIX = " + prefix"  # ends the name of an arm whose text model also reads the image as a token

# Okabe and Ito's colours, which stay apart under all common colour-vision deficiencies
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D00")
MARKERS = "osD^vPX"
SIDE, LINE = 1.5, 0.19  # of an image and of a line of answers, in inches
INK, QUIET, RIGHT, WRONG = "#222222", "#6B6B6B", "#0072B2", "#C2410C"
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


@dataclass(frozen=True)
class Example:
    """A test question with its image, its true answer and each arm's answer (by arm name)."""

    image: Path
    question: str
    truth: str
    answers: Mapping[str, str]


def learning_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: Path,
    *,
    baselines: Mapping[str, float],
    bands: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes test accuracy against training step as a PNG.

    Args:
        curves: (step, accuracy) by arm.
        path: the PNG file; its folder is made.
        baselines: accuracies that need no training, drawn as labelled horizontal lines.
        bands: half-width of the shaded band at each point of a curve, by arm; arms may be absent.
    """
    if not any(curves.values()):
        raise ValueError("curves is empty: nothing to draw")
    looks = _looks(curves)
    with _figure(path, 9, 6) as figure:
        axes = figure.add_subplot()
        for name, points in curves.items():
            if not points:
                continue
            _curve(axes, name, points, (bands or {}).get(name), looks[name])
        _baseline_lines(axes, baselines)
        axes.set(
            xlabel="training step",
            ylabel="test accuracy",
            title="Accuracy on sampled test questions during training",
        )
        axes.yaxis.set_major_formatter(_percent)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        legend = {"title": "arm (accuracy after the last step)", "handlelength": 3.2, "ncols": 3}
        figure.legend(loc="outside lower center", frameon=False, **legend)


def _curve(
    axes: Any,
    name: str,
    points: Sequence[tuple[int, float]],
    band: Sequence[float] | None,
    look: tuple[str, str, bool],
) -> None:
    colour, marker, prefix = look
    steps, values = [s for s, _ in points], [100 * a for _, a in points]
    axes.plot(
        steps, values, color=colour, marker=marker, markersize=4.5, linewidth=1.8,
        linestyle=(0, (4, 1.6)) if prefix else "-",
        markerfacecolor="white" if prefix else colour,
        label=f"{name}  ({values[-1]:.1f} %)",
    )  # fmt: skip
    if band is not None:
        low = [v - 100 * h for v, h in zip(values, band, strict=True)]
        high = [v + 100 * h for v, h in zip(values, band, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def accuracy_bars(
    rows: "Sequence[Row]", path: Path, baselines: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes the accuracy of each arm by question type as a PNG: a panel a type, a bar an arm.

    Args:
        rows: arms, top to bottom; with more than one seed the bars carry ± 1 sample sd.
        path: the PNG file; its folder is made.
        baselines: by name, accuracy by question type; a line across each panel.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to draw")
    looks = _looks(row.name for row in rows)
    keys = list(rows[0].mean)
    with _figure(path, 2.4 + 2.6 * len(keys), 1.7 + 0.38 * len(rows)) as figure:
        panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
        for axes, key in zip(panels, keys, strict=True):
            for y, row in enumerate(rows):
                _bar(axes, y, row, key, looks[row.name])
            for style, (name, by_type) in zip(_line_styles(), baselines.items(), strict=False):
                axes.axvline(100 * by_type[key], label=name, **style)
            axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xticks=(0, 25, 50, 75, 100))
            axes.set_title("all questions" if key == "all" else key)
            axes.xaxis.set_major_formatter(_percent)
            axes.tick_params(axis="x", labelsize=8.5)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_yticks(range(len(rows)), [row.name for row in rows])
        spread = ", ± 1 sample sd over seeds" if any(row.sd for row in rows) else ""
        figure.suptitle(f"Test accuracy by question type{spread}", x=0.01, ha="left", fontsize=13)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def answer_grid(examples: Sequence[Example], path: Path, *, columns: int = 3) -> None:
    """Writes a grid of test images as a PNG, each with its question, the truth and all answers.

    Right answers carry ✓, wrong ones ✗ and bold type.

    Raises:
        ValueError: no examples, or an image cannot be read.
    """
    if not examples:
        raise ValueError("examples is empty: nothing to draw")
    columns = min(columns, len(examples))
    arms = [_short(arm) for example in examples for arm in ("truth", *example.answers)]
    answers = [_short(a) for e in examples for a in (e.truth, *e.answers.values())]
    # inches, from the widest text: 0.08 a letter at 9.5 points, 0.095 at 10 points and bold
    answer_x = 0.15 + SIDE + 0.15 + 0.08 * max(map(len, arms))
    cell_width = max(4.4, answer_x + 0.25 + 0.085 * max(map(len, answers)) + 0.25)
    questions = [_wrapped(e.question, int((cell_width - 0.3) / 0.095)) for e in examples]
    image_y = 0.08 + 0.21 * max(map(len, questions))
    lines = 1 + max(len(example.answers) for example in examples)
    cell_height = image_y + max(SIDE, LINE * lines) + 0.3
    rows = -(-len(examples) // columns)
    width, height = columns * cell_width, rows * cell_height + 0.5
    with _figure(path, width, height, layout=None) as figure:
        title = "Test questions and what each arm answers"
        figure.text(0.15 / width, 1 - 0.15 / height, title, fontsize=14, va="top")
        for i, (example, question) in enumerate(zip(examples, questions, strict=True)):
            left = i % columns * cell_width
            top = height - 0.55 - i // columns * cell_height
            _question(figure, left + 0.15, top, question)
            _answers(figure, example, left, top - image_y, left + answer_x)


def _question(figure: "Figure", left: float, top: float, lines: Sequence[str]) -> None:
    style = {"fontsize": 10, "fontweight": "bold", "linespacing": 1.25}
    _write(figure, left, top, "\n".join(lines), **style)


def _answers(figure: "Figure", example: Example, left: float, top: float, answer_x: float) -> None:
    """Image and list of answers of an example, below `top`; all lengths in inches."""
    width, height = figure.get_size_inches()
    box = ((left + 0.15) / width, (top - SIDE) / height, SIDE / width, SIDE / height)
    axes = figure.add_axes(box)
    axes.imshow(load_image(example.image), interpolation="nearest")
    axes.set(xticks=(), yticks=())
    axes.spines[:].set(visible=True, color="#CFCFCF")
    arm_x = left + 0.15 + SIDE + 0.15
    _write(figure, arm_x, top, "truth", color=QUIET)
    _write(figure, answer_x, top, _short(example.truth))
    for line, (arm, answer) in enumerate(example.answers.items(), start=1):
        right = answer == example.truth
        style = {"color": RIGHT if right else WRONG, "fontweight": "normal" if right else "bold"}
        _write(figure, arm_x, top - LINE * line, _short(arm), color=QUIET)
        mark = "✓" if right else "✗"
        _write(figure, answer_x, top - LINE * line, f"{mark} {_short(answer)}", **style)


def _write(figure: "Figure", x: float, y: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, va="top", **{"fontsize": 9.5} | style)


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _wrapped(question: str, width: int) -> list[str]:
    """At most two lines of `width` letters."""
    return textwrap.wrap(question, width, max_lines=2, placeholder=" …") or [""]


def _bar(axes: Any, y: int, row: "Row", key: str, look: tuple[str, str, bool]) -> None:
    colour, _, prefix = look
    value = 100 * row.mean[key]
    sd = None if row.sd is None else 100 * row.sd[key]
    # face and edge apart: the hatch takes the edge's colour and has to show on the face
    axes.barh(
        y, value, height=0.66, color=colour, edgecolor="white" if prefix else colour,
        hatch="////" if prefix else None, linewidth=0,
    )  # fmt: skip
    if sd is not None:
        axes.errorbar(value, y, xerr=sd, color=INK, capsize=2.5, linewidth=1.2)
    # in a column beside the panel, where no bar, line or error bar can cross it
    place = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right"}
    text = "–" if math.isnan(value) else f"{value:.1f}"
    axes.annotate(text, (1.2, y), fontsize=9, annotation_clip=False, **place)


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


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str, bool]]:
    """(colour, marker, has a prefix) by arm; an arm and its prefix variant share the first two."""
    looks: dict[str, tuple[str, str, bool]] = {}
    routes: dict[str, tuple[str, str]] = {"none": (QUIET, "o")}
    for name in names:
        route = name.removesuffix(PREFIX)
        i = len(routes) - 1
        routes.setdefault(route, (COLOURS[i % len(COLOURS)], MARKERS[(i + 1) % len(MARKERS)]))
        looks[name] = (*routes[route], name.endswith(PREFIX))
    return looks


def _line_styles() -> tuple[dict[str, Any], ...]:
    common = {"color": INK, "linewidth": 1.2, "zorder": 3}
    return tuple(common | {"linestyle": s} for s in (":", (0, (5, 2)), "-.", "-"))


def _percent(value: float, _: float = 0) -> str:
    return f"{value:.0f} %"


@contextmanager
def _figure(
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
