"""Small HTML tables, as notebooks show them; everything in them is escaped, and they bring no style of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["NOTHING", "html_table", "percent"]

NOTHING = "-"


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Args:
        caption: stands above it.
        columns: the headings.
        rows: one text for each heading; the first is the row's name.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def percent(share: float | None) -> str:
    """A share in percent, with two digits."""
    return NOTHING if share is None else f"{100.0 * share:.2f}"
