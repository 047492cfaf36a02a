"""The store under random content and random histories."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from everlora.errors import StoreError
from everlora.store import LearnerStore, files
from everlora.store.layout import slug
from tests.store.builders import HEADER, add_task, make_learner

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(), PLAIN, max_size=4)
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"])
ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    DTYPES.flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)  # fmt: skip
NAMES = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        array.dtype == second[name].dtype and array.shape == second[name].shape
        and array.tobytes() == np.ascontiguousarray(second[name]).tobytes()
        for name, array in first.items()
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(OBJECTS)
def test_json_round_trips_and_is_canonical(value: dict[str, Any]) -> None:
    data = files.dump_json(value, "x.json")
    assert files.load_json(data, Path("x.json")) == value
    assert files.dump_json(files.load_json(data, Path("x.json")), "x.json") == data
    assert files.dump_json(dict(reversed(value.items())), "x.json") == data


@settings(max_examples=150, deadline=None)
@given(ARRAYS)
def test_arrays_round_trip_bit_for_bit_and_are_canonical(arrays: dict[str, np.ndarray]) -> None:
    data = files.dump_arrays(arrays, "x.safetensors")
    loaded = files.load_arrays(data, Path("x.safetensors"))
    assert same(arrays, loaded)
    assert files.dump_arrays(dict(reversed(loaded.items())), "x.safetensors") == data


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_every_name_of_a_task_gives_a_folder_inside(name: str) -> None:
    folder = f"tasks/000-{slug(name)}"
    with tempfile.TemporaryDirectory() as root:
        assert files.inside(Path(root), folder).parent == Path(root) / "tasks"
    assert slug(slug(name)) == slug(name)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=12) | st.text("./\\a-_", max_size=12))
def test_a_path_is_inside_or_refused(relative: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        try:
            path = files.inside(Path(root), relative)
        except StoreError:
            return
        assert path.resolve().is_relative_to(Path(root).resolve()) and path != Path(root)


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=20), OBJECTS, ARRAYS, OBJECTS, ARRAYS, st.dictionaries(NAMES, OBJECTS, max_size=2))
def test_a_task_comes_back_as_it_was_written(
    name: str, record: dict[str, Any], arrays: Any, values: dict[str, Any], state: Any, documents: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        contents: dict[str, Any] = {
            "record": record,
            "state_arrays": state,
            "state_values": values,
            "documents": documents,
        }
        digests = []
        for number in range(2):
            with LearnerStore.create(Path(place) / str(number), HEADER) as store:
                store.write_task(name, arrays={"a.safetensors": arrays, "sub/b.safetensors": arrays}, **contents)
                digests.append(store.digest)
        opened = LearnerStore.open(Path(place) / "0")
        task = opened.read_task(0)
        assert (task.entry.name, task.record) == (name, record)
        assert same(arrays, task.arrays("a.safetensors")) and same(arrays, task.arrays("sub/b.safetensors"))
        assert {file: task.document(file) for file in documents} == documents
        found, plain = opened.read_state()
        assert same(state, found) and plain == values
        assert digests == [opened.digest] * 2, "equal content, equal digest"


class Histories(RuleBasedStateMachine):
    """Adding, going back, reopening and giving up states in any order, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.root = make_learner(Path(self.place.name) / "learner", (), keep_states="all")
        self.store = LearnerStore.open(self.root, write=True)
        self.names: list[str] = []
        self.kept: list[int] = []
        self.digests = [self.store.digest]

    @precondition(lambda self: len(self.names) < 6)
    @rule(name=st.sampled_from(["a", "b", "same", "Ä ö", "x/y"]))
    def add(self, name: str) -> None:
        self.kept.append(len(self.names))
        self.names.append(name)
        add_task(self.store, name)
        self.digests.append(self.store.digest)

    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.names)))
        if count and count - 1 not in self.kept:
            with pytest.raises(StoreError, match="no longer keeps"):
                self.store.rollback(count)
            return
        assert [task.name for task in self.store.rollback(count)] == self.names[count:]
        self.names, self.digests = self.names[:count], self.digests[: count + 1]
        self.kept = [number for number in self.kept if number < count]

    @rule(data=st.data())
    def give_up_a_state(self, data: st.DataObject) -> None:
        earlier = self.kept[:-1]
        if earlier:
            number = data.draw(st.sampled_from(earlier))
            self.store.drop_state(number)
            self.kept.remove(number)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = LearnerStore.open(self.root, write=True)

    @invariant()
    def readers_see_what_was_done(self) -> None:
        reader = LearnerStore.open(self.root)
        assert [task.name for task in reader.tasks] == self.names
        assert [state.index for state in reader.states] == self.kept
        assert reader.digest == self.digests[-1], "going back gives the digest of before"
        reader.verify()

    def teardown(self) -> None:
        self.store.close()
        self.place.cleanup()


Histories.TestCase.settings = settings(max_examples=15, stateful_step_count=10, deadline=None)
TestHistories = Histories.TestCase
