"""Figures of the demo: accuracy by question type, and answered images.

Accuracies come as fractions in [0, 1] and are drawn in percent.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_route.training.data.images import load_image
from fused_route.training.plots import INK, QUIET, canvas, looks, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fused_route.training.demo.report import Row

SIDE, LINE = 1.5, 0.19  # of an image and of a line of answers, in inches
RIGHT, WRONG = "#0072B2", "#C2410C"


@dataclass(frozen=True)
class Example:
    """A test question with its image, its true answer and each arm's answer (by arm name)."""

    image: Path
    question: str
    truth: str
    answers: Mapping[str, str]


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
    look_of = looks(row.name for row in rows)
    keys = list(rows[0].mean)
    with canvas(path, 2.4 + 2.6 * len(keys), 1.7 + 0.38 * len(rows)) as figure:
        panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
        for axes, key in zip(panels, keys, strict=True):
            for y, row in enumerate(rows):
                _bar(axes, y, row, key, look_of[row.name])
            for style, (name, by_type) in zip(_line_styles(), baselines.items(), strict=False):
                axes.axvline(100 * by_type[key], label=name, **style)
            axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -0.6), xticks=(0, 25, 50, 75, 100))
            axes.set_title("all questions" if key == "all" else key)
            axes.xaxis.set_major_formatter(percent)
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
    with canvas(path, width, height, layout=None) as figure:
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


def _line_styles() -> tuple[dict[str, Any], ...]:
    common = {"color": INK, "linewidth": 1.2, "zorder": 3}
    return tuple(common | {"linestyle": s} for s in (":", (0, (5, 2)), "-.", "-"))
