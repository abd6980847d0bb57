"""Tables as lists of cells: as Markdown, and in a terminal."""

Table = list[list[str]]  # headings, then rows


def number(x: float) -> str:
    """Three digits, or whole from 100 on: 0.123, 12.3, 1,234."""
    return f"{x:,.0f}" if abs(x) >= 99.95 else f"{x:#.3g}".rstrip(".") if x else "0"


def markdown(table: Table, text: int = 2) -> str:
    """A table as Markdown: the first columns, `text` of them, to the left, numbers to the right."""
    cells = [[_escaped(cell) for cell in row] for row in table]
    rule = [":--" if i < text else "--:" for i in range(len(cells[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;")


def show(table: Table) -> None:
    """Prints a table (headings, then rows): by rich, or without it as plain columns."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120, color_system=None)
    drawn = Drawn(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(table[0]):
        drawn.add_column(heading, justify="right" if i > 1 else "left", overflow="fold")
    for row in table[1:]:
        drawn.add_row(*row)
    console.print(drawn, markup=False)
