"""Aligned text for people."""

import unicodedata
from collections.abc import Sequence

Cell = str | int | float | None


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    columns = 0
    for character in text:
        if unicodedata.combining(character):
            continue
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns


def clipped(text: str, width: int) -> str:
    """Return the text in at most ``width`` columns, an ellipsis where it was cut."""
    if width_of(text) <= width:
        return text
    kept = ""
    for character in text:
        if width_of(kept + character) > width - 1:
            break
        kept += character
    return kept.rstrip() + "…"


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    indent: int = 2,
    max_width: int = 44,
) -> str:
    """Return an aligned table: numbers to the right, text to the left, None as a dash.

    Args:
        headers: one per column.
        rows: cells; a float shows four decimals.
        indent: spaces before every line.
        max_width: columns of the terminal after which a cell is cut.
    """
    texts = [[clipped(_text(cell), max_width) for cell in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[at], int | float | None) for row in rows)
        for at in range(len(headers))
    ]
    widths = [
        max(width_of(line[at]) for line in [list(headers), *texts]) for at in range(len(headers))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            " " * (widths[at] - width_of(cell)) + cell
            if right[at]
            else cell + " " * (widths[at] - width_of(cell))
            for at, cell in enumerate(cells)
        ]
        return (" " * indent + "  ".join(padded)).rstrip()

    rule = " " * indent + "  ".join("─" * width for width in widths)
    return "\n".join([line(headers), rule, *(line(cells) for cells in texts)])


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def pairs(entries: Sequence[tuple[str, str]], *, indent: int = 2) -> str:
    """Return names and values in two columns."""
    width = max((width_of(name) for name, _ in entries), default=0)
    return "\n".join(
        f"{' ' * indent}{name}{' ' * (width - width_of(name))}  {value}".rstrip()
        for name, value in entries
    )


def milliseconds(micros: int) -> str:
    """Return a time in milliseconds with three significant digits or so."""
    value = micros / 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
