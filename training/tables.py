"""Tables and numbers of reports."""

import math
from collections.abc import Sequence
from typing import Any

from fused_route.training.packages import missing


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its heading, numbers are to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    rule = [":--", *["--:"] * (len(cells[0]) - 1)] if len(cells[0]) > 2 else [":--", ":--"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def without_nan(tree: Any) -> Any:
    """`tree` with null, which JSON has, in place of numbers that are not finite."""
    if isinstance(tree, dict):
        return {key: without_nan(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_nan(item) for item in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def print_table(lines: Sequence[Sequence[str]], quiet: int = 0) -> None:
    """Prints a table, the first line its heading and the last `quiet` lines dim.

    Fits 100 columns. Without a terminal it is plain text of that width, free of control codes.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise missing("rich") from error
    console = Console(highlight=False)
    if console.is_terminal:
        console.width = max(console.width, 80)  # cut columns would hide numbers
    else:
        console = Console(highlight=False, width=100, color_system=None)
    title, *body = lines
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title[0], overflow="fold")  # in a narrow terminal names fold, numbers do not
    for heading in title[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for i, cells in enumerate(body):
        table.add_row(*cells, style="dim" if i >= len(body) - quiet else None)
    console.print(table, markup=False)
