"""The scoreboard's tables as values, and how a table becomes HTML or markdown. What is in them: `*_tables.py`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.federated.compare import Interval

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: `hint` is shown on hover; `mark` is "", "best", "ours", "good" or "bad"."""

    text: str
    hint: str = ""
    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; the first `left` columns are words, the others numbers."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    left: int = 1


def number(value: float, digits: int = 1, plus: bool = False) -> str:
    """A number for a table; "diverged" for NaN.

    Examples
    --------
    >>> number(-0.04), number(2.345, 2, plus=True)
    ('0.0', '+2.35')
    """
    if math.isnan(value):
        return "diverged"
    text = f"{value:{'+' if plus else ''}.{digits}f}"
    return text.lstrip("+-") if not float(text) else text


def mean_cell(interval: Interval | None, digits: int = 1, hint: str = "") -> Cell:
    """Mean and half width over seeds: "68.2 ± 3.1"; the mean alone for one seed."""
    if interval is None:
        return Cell(text=NONE, hint="not measured in every finished run")
    seeds = f"{interval.count} seed{'s' if interval.count > 1 else ''}"
    text = number(interval.mean, digits)
    if math.isfinite(interval.half):
        text += f" ± {number(interval.half, digits)}"
    return Cell(text=text, hint=f"{seeds}; {hint}" if hint else seeds)


def range_text(interval: Interval, digits: int = 1) -> str:
    """The ends of an interval: "-1.2 to +3.4"."""
    if math.isnan(interval.low):
        return NONE
    low, high = (number(v, digits, plus=True) for v in (interval.low, interval.high))
    return f"{low} to {high}"


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(text=value)


def to_html(table: Table) -> str:
    """The table with its title and caption; it scrolls sideways on a narrow screen."""
    head = "".join(
        f"<th{'' if i < table.left else ' class=n'}>{html.escape(name)}</th>"
        for i, name in enumerate(table.header)
    )
    body = []
    for row in table.rows:
        cells = []
        for index, value in enumerate(row):
            cell = _cell(value)
            names = [name for name in ("" if index < table.left else "n", cell.mark) if name]
            style = f' class="{" ".join(names)}"' if names else ""
            hint = f' title="{html.escape(cell.hint)}"' if cell.hint else ""
            cells.append(f"<td{style}{hint}>{html.escape(cell.text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<p class="caption">{html.escape(table.caption)}</p>' if table.caption else ""
    return (
        f"<h4>{html.escape(table.title)}</h4>{caption}"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def to_markdown(table: Table) -> str:
    """A GitHub table under a bold title; the best of a column is bold, what exceeds a limit is in italics."""

    def text(value: Cell | str) -> str:
        cell = _cell(value)
        plain = cell.text.replace("|", "\\|")
        return {"best": f"**{plain}**", "bad": f"*{plain}*"}.get(cell.mark, plain)

    rule = ["---" if i < table.left else "---:" for i in range(len(table.header))]
    rows = [list(table.header), rule, *([text(v) for v in row] for row in table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    caption = [table.caption, ""] if table.caption else []
    return "\n".join([f"**{table.title}**", "", *caption, *lines, ""])
