"""The figure of a comparison that others do not have: differences with their intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fused_route.training.comparison.statistics import Difference
from fused_route.training.plots import INK, QUIET, canvas, looks


def differences(found: Mapping[str, Difference], path: Path, *, baseline: str) -> None:
    """Writes differences to the baseline and their intervals as a PNG, an arm a line.

    Raises:
        ValueError: none, or matplotlib is missing.
    """
    if not found:
        raise ValueError("found is empty: nothing to draw")
    look_of = looks([baseline, *found])
    with canvas(path, 8, 1.4 + 0.45 * len(found)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=QUIET, linewidth=1, linestyle=":", zorder=1)
        for y, (name, difference) in enumerate(found.items()):
            colour, marker, prefix = look_of[name]
            mean, low, high = (100 * value for value in difference)
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            face = "white" if prefix else colour
            axes.plot(mean, y, marker=marker, color=colour, markersize=8, markerfacecolor=face)
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "va": "center",
                "color": INK,
            }
            text = f"{mean:+.2f}  [{low:+.2f}, {high:+.2f}]"
            axes.annotate(text, (1.02, y), fontsize=9, annotation_clip=False, **place)
        axes.set_yticks(range(len(found)), list(found))
        axes.set(
            ylim=(len(found) - 0.5, -0.5),
            xlabel="difference in score, times 100",
            title=f"Difference to {baseline} on the same items, with 95 % intervals",
        )
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
