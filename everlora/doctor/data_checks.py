"""Rows and labels by themselves: empty texts, classes that are rare or alone, labels that are one but for spelling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from everlora.doctor.coming import ComingTask, Part
from everlora.doctor.findings import Finding, note, warning
from everlora.streams import parse_row

__all__ = ["check_balance", "check_spelling", "check_texts"]

_UNEQUAL, _VERY_UNEQUAL = 3.0, 10.0
_FEW_ROWS = 5
_MOST_NAMES = 3


def check_texts(part: Part) -> Iterator[Finding]:
    """Texts without a sign in them."""
    rows = part.rows
    if rows.modality == "image":
        return
    empty = [index for index, text in enumerate(rows.inputs) if not _said(str(text), rows.modality).strip()]
    if empty:
        numbers = ", ".join(str(int(rows.ids[index]) + 1) for index in empty[:_MOST_NAMES])
        more = f" and {len(empty) - _MOST_NAMES} more" if len(empty) > _MOST_NAMES else ""
        what = f"has {len(empty)} of {len(rows)} rows without text (row {numbers}{more})"
        yield warning(part.name, what, "fill them or drop them")


def check_balance(task: ComingTask) -> Iterator[Finding]:
    """Classes with few rows, in themselves or against the largest."""
    if task.train is None or len(task.train.classes) == 0:
        return
    counts = {name: len(rows) for name, rows in task.train.rows_by_label.items()}
    by_size = sorted(counts, key=lambda name: (counts[name], name))
    rarest = ", ".join(f"'{name}' {counts[name]}" for name in by_size[:_MOST_NAMES])
    ratio = counts[by_size[-1]] / counts[by_size[0]]
    largest = f"the largest, '{by_size[-1]}', {counts[by_size[-1]]}"
    if ratio >= _UNEQUAL:
        make = warning if ratio >= _VERY_UNEQUAL else note
        what = f"has classes of very unequal size, 1 to {ratio:.1f}: rows of the rarest are {rarest}, of {largest}"
        yield make(task.name, what, "add rows of the rare classes, and read accuracy by class")
    few = [name for name in by_size if counts[name] < _FEW_ROWS]
    if few and ratio < _UNEQUAL:
        what = f"has {len(few)} of {len(counts)} classes with fewer than {_FEW_ROWS} rows: {rarest}"
        yield warning(task.name, what, "add rows: so few tell little about a class")


def check_spelling(tasks: Sequence[ComingTask], known: Iterable[str]) -> Iterator[Finding]:
    """Labels that differ in case, white space, `-` or `_` only: they become two classes.

    Args:
        tasks: what is to be learned, in order.
        known: labels learned before.
    """
    first: dict[str, tuple[str, str]] = {_bare(name): (name, "the labels learned before") for name in known}
    for task in tasks:
        for name in task.train.classes if task.train is not None else ():
            other, where = first.setdefault(_bare(name), (name, task.name))
            if other != name:
                there = "" if where == task.name else f" of {where}"
                what = f"has the label '{name}', which differs in spelling only from '{other}'{there}"
                yield warning(task.name, what, "write both alike, unless they are two classes")


def _bare(name: str) -> str:
    return "".join(sign for sign in name.casefold() if not (sign.isspace() or sign in "-_"))


def _said(text: str, modality: str) -> str:
    """What a row gives to learn: of a language model's row the text or the answers."""
    if modality != "language":
        return text
    row = parse_row(text)
    if "messages" in row:
        return "".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")
    return str(row.get("text", row.get("output", "")))
