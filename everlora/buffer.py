"""Rows kept of earlier tasks, to train on again: a fixed number of them, chosen at random from all that went by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from everlora.errors import OptionError, ShapeError

__all__ = ["ReplayBuffer", "Rows"]

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Rows(Protocol):
    """What the buffer asks of encoded rows, whatever their modality."""

    def __len__(self) -> int:
        """Number of rows."""

    def select(self, rows: Tensor, /) -> Self:
        """Return the given rows, in the given order."""

    def join(self, other: Self, /) -> Self:
        """Return these rows and then the other's."""

    def arrays(self) -> Arrays:
        """Return the rows as named arrays."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]], /) -> Self:
        """Make rows of what `arrays` returned."""


class ReplayBuffer:
    """At most `size` rows, as they were before any augmentation, with their labels and the tasks they came with.

    Reservoir: each of the n rows that went by is kept with probability `size / n` (Vitter, 1985). Balanced: when the
    buffer is full, a row of a class that has not lost any takes the place of one of the largest class, and each class
    keeps a reservoir of its own (class-balancing reservoir sampling, Chrysakis and Moens, 2020).

    Attributes:
        size: how many rows it holds at most.
        balanced: see above.
        labels: `(n,)` class index of each row.
        tasks: `(n,)` number of the task each row was learned with.
        buffer_filter: asked for each row before it goes by, as rows of length one; a row that it turns away is neither
            kept nor counted. None takes all. To be set again on a buffer that was loaded.

    Two buffers are equal when they hold the same rows in the same places and counted the same ones.

    Source: section 7.2 of the reference on convolutional networks.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, size: int, *, balanced: bool = False) -> None:
        if size < 1:
            raise OptionError(f"the buffer's size must be 1 row or more, got {size}")
        self.size = size
        self.balanced = balanced
        self.labels = torch.empty(0, dtype=torch.long)
        self.tasks = torch.empty(0, dtype=torch.long)
        self.buffer_filter: Callable[[Any], bool] | None = None
        self._rows: Rows | None = None
        self._stored: Arrays = {}  # the rows as loaded, until it is known what makes rows of them
        self._seen: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ReplayBuffer):
            return NotImplemented
        mine, theirs = self.state(), other.state()
        same = (self.size, self.balanced) == (other.size, other.balanced) and mine.keys() == theirs.keys()
        return same and all(torch.equal(value, theirs[name]) for name, value in mine.items())

    @property
    def num_seen(self) -> int:
        """How many rows went by, kept or not."""
        return sum(self._seen.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the kept rows take, labels and task numbers included."""
        arrays = [*self._arrays().values(), self.labels.numpy(), self.tasks.numpy()]
        return sum(array.nbytes for array in arrays)

    def add(self, rows: Rows, labels: Tensor, task: int, generator: torch.Generator) -> None:
        """Let rows go by, one after the other; each is kept or not.

        Args:
            rows: encoded, not augmented.
            labels: `(n,)` class indices.
            task: number of the task they belong to.
            generator: decides; on the CPU.

        Raises:
            ShapeError: there are not as many labels as rows.
        """
        if len(labels) != len(rows):
            raise ShapeError(f"expected one label for each of {len(rows)} rows, found {len(labels)}; pass both alike")
        self.restore(rows)
        if self.buffer_filter is not None:
            passed = torch.tensor([self.buffer_filter(row) for row in _one_by_one(rows)], dtype=torch.bool).nonzero()
            rows, labels = rows.select(passed[:, 0]), labels[passed[:, 0]]
        old = len(self)
        source = list(range(old))  # where the row of each slot comes from: kept rows first, then the new ones
        classes: list[int] = self.labels.tolist()
        held = Counter(classes)
        for number, label in enumerate(labels.tolist()):
            slot = self._choose(label, classes, held, generator)
            self._seen[label] += 1
            if slot is not None:
                held.subtract(classes[slot : slot + 1])
                held[label] += 1
                source[slot : slot + 1] = [old + number]
                classes[slot : slot + 1] = [label]
        if any(place >= old for place in source):
            chosen = torch.tensor(source)
            self._rows = rows.select(chosen) if self._rows is None else self._rows.join(rows).select(chosen)
            self.labels = torch.tensor(classes)
            self.tasks = torch.cat([self.tasks, torch.full((len(labels),), task)])[chosen]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Any, Tensor, Tensor]:
        """Draw rows without replacement, fewer where the buffer holds fewer.

        Args:
            count: how many.
            generator: decides; on the CPU.

        Returns:
            The rows, their labels `(m,)` and task numbers `(m,)`.

        Raises:
            ShapeError: there are no rows, or it is not known yet what makes rows of loaded ones (see `restore`).
        """
        if self._rows is None:
            raise ShapeError(f"expected rows to draw from, found {len(self)} that were not restored; add some first")
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return self._rows.select(chosen), self.labels[chosen], self.tasks[chosen]

    def forget(self, predicate: Callable[[Any, int], bool]) -> int:
        """Let rows go for good; the places that become free are taken by the next rows that go by.

        Args:
            predicate: called with each row, as rows of length one, and its place; True for a row that is to go.

        Returns:
            How many rows went.

        Raises:
            ShapeError: it is not known yet what makes rows of loaded ones (see `restore`).
        """
        if self._rows is None:
            if len(self):
                raise ShapeError(f"expected rows to look at, found {len(self)} that were not restored; restore them")
            return 0
        kept = [place for place, row in enumerate(_one_by_one(self._rows)) if not predicate(row, place)]
        gone = len(self) - len(kept)
        if gone:
            chosen = torch.tensor(kept, dtype=torch.long)
            self._rows, self.labels, self.tasks = self._rows.select(chosen), self.labels[chosen], self.tasks[chosen]
        return gone

    def restore(self, like: Rows) -> None:
        """Make rows of those that `load_state` put back; `like` is any rows of the same kind, possibly none."""
        if self._stored:
            self._rows, self._stored = like.from_arrays(self._stored), {}

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors: images stay uint8, texts one flat array of token ids."""
        rows = {f"rows/{name}": torch.from_numpy(np.ascontiguousarray(a)) for name, a in self._arrays().items()}
        seen = torch.tensor(sorted(self._seen.items()), dtype=torch.long).reshape(-1, 2)
        return {"labels": self.labels, "tasks": self.tasks, "seen": seen, **rows}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned; before the first draw, `restore` or `add` must say what rows are made of."""
        self.labels, self.tasks = state["labels"], state["tasks"]
        self._seen = Counter(dict(state["seen"].tolist()))
        self._rows = None
        self._stored = {k.removeprefix("rows/"): v.numpy() for k, v in state.items() if k.startswith("rows/")}

    def _arrays(self) -> Arrays:
        return self._stored if self._rows is None else self._rows.arrays()

    def _choose(self, label: int, classes: list[int], held: Counter[int], generator: torch.Generator) -> int | None:
        """Choose the slot for a row that was not counted yet, the first free one or a taken one; None turns it away."""
        if len(classes) < self.size:
            return len(classes)
        if not self.balanced:
            number = _integer(self.num_seen, generator)
            return number if number < self.size else None
        most = max(held.values())
        seen = self._seen[label]
        if held[label] == most or held[label] < seen:
            number = _integer(seen, generator)
            return _places(label, classes)[number] if number < held[label] else None
        largest = sorted(name for name, count in held.items() if count == most)
        places = _places(largest[_integer(len(largest) - 1, generator)], classes)
        return places[_integer(len(places) - 1, generator)]


def _one_by_one(rows: Rows) -> Iterator[Rows]:
    for place in range(len(rows)):
        yield rows.select(torch.tensor([place]))


def _integer(last: int, generator: torch.Generator) -> int:
    """Draw from 0 to `last`, both included."""
    return int(torch.randint(last + 1, (), generator=generator))


def _places(label: int, classes: list[int]) -> list[int]:
    return [place for place, other in enumerate(classes) if other == label]
