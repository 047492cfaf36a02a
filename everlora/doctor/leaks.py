"""The same row in two places: in training and in a test, in two tasks, or twice with two labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from everlora.doctor.coming import ComingTask, Part, parts_of, place
from everlora.doctor.findings import Finding, broken, note, warning
from everlora.streams import Examples

__all__ = ["check_leaks", "check_repeats"]

_MUCH = 0.01  # of the rows of a test: from here on its figure says more about memory than about learning
_MOST_NAMES = 3

Rows = dict[str, list[int]]
"""Content to the numbers of the rows that have it."""


@dataclass(frozen=True, eq=False)
class _Contents:
    """What the rows of a part say: `exact` by row, `loose` grouped, whatever the case and white space of texts."""

    part: Part
    exact: list[str]
    loose: Rows

    @classmethod
    def of(cls, part: Part) -> _Contents:
        rows = part.rows
        exact = [_hash(rows, index) for index in range(len(rows))]
        if isinstance(rows.inputs, np.ndarray):
            return cls(part, exact, _grouped(exact))
        return cls(part, exact, _grouped([" ".join(str(text).casefold().split()) for text in rows.inputs]))


def check_repeats(part: Part) -> Iterator[Finding]:
    """Rows that stand more than once within one part, above all those with two labels."""
    rows = part.rows
    groups = [found for found in _Contents.of(part).loose.values() if len(found) > 1]
    odd = [found for found in groups if len({_label(rows, index) for index in found}) > 1]
    if odd:
        first = odd[0]
        labels = sorted({_label(rows, index) for index in first})
        what = (
            f"has {len(odd)} row{_s(odd)} that stand{'s' if len(odd) == 1 else ''} there with two labels, such as "
            f"{place(rows, first[0])} as {' and '.join(repr(label) for label in labels)}"
        )
        yield warning(part.name, what, "decide for one label each")
    repeated = sum(len(found) - 1 for found in groups)
    if repeated:
        first = groups[0]
        again = f"{place(rows, first[0])} as row {int(rows.ids[first[1]]) + 1}"
        what = f"repeats {repeated} of its {len(rows)} rows, such as {again}"
        yield note(part.name, what, "keep one of each, unless the repetition means something")


def check_leaks(tasks: list[ComingTask]) -> Iterator[Finding]:
    """Rows that stand in two parts: what is judged by must not be learned from, and tasks should not share rows."""
    contents = [_Contents.of(part) for part in parts_of(tasks)]
    trained, validation, test = (
        [one for one in contents if one.part.split == split] for split in ("training", "validation", "test")
    )
    for one in [*validation, *test]:
        yield from _judged_and_learned(one, trained)
    for one in test:
        yield from _shared(
            one, validation, "so that choosing by them has seen the test", "keep each row in one of them"
        )
    for number, one in enumerate(trained):
        yield from _shared(one, trained[:number], "so that learning it is rehearsal too", "keep each row in one task")


def _judged_and_learned(judged: _Contents, trained: Sequence[_Contents]) -> Iterator[Finding]:
    loose = _found_in(judged, trained)
    exact = _found_in(judged, trained, exactly=True)
    total = len(judged.part.rows)
    for kind, found in (
        ("", exact),
        (" but for case or white space", {k: v for k, v in loose.items() if k not in exact}),
    ):
        if not found:
            continue
        count = sum(len(judged.loose[key]) for key in found)
        make = broken if not kind and count >= _MUCH * total else warning
        what = (
            f"has {count} of its {total} rows ({count / total:.1%}) among the training rows of {_names(found)} too"
            f"{kind}, such as {_example(judged, found)}"
        )
        yield make(judged.part.name, what, "take them out of the training rows")


def _shared(one: _Contents, others: Sequence[_Contents], therefore: str, mend: str) -> Iterator[Finding]:
    found = _found_in(one, others)
    if not found:
        return
    count = sum(len(one.loose[key]) for key in found)
    odd = {key: other for key, other in found.items() if _labels(one, key) != _labels(other, key)}
    what = f"shares {count} of its {len(one.part.rows)} rows with {_names(found)}, {therefore}"
    what += f", and {len(odd)} have other labels there" if odd else ""
    yield warning(one.part.name, f"{what} (such as {_example(one, odd or found)})", mend)


def _found_in(one: _Contents, others: Sequence[_Contents], *, exactly: bool = False) -> dict[str, _Contents]:
    """What a part says that another says too, and the first that does; case and white space count if `exactly`."""
    return {
        key: other
        for key in one.loose
        for other in reversed(others)
        if key in other.loose and (not exactly or _is_exact(key, one, other))
    }


def _is_exact(key: str, one: _Contents, other: _Contents) -> bool:
    """Whether rows that are alike but for case and white space are also the same."""
    return bool({one.exact[index] for index in one.loose[key]} & {other.exact[index] for index in other.loose[key]})


def _example(one: _Contents, found: Mapping[str, _Contents]) -> str:
    key, other = next(iter(found.items()))
    there = f"row {int(other.part.rows.ids[other.loose[key][0]]) + 1} of {other.part.name}"
    return f"{place(one.part.rows, one.loose[key][0])} and {there}"


def _names(found: Mapping[str, _Contents]) -> str:
    names = list(dict.fromkeys(other.part.name for other in found.values()))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _labels(contents: _Contents, key: str) -> set[str]:
    return {_label(contents.part.rows, index) for index in contents.loose[key]}


def _label(rows: Examples, index: int) -> str:
    return "" if rows.labels is None else str(rows.labels[index])


def _grouped(keys: list[str]) -> Rows:
    rows: Rows = {}
    for index, key in enumerate(keys):
        rows.setdefault(key, []).append(index)
    return rows


def _hash(rows: Examples, index: int) -> str:
    content = rows.inputs[index]
    if isinstance(content, str):
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return hashlib.sha256(repr(content.shape).encode() + np.ascontiguousarray(content).tobytes()).hexdigest()


def _s(items: list[list[int]]) -> str:
    return "" if len(items) == 1 else "s"
