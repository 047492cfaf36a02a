from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.experiments import sources as module
from everlora.experiments.data import build_stream, read_splits
from everlora.experiments.recipe import load_recipe, parse_recipe, stream_of
from everlora.experiments.schema import ColumnNames, DataSpec
from everlora.experiments.sources import locate

HUB = DataSpec(hub="owner/set", shared="set", columns=ColumnNames(label="intent"))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(module, "hub_copy_is_here", lambda name: False)
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)


@pytest.fixture
def shared_folder(tmp_path, monkeypatch):
    """A shared folder with the set in it."""
    (tmp_path / "data" / "set").mkdir(parents=True)
    monkeypatch.setenv("EVERLORA_SHARED", str(tmp_path))
    return tmp_path


def test_the_hub_comes_before_the_shared_copy_but_only_when_it_answers(shared_folder, monkeypatch):
    assert locate(HUB, recipe="r").kind == "shared"
    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    source = locate(HUB, recipe="r")
    assert (source.kind, source.value, source.columns) == ("hub", "owner/set", {"label": "intent"})


def test_a_cached_copy_needs_no_network(shared_folder, monkeypatch):
    monkeypatch.setattr(module, "hub_copy_is_here", lambda name: name == "owner/set")
    assert locate(HUB, recipe="r").kind == "hub"


def test_what_the_caller_gives_wins(shared_folder, monkeypatch, splits):
    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    assert locate(HUB, shared_folder, recipe="r").kind == "given"
    assert read_splits(HUB, splits, recipe="r")[0] == splits


def test_a_builtin_set_needs_neither_network_nor_files(monkeypatch):
    monkeypatch.setattr(module, "hub_is_reachable", lambda: pytest.fail("asked the hub"))
    assert locate(DataSpec(builtin="sklearn:digits"), recipe="r").kind == "builtin"


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLORA_SHARED", str(tmp_path))
    with pytest.raises(
        DataError, match=r"recipe 'r' cannot be found: .*owner/set.* no data/set; give its folder with --data"
    ):
        locate(HUB, recipe="r")
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder"):
        locate(HUB, tmp_path / "nowhere", recipe="r")


def test_column_names_are_taken_from_the_layout_that_fits(tmp_path):
    spec = DataSpec(
        hub="a/b", columns=ColumnNames(text="text", label="intent"), shared_columns=ColumnNames(label="kind")
    )
    file = tmp_path / "train.csv"
    for header, expected in (("text,intent", "intent"), ("text,kind", "kind"), ("text,other", None)):
        file.write_text(f"{header}\nhello,greeting\n", encoding="utf-8")
        columns = locate(spec, tmp_path, recipe="r").columns
        assert (columns or {}).get("label") == expected


def test_dropped_labels_leave_rows_and_the_class_list(splits):
    spec = DataSpec(builtin="sklearn:digits", drop_labels=("cyan",))
    kept, _ = read_splits(spec, splits, recipe="r")
    assert kept["train"].class_names == ("amber", "blue", "denim", "ebony", "fawn")
    assert "cyan" not in set(kept["test"].labels)
    assert len(kept["train"]) == 50


def test_a_source_without_test_rows_is_divided_once_and_for_all(splits):
    spec = DataSpec(builtin="sklearn:digits", test_fraction=0.2)
    parts, _ = read_splits(spec, {"train": splits["train"]}, recipe="r")
    again, _ = read_splits(spec, {"train": splits["train"]}, recipe="r")
    assert (len(parts["train"]), len(parts["test"])) == (48, 12)
    assert not set(parts["train"].ids) & set(parts["test"].ids)
    assert np.array_equal(parts["test"].ids, again["test"].ids)
    with pytest.raises(DataError, match="no test split"):
        read_splits(DataSpec(builtin="sklearn:digits"), {"train": splits["train"]}, recipe="r")


def _stream(text, setting, splits, seed):
    recipe = parse_recipe(text, file="tiny.yaml")
    chosen = recipe.settings[setting]
    return build_stream(recipe, chosen, stream_of(recipe, chosen), [("tiny", splits)], seed=seed)


def test_the_seed_orders_the_classes_unless_the_recipe_says_otherwise(tiny, splits):
    orders = {seed: _stream(tiny, "standard", splits, seed).order for seed in (3, 4)}
    assert orders[3] != orders[4]
    assert orders[3] == tuple(splits["train"].class_names[i] for i in np.random.RandomState(3).permutation(6))
    natural = tiny.replace("order: seed", "order: natural")
    assert _stream(natural, "standard", splits, 3).order == splits["train"].class_names
    fixed = tiny.replace("order: seed", "order: 4")
    assert _stream(fixed, "standard", splits, 3).order == orders[4]


def test_the_first_task_can_be_larger(tiny, splits):
    text = tiny.replace("  increment: 2\n", "  initial: 4\n  increment: 1\n")
    stream = _stream(text, "standard", splits, 3)
    assert [len(task.labels) for task in stream.tasks] == [4, 1, 1]


def test_a_subsample_is_the_same_for_every_seed(tiny, splits):
    chosen = [_stream(tiny, "short", splits, seed) for seed in (3, 4)]
    ids = [sorted(int(one) for task in stream.tasks for one in task.train.ids) for stream in chosen]
    assert ids[0] == ids[1]
    assert [len(task.train) for task in chosen[0].tasks] == [6, 6, 6]
    assert [len(task.test) for task in chosen[0].tasks] == [4, 4, 4]


def test_validation_leaves_the_test_rows_alone(tiny, splits):
    stream = _stream(tiny, "validation", splits, 3)
    pixels = {image.tobytes() for task in stream.tasks for image in task.test.inputs}
    assert not pixels & {image.tobytes() for image in splits["test"].inputs}
    assert pixels <= {image.tobytes() for image in splits["train"].inputs}
    assert not pixels & {image.tobytes() for task in stream.tasks for image in task.train.inputs}


def test_validation_prefers_the_sources_own_split(tiny, splits):
    own = splits | {"validation": splits["test"].select(range(12)), "test": splits["test"].select(range(12, 30))}
    stream = _stream(tiny, "validation", own, 3)
    assert sum(len(task.test) for task in stream.tasks) == 12
    assert sum(len(task.train) for task in stream.tasks) == len(splits["train"])


def test_tasks_by_column_and_by_data_set(tiny, splits):
    grouped = {
        name: dataclasses.replace(part, groups=np.array(["odd", "even"] * (len(part) // 2), dtype=object))
        for name, part in splits.items()
    }
    text = tiny.replace("by: class", "by: column").replace("order: seed", "task_order: [even, odd]")
    assert [task.name for task in _stream(text, "standard", grouped, 3).tasks] == ["even", "odd"]
    recipe = parse_recipe(tiny.replace("by: class", "by: datasets"), file="tiny.yaml")
    chosen = recipe.settings["standard"]
    stream = build_stream(recipe, chosen, stream_of(recipe, chosen), [("a", splits), ("b", splits)], seed=3)
    assert [task.name for task in stream.tasks] == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes", "tasks"), [("clinc150-minilm", 150, 10), ("cifar100-vit-small", 100, 10)])
def test_packaged_recipes_read_the_shared_data(name, classes, tasks, shared, monkeypatch):
    monkeypatch.setenv("EVERLORA_SHARED", str(shared))
    recipe = load_recipe(name)
    splits, source = read_splits(recipe.data, recipe=name)
    assert source.text == f"shared: {recipe.data.shared}"
    setting = recipe.settings["standard"]
    stream = build_stream(recipe, setting, stream_of(recipe, setting), [(name, splits)], seed=1993)
    assert (len(stream.tasks), len(stream.class_names)) == (tasks, classes)
    assert {len(task.train) for task in stream.tasks} == {100 * classes // tasks}
