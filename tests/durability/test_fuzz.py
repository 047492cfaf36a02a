"""Broken input of every kind that everlora reads: it ends in success or in one clean sentence, never otherwise."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlora.doctor.base_model import _shapes_in
from everlora.errors import EverloraError
from everlora.experiments.recipe import parse_recipe
from everlora.store import LearnerStore
from everlora.store.files import dump_arrays, load_arrays
from everlora.store.layout import _sealed
from everlora.streams import load_dialogues, load_examples, parse_row
from tests.durability.mutations import Mutator
from tests.store.builders import HEADER, make_learner

SEED = 20
Case = Callable[[], Any]

CSV = [
    b'text,label\nwhere is my parcel,parcel\nrefund me,refund\n"a, b""c",parcel\n',
    b"utterance,intent,domain\nhello,1,a\nbye,2,b\nhello,1,a\n",
    "\ufefftext,label,task\r\n\u00e9t\u00e9,0.5,x\r\n,2,y\r\n".encode(),
    b"image,label\na.png,1\nb.png,2\n",
]
ROWS = [
    {"text": "where is my parcel", "label": "parcel"},
    {"text": "refund me", "label": 3, "task": "a"},
    {"text": None, "label": "x", "extra": [1, 2, {"a": None}]},
    {"image": {"bytes": None, "path": "a.png"}, "label": 1},
]
DIALOGUES = [
    {"instruction": "add", "input": "1 and 2", "output": "3", "label_set": ["3", "4"], "id": 7},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"text": "once upon a time"},
    {"prompt": "say", "answer": "yes", "task": "t"},
]
RECIPE = """\
name: toy
title: A toy
status: runs-here
description: For tests.
data: {builtin: "sklearn:digits"}
stream: {by: class, increment: 2}
model: [packaged]
training: {epochs: 1, lr: 1e-2}
methods:
  inflora: {method: inflora, set: {rank: 2}}
default_methods: [inflora]
seeds: [3]
settings: {standard: {}, short: {training: {epochs: 2}}}
"""


def csv_files(folder: Path) -> Iterator[Case]:
    """Tables of text, through a file."""
    mutator, paths = Mutator(CSV, "csv", SEED), (folder / "rows.csv", folder / "rows.tsv")
    while True:
        path = paths[mutator.random.random() < 0.2]
        path.write_bytes(mutator.draw())
        yield lambda path=path: load_examples(path, require_labels=bool(path.suffix == ".csv"))


def json_files(folder: Path) -> Iterator[Case]:
    """JSON and JSON Lines, as labelled rows and as language."""
    lines = b"\n".join(json.dumps(row).encode() for row in ROWS[:2] * 2)
    dialogues = b"\n".join(json.dumps(row).encode() for row in DIALOGUES)
    whole = json.dumps({"data": ROWS[:2]}).encode()
    mutator = Mutator([lines, dialogues, whole, json.dumps(DIALOGUES[:1]).encode()], "json", SEED)
    paths, readers = (folder / "rows.jsonl", folder / "rows.json"), (load_examples, load_dialogues)
    while True:
        path, read = mutator.random.choice(paths), mutator.random.choice(readers)
        path.write_bytes(mutator.draw())
        yield lambda path=path, read=read: read(path)


def recipes(_folder: Path) -> Iterator[Case]:
    """Recipes."""
    mutator = Mutator([RECIPE.encode()], "yaml", SEED)
    while True:
        text = mutator.draw().decode("utf-8", "replace")
        yield lambda text=text: parse_recipe(text, file="toy.yaml")


def learner_files(folder: Path) -> Iterator[Case]:
    """learner.json and manifests, changed as bytes, and as values with right checksums."""
    root = make_learner(folder / "learner", ("a", "b"))
    paths = [root / "learner.json", root / "tasks/000-a/task.json", root / "state/001/state.json"]
    original = {path: path.read_bytes() for path in paths}
    bodies = {path: json.loads(data) for path, data in original.items()}
    bodies[paths[0]].pop("sha256")
    mutator = Mutator(list(original.values()), "json", SEED)
    mutators = {path: Mutator([data], "json", SEED + 1) for path, data in original.items()}

    def read() -> None:
        store = LearnerStore.open(root)
        store.verify()
        assert store.digest

    while True:
        for path, data in original.items():
            path.write_bytes(data)
        path = mutator.random.choice(paths[:1] * 4 + paths)
        if mutator.random.random() < 0.5:
            path.write_bytes(mutators[path].draw())
        else:
            value = mutator.value(bodies[path])
            try:
                data = _sealed(value) if isinstance(value, dict) and path is paths[0] else json.dumps(value).encode()
            except EverloraError:
                continue
            path.write_bytes(data)
            if path is not paths[0]:
                _point_at(paths[0], bodies[paths[0]], path, data)
        yield read


def _point_at(index: Path, body: dict[str, Any], manifest: Path, data: bytes) -> None:
    """Let learner.json vouch for a manifest."""
    from everlora.store.files import checksum

    folder = "/".join(manifest.parent.parts[-2:])
    entries = {
        kind: [{**one, "sha256": checksum(data)} if one["folder"] == folder else one for one in body[kind]]
        for kind in ("tasks", "states")
    }
    index.write_bytes(_sealed({**body, **entries}))


def array_files(folder: Path) -> Iterator[Case]:
    """Safetensors: the reader of learners, and the doctor's look at headers."""
    arrays = {"down": np.ones((2, 3), np.float32), "ids": np.arange(4), "empty": np.zeros((0, 3)), "s": np.array(True)}
    mutator = Mutator([dump_arrays(arrays, "x"), dump_arrays({}, "x")], "binary", SEED)
    path = folder / "model.safetensors"
    number = 0
    while True:
        data, number = mutator.draw(), number + 1
        if number % 10:
            yield lambda data=data: load_arrays(data, path)
        else:
            path.write_bytes(data)
            yield lambda: _shapes_in(path)


def dialogue_lines(_folder: Path) -> Iterator[Case]:
    """Rows of language data as they are kept."""
    mutator = Mutator([json.dumps(row).encode() for row in DIALOGUES], "json", SEED)
    while True:
        text = mutator.draw().decode("utf-8", "surrogateescape")
        yield lambda text=text: parse_row(text)


def row_lists(_folder: Path) -> Iterator[Case]:
    """Lists of rows with odd values, as labelled rows and as language."""
    mutator = Mutator([b"unused"], "json", SEED)
    while True:
        draw = mutator.random
        language = draw.random() < 0.5
        rows: Any = mutator.value([dict(row) for row in draw.choices(DIALOGUES if language else ROWS[:3], k=3)])
        read = load_dialogues if language else load_examples
        yield lambda rows=rows, read=read: read(rows)


# reader -> inputs of the long run; the short run takes one in fifty
READERS: dict[Callable[[Path], Iterator[Case]], int] = {
    csv_files: 6_000,
    json_files: 6_000,
    recipes: 3_000,
    learner_files: 4_000,
    array_files: 42_000,
    dialogue_lines: 42_000,
    row_lists: 6_000,
}


def fuzz(reader: Callable[[Path], Iterator[Case]], count: int, folder: Path) -> Counter[str]:
    """Read `count` inputs; return how often each kind of end came, those that may not come with an example."""
    ends: Counter[str] = Counter()
    cases = reader(folder)
    for number in range(count):
        case = next(cases)
        start = time.process_time()
        try:
            case()
        except EverloraError as error:
            text = str(error)
            ends["clean" if (10 < len(text) and text.isprintable()) or "\n" not in text else f"sentence {text!r}"] += 1
        except Exception as error:
            ends[f"{type(error).__name__} {str(error)[:60]!r} (input {number})"] += 1
        else:
            ends["read"] += 1
        if time.process_time() - start > 10:
            ends[f"slow (input {number})"] += 1
    return ends


@pytest.mark.parametrize("share", [50, pytest.param(1, marks=pytest.mark.slow)])
def test_no_input_ends_but_in_success_or_a_clean_error(share: int, tmp_path: Path) -> None:
    total, bad = 0, []
    for reader, count in READERS.items():
        folder = tmp_path / reader.__name__
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's and NumPy's remarks on odd input
            start = time.process_time()
            ends = fuzz(reader, count // share, folder)
        seconds = time.process_time() - start
        known = {name: ends.pop(name, 0) for name in ("read", "clean")}
        print(f"{reader.__name__}: {count // share} inputs in {seconds:.0f} s, {known}")
        total += count // share
        assert all(known.values()), f"{reader.__name__} never saw both good and bad input"
        bad += [f"{reader.__name__}: {end} x{times}" for end, times in ends.items()]
    print(f"{total} inputs in all")
    assert total >= 100_000 // share
    assert not bad, "\n".join(bad[:40])


def test_the_seeds_are_valid(tmp_path: Path) -> None:
    """What the fuzzing stands on."""
    make_learner(tmp_path / "learner")
    assert LearnerStore.open(tmp_path / "learner").header == HEADER
    assert parse_recipe(RECIPE, file="toy.yaml").name == "toy"
    for number, data in enumerate(CSV[:2]):
        path = tmp_path / f"{number}.csv"
        path.write_bytes(data)
        assert len(load_examples(path)) == data.count(b"\n") - 1
    assert len(load_dialogues(DIALOGUES[:3])) == 3 and parse_row(json.dumps(DIALOGUES[0]))
