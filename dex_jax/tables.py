"""The form of all tables: markdown, aligned for who reads it as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in markdown, the first column aligned left and the others right.

    Examples:
      >>> print(markdown(["way", "ms"], [["AR", "23.1"], ["DEX", "9.8"]]))
      | way |   ms |
      |:----|-----:|
      | AR  | 23.1 |
      | DEX |  9.8 |
    """
    widths = [max(3, *(len(row[column]) for row in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    first, *others = widths
    rule = "|" + "|".join([":" + "-" * (first + 1), *("-" * (width + 1) + ":" for width in others)]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
