"""What the verbs print: JSON for machines, lines and tables for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "count",
    "duration",
    "emit_json",
    "is_first",
    "kinds",
    "line",
    "listing",
    "percent",
    "plain",
    "signed_percent",
    "table",
    "width",
]

_WIDTH_WITHOUT_TERMINAL = 160
_NOTHING = {"", "-", "–"}  # noqa: RUF001 - the en dash that reports write where a number does not exist


def plain(value: Any) -> Any:
    """Turn a result into what JSON can hold: data classes into mappings, array scalars into numbers, NaN into null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    # Arrays and their scalars, told by their own method so that this module needs no array library.
    convert = getattr(value, "tolist", None)
    return plain(convert()) if callable(convert) else str(value)


def is_first() -> bool:
    """Whether this process is the one that prints and writes, of several that `torchrun` may have started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def emit_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    if is_first():
        sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def line(text: str) -> None:
    """Print one line on standard output, as it is: no markup is read in it."""
    if is_first():
        sys.stdout.write(text + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table on standard output; columns whose every cell is a number are set to the right.

    Args:
        columns: the headings.
        rows: one cell per heading, as text.
        title: a line above the table.
    """
    if not is_first():
        return
    from rich import box
    from rich.table import Table

    console = _console()
    cells = [tuple(row) for row in rows]
    drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, heading in enumerate(columns):
        is_number = bool(cells) and all(_looks_numeric(row[index]) for row in cells)
        drawn.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    console.print(drawn)


def width() -> int:
    """How many characters fit in a line of standard output."""
    return _console().width


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(markup=False, emoji=False, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    return console


def _looks_numeric(cell: str) -> bool:
    words = cell.split(" ± ")
    return cell in _NOTHING or all(word.lstrip("+-").replace(".", "", 1).replace(",", "").isdigit() for word in words)


def percent(fraction: float | None) -> str:
    """`0.8661` as `86.61`; `-` where there is nothing to show."""
    if fraction is None or not math.isfinite(fraction):
        return "-"
    return f"{100 * fraction:.2f}"


def signed_percent(fraction: float | None) -> str:
    """Like `percent`, with the sign always written."""
    text = percent(fraction)
    return text if text == "-" or fraction is None or fraction < 0 else f"+{text}"


def duration(seconds: float | None) -> str:
    """A time as people say it: `3.2 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def count(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def kinds(counts: Mapping[str, int]) -> str:
    """`3 buffer rows, 1 validation row` for counts by kind, whose names are plurals."""
    words = {kind: kind.replace("_", " ") for kind in counts}
    parts = [f"{n} {words[kind].removesuffix('s') if n == 1 else words[kind]}" for kind, n in sorted(counts.items())]
    return ", ".join(parts) or "nothing"


def listing(names: Sequence[str], most: int = 12) -> str:
    """Names in a row, and how many more there are beyond `most`; one with a comma stands in quotes."""
    shown = ", ".join(f"'{name}'" if "," in str(name) else str(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
