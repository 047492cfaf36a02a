from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.streams import Examples, by_class, by_column, by_datasets, class_order, load_splits

NAMES = tuple(f"class {index}" for index in range(7))


def split(per_class: int, *, names: tuple[str, ...] = NAMES, groups: tuple[str, ...] | None = None) -> Examples:
    labels = np.array([name for _ in range(per_class) for name in names], dtype=object)
    count = len(labels)
    return Examples(
        "text",
        tuple(f"{label} {index}" for index, label in enumerate(labels)),
        labels,
        np.arange(count),
        groups=None if groups is None else np.array([groups[i % len(groups)] for i in range(count)], dtype=object),
        class_names=names,
    )


def test_by_class_sizes_order_and_partition() -> None:
    stream = by_class(
        {"train": split(4), "test": split(2), "validation": split(1)}, name="toy", initial=3, increment=2, seed=1993
    )
    assert [len(task.labels) for task in stream.tasks] == [3, 2, 2]
    assert stream.order == tuple(NAMES[index] for index in class_order(7, 1993))
    assert sum((task.labels for task in stream.tasks), ()) == stream.order
    assert sorted(np.concatenate([task.train.ids for task in stream.tasks])) == list(range(28))
    for task in stream.tasks:
        assert set(task.train.classes) == set(task.labels)
        assert task.test is not None
        assert task.validation is not None
        assert set(task.test.classes) == set(task.labels) == set(task.validation.classes)
        assert (len(task.test), len(task.validation)) == (2 * len(task.labels), len(task.labels))


def test_a_smaller_last_task_and_natural_order() -> None:
    stream = by_class({"train": split(1)}, name="toy", initial=4, increment=2, seed=None)
    assert [len(task.labels) for task in stream.tasks] == [4, 2, 1]
    assert stream.order == NAMES
    assert stream.tasks[0].test is None
    assert len(by_class({"train": split(1)}, name="toy", initial=7, increment=1, seed=0)) == 1


def test_subsample_is_per_class_and_split() -> None:
    stream = by_class(
        {"train": split(6), "test": split(5)},
        name="toy",
        initial=2,
        increment=2,
        seed=0,
        subsample={"train": 3, "test": None},
        subsample_seed=5,
    )
    assert stream.describe()["train_sizes"] == [6, 6, 6, 3]
    assert stream.describe()["test_sizes"] == [10, 10, 10, 5]
    assert stream.describe()["subsample"] == {"train": 3, "test": None}


def test_description_is_plain_json_and_the_hash_is_of_the_order() -> None:
    def stream(seed: int | None, increment: int = 2) -> dict[str, object]:
        made = by_class({"train": split(1)}, name="toy", initial=2, increment=increment, seed=seed)
        return json.loads(json.dumps(made.describe(), allow_nan=False))

    assert stream(0)["order_hash"] == stream(0, increment=3)["order_hash"]
    assert stream(0)["order_hash"] != stream(1)["order_hash"]
    assert stream(0)["order_ids"] == class_order(7, 0).tolist()
    assert stream(0)["id"] == f"toy/class_incremental/tasks=4/2-2-2-1/{str(stream(0)['order_hash'])[:12]}"
    assert stream(0)["order_seed"] == 0


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({"test": split(1)}, {}, "needs a train split"),
        ({"train": split(1), "tset": split(1)}, {}, "'test'"),
        ({"train": split(1)}, {"initial": 8}, "1 to 7"),
        ({"train": split(1)}, {"increment": 0}, "increment from 1"),
        ({"train": split(1, names=NAMES[:5]), "test": split(1)}, {}, "never in training"),
        ({"train": split(1), "test": split(1, names=NAMES[:5])}, {}, "none in the test split"),
        ({"train": dataclasses.replace(split(1), class_names=("ghost", *NAMES))}, {}, "'ghost' is listed"),
        ({"train": dataclasses.replace(split(1), labels=None)}, {}, "no labels"),
        ({"train": split(1), "test": split(1).select([])}, {}, "test split is empty"),
    ],
)
def test_by_class_refuses(splits: dict[str, Examples], options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        by_class(splits, name="toy", seed=0, **{"initial": 2, "increment": 2, **options})


def test_by_column() -> None:
    splits = {"train": split(4, groups=("rain", "sun", "fog")), "test": split(3, groups=("rain", "sun", "fog"))}
    stream = by_column(splits, name="weather")
    assert [task.name for task in stream.tasks] == ["fog", "rain", "sun"]
    assert stream.scenario == "domain_incremental"
    assert set(NAMES) == set(stream.tasks[0].labels)
    for task in stream.tasks:
        assert set(task.train.groups.tolist()) == {task.name}  # type: ignore[union-attr]
        assert set(task.test.groups.tolist()) == {task.name}  # type: ignore[union-attr]
    assert [task.name for task in by_column(splits, name="w", order=["sun", "fog"]).tasks] == ["sun", "fog"]
    seeded = by_column(splits, name="w", seed=1)
    assert seeded.order == tuple(("fog", "rain", "sun")[index] for index in class_order(3, 1))


def test_by_column_refuses() -> None:
    splits = {"train": split(4, groups=("rain", "sun"))}
    with pytest.raises(DataError, match="--task-column"):
        by_column({"train": split(1)}, name="w")
    with pytest.raises(DataError, match="did you mean 'rain'"):
        by_column(splits, name="w", order=["rains"])
    with pytest.raises(DataError, match="not both"):
        by_column(splits, name="w", order=["rain"], seed=1)
    with pytest.raises(DataError, match="each task once"):
        by_column(splits, name="w", order=["rain", "rain"])
    with pytest.raises(DataError, match="task 'sun' has training rows but none in the test split"):
        by_column({**splits, "test": split(1, groups=("rain",))}, name="w")


def test_by_datasets() -> None:
    first, second = {"train": split(2), "test": split(1)}, {"train": split(1, names=("x", "class 0"))}
    stream = by_datasets([("one", first), ("two", second)], name="both", scenario="task_incremental")
    assert stream.class_names == (*NAMES, "x")
    assert [task.labels for task in stream.tasks] == [NAMES, ("x", "class 0")]
    ids = np.concatenate([task.train.ids for task in stream.tasks])
    assert len(np.unique(ids)) == len(ids)
    assert stream.order == ("one", "two")
    with pytest.raises(DataError, match="'one' twice"):
        by_datasets([("one", first), ("one", second)], name="both", scenario="task_incremental")
    with pytest.raises(DataError, match="no data sets"):
        by_datasets([], name="both", scenario="task_incremental")
    digits = load_splits("sklearn:digits")
    with pytest.raises(DataError, match="'two' holds images beside texts"):
        by_datasets([("one", first), ("two", digits)], name="both", scenario="task_incremental")


@pytest.mark.slow
def test_clinc150_in_fifteen_tasks_and_by_domain(shared: Path) -> None:
    splits = load_splits(shared / "data" / "clinc150")
    stream = by_class(splits, name="clinc150", initial=10, increment=10, seed=1993)
    assert stream.describe()["sizes"] == [10] * 15
    assert stream.describe()["train_sizes"] == [1000] * 15
    assert stream.describe()["test_sizes"] == [300] * 15
    domains = by_column(splits, name="clinc150")
    assert [task.name for task in domains.tasks] == [
        "auto_and_commute",
        "banking",
        "credit_cards",
        "home",
        "kitchen_and_dining",
        "meta",
        "small_talk",
        "travel",
        "utility",
        "work",
    ]
    assert domains.describe()["sizes"] == [15] * 10


@pytest.mark.slow
def test_cifar100_starts_with_the_published_classes(shared: Path, tmp_path: Path) -> None:
    splits = load_splits(shared / "data" / "cifar100", cache=tmp_path)
    stream = by_class(splits, name="cifar100", initial=10, increment=10, seed=1993)
    assert stream.describe()["order_ids"][:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    # Number 68 of the alphabetical list of fine labels is "road".
    assert stream.order[0] == "road"
    assert stream.describe()["train_sizes"] == [5000] * 10
    assert isinstance(splits["train"].inputs, np.memmap)
    assert not list(tmp_path.rglob("*.tmp"))
    again = load_splits(shared / "data" / "cifar100", cache=tmp_path)
    assert again["train"].fingerprint == splits["train"].fingerprint
