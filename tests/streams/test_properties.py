"""Streams under random rows: sizes, orders, merges, round trips."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.kept_rows import pack_rows, unpack_rows
from everlora.streams import (
    Columns,
    Examples,
    by_class,
    class_order,
    concatenate,
    hold_out,
    load_dialogues,
    load_examples,
    parse_row,
    take_per_class,
)
from everlora.streams.dialogue_rows import write_row
from everlora.streams.keyed import keyed_permutation, keyed_uniform

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
LABELS = st.sampled_from(["a", "b", "c", "Ä", "x y"])


@st.composite
def examples(draw: st.DrawFn, *, max_rows: int = 14) -> Examples:
    count = draw(st.integers(1, max_rows))
    texts = draw(st.lists(WORDS, min_size=count, max_size=count))
    labels = draw(st.lists(LABELS, min_size=count, max_size=count))
    ids = draw(st.lists(st.integers(0, 500), min_size=count, max_size=count, unique=True))
    return Examples("text", tuple(texts), np.array(labels, dtype=object), np.array(ids, dtype=np.int64))


@settings(max_examples=80, deadline=None)
@given(examples(), st.integers(0, 50), st.floats(0.05, 0.95), st.integers(0, 3), st.integers(1, 9))
def test_holding_out_is_a_partition_with_the_promised_sizes(
    rows: Examples, seed: int, fraction: float, minimum: int, maximum: int
) -> None:
    train, held = hold_out(rows, fraction=fraction, seed=seed, minimum=minimum, maximum=maximum)
    assert sorted([*train.ids, *held.ids]) == sorted(rows.ids)
    assert set(train.classes) == set(rows.classes), "no class loses its last row"
    for name, members in rows.rows_by_label.items():
        count = len(held.rows_by_label.get(name, ()))
        assert count == min(max(round(fraction * len(members)), minimum), maximum, len(members) - 1)
    for part in (train, held):
        places = [rows.ids.tolist().index(number) for number in part.ids]
        assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(examples(), st.integers(1, 6), st.integers(0, 9))
def test_taking_per_class_is_idempotent_and_no_larger_than_asked(rows: Examples, count: int, seed: int) -> None:
    taken = take_per_class(rows, count, seed)
    assert all(len(members) <= count for members in taken.rows_by_label.values())
    assert taken.classes == rows.classes
    assert take_per_class(taken, count, seed + 1).fingerprint == taken.fingerprint


@settings(max_examples=60, deadline=None)
@given(st.lists(examples(max_rows=6), min_size=1, max_size=4))
def test_concatenating_keeps_all_rows_in_order_with_distinct_ids(parts: list[Examples]) -> None:
    whole = concatenate(parts)
    assert whole.inputs == tuple(text for part in parts for text in part.inputs)
    assert len(set(whole.ids.tolist())) == len(whole) == sum(map(len, parts))
    assert whole.labels is not None
    start = 0
    for part in parts:
        again = whole.select(np.arange(start, start + len(part)))
        assert again.fingerprint == part.fingerprint
        start += len(part)
    left = concatenate([concatenate(parts[:2]), *parts[2:]])
    assert left.fingerprint == whole.fingerprint, "order of merging does not count"


@settings(max_examples=60, deadline=None)
@given(examples(), st.randoms())
def test_the_fingerprint_follows_the_rows(rows: Examples, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = rows.select(order)
    content = list(zip(rows.inputs, rows.labels.tolist(), strict=True))  # type: ignore[union-attr]
    same = [content[index] for index in order] == content
    assert (moved.fingerprint == rows.fingerprint) == same
    assert moved.select(np.argsort(order)).fingerprint == rows.fingerprint


@settings(max_examples=60, deadline=None)
@given(examples(), st.booleans(), st.integers(0, 4))
def test_kept_rows_round_trip(rows: Examples, labelled: bool, cut: int) -> None:
    part = rows.select(np.arange(min(cut, len(rows))))
    kept = part if labelled else Examples("text", part.inputs, None, part.ids)
    again = unpack_rows(pack_rows(kept))
    assert again.fingerprint == kept.fingerprint and again.ids.tolist() == kept.ids.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99) | st.none())
def test_tasks_by_class_part_the_classes_in_the_order_of_the_seed(
    classes: int, initial: int, increment: int, seed: int | None
) -> None:
    initial = min(initial, classes)
    names = tuple(f"class {number}" for number in range(classes))
    labels = np.array([name for name in names for _ in range(2)], dtype=object)
    rows = Examples("text", tuple(map(str, range(2 * classes))), labels, np.arange(2 * classes), class_names=names)
    stream = by_class({"train": rows}, name="toy", initial=initial, increment=increment, seed=seed)
    sizes = [len(task.labels) for task in stream.tasks]
    assert sizes[0] == initial and sum(sizes) == classes
    assert all(size == increment for size in sizes[1:-1]) and all(0 < size <= max(initial, increment) for size in sizes)
    assert [name for task in stream.tasks for name in task.labels] == [names[i] for i in class_order(classes, seed)]
    assert sorted(number for task in stream.tasks for number in task.train.ids.tolist()) == list(range(2 * classes))


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n\ufeff"), min_size=1, max_size=10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELLS, st.sampled_from(["red card", "blue", "x,y", 'quo"te'])), min_size=1, max_size=8))
def test_tables_round_trip_through_csv_and_json_lines(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        table, lines = Path(place) / "rows.csv", Path(place) / "rows.jsonl"
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("text", "label"), *rows])
        lines.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows), encoding="utf-8")
        first, second = (load_examples(path, columns=Columns(text="text", label="label")) for path in (lines, table))
    assert first.inputs == tuple(text for text, _ in rows)
    assert first.labels is not None and first.labels.tolist() == [label for _, label in rows]
    assert second.labels is not None and second.labels.tolist() == first.labels.tolist()
    assert second.inputs == first.inputs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({"instruction": WORDS, "input": WORDS, "output": WORDS}), min_size=1, max_size=5))
def test_rows_of_language_round_trip(rows: list[dict[str, str]]) -> None:
    found = load_dialogues(rows)
    assert [parse_row(line) for line in found.inputs] == rows
    assert [write_row(parse_row(line)) for line in found.inputs] == list(found.inputs)
    assert load_dialogues(found).fingerprint == found.fingerprint


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=9, unique=True), st.integers(1, 5), st.randoms())
def test_random_numbers_belong_to_the_row(ids: list[int], columns: int, random: object) -> None:
    numbers = keyed_uniform(torch.tensor(ids), columns, "purpose", 7)
    order = list(range(len(ids)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = keyed_uniform(torch.tensor([ids[index] for index in order]), columns, "purpose", 7)
    assert torch.equal(moved, numbers[order])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert sorted(keyed_permutation(len(ids), 3).tolist()) == list(range(len(ids)))
