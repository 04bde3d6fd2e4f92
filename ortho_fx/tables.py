"""Tables in plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """Lines of aligned columns.

    Args:
        rows: the cells; the first row is the header. A row with fewer cells than the header is a note: its cells after
            the first are not aligned to the columns.
        align: "l" or "r" for each column; the last letter also holds for all further columns.
    """
    columns = len(rows[0])
    sides = [align[min(column, len(align) - 1)] for column in range(columns)]
    whole = [row for row in rows if len(row) == columns]
    widths = [max(len(row[column]) for row in (rows if column == 0 else whole)) for column in range(columns)]
    lines = []
    for row in rows:
        width = widths if len(row) == columns else widths[:1] + [0] * (len(row) - 1)
        cells = (
            cell.ljust(w) if side == "l" else cell.rjust(w) for cell, w, side in zip(row, width, sides, strict=False)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def without_empty_columns(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The rows without the columns that are empty below the header; notes do not change."""
    header = rows[0]
    whole = [row for row in rows[1:] if len(row) == len(header)]
    shown = [column for column in range(len(header)) if column == 0 or any(row[column] for row in whole)]
    return [[row[column] for column in shown] if len(row) == len(header) else row for row in rows]


def markdown(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """A Markdown table; the arguments are those of `table`, without notes."""
    sides = ["---:" if align[min(column, len(align) - 1)] == "r" else "---" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], sides, *rows[1:]))


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}


def latex(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """A LaTeX tabular; the arguments are those of `table`, without notes. Numbers below zero get a minus sign."""
    columns = "".join(align[min(column, len(align) - 1)] for column in range(len(rows[0])))
    lines = [" & ".join(map(_latex_cell, cells)) + r" \\" for cells in rows]
    body = "\n".join([r"\hline", lines[0], r"\hline", *lines[1:], r"\hline"])
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}"


def _latex_cell(text: str) -> str:
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])([-+])(?=[0-9])", r"$\1$", escaped)
