"""Examples of earlier tasks, and the draws a training step makes from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from everlora.buffer import ReplayBuffer
from everlora.callbacks.tokens import Batch, TokenRows, checked_batch, collate_rows, collect_rows
from everlora.errors import OptionError, UnsupportedError
from everlora.methods.keys import keyed_generator

__all__ = ["TaskMemory"]

_CHUNK = 1024


class TaskMemory:
    """At most `size` tokenised examples; what is inserted and drawn depends on keys alone, never on other draws.

    Args:
        size: examples; 0 keeps none.
        policy: `reservoir`, or `balanced` over tasks.
        seed: part of each key.
        vocab_size: number of different tokens.
        pad_token_id: fills drawn rows up.
    """

    def __init__(
        self,
        size: int,
        *,
        policy: Literal["reservoir", "balanced"],
        seed: int,
        vocab_size: int,
        pad_token_id: int,
    ) -> None:
        self.size = size
        self.seed = seed
        self.vocab_size = vocab_size
        self.pad_token_id = pad_token_id
        self._buffer = ReplayBuffer(size, balanced=policy == "balanced") if size else None

    def __len__(self) -> int:
        return 0 if self._buffer is None else len(self._buffer)

    @property
    def nbytes(self) -> int:
        """Bytes that the kept examples take."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def num_seen(self) -> int:
        """How many examples went by."""
        return 0 if self._buffer is None else self._buffer.num_seen

    def draw(self, count: int, *, keys: tuple[object, ...], rank: int = 0, world: int = 1) -> Batch | None:
        """Draw distinct examples for one process; processes with the same keys share one draw.

        Args:
            count: how many for each process; fewer where the memory holds fewer.
            keys: what tells this draw from others.
            rank: this process.
            world: number of processes.

        Returns:
            The rows, padded on the right; None where there are none.
        """
        if self._buffer is None or not len(self._buffer):
            return None
        count = min(count, len(self._buffer) // world)
        if count < 1:
            return None
        rows, _, _ = self._buffer.draw(count * world, keyed_generator(self.seed, "replay", *keys))
        return collate_rows(rows.select(torch.arange(rank, count * world, world)), pad_token_id=self.pad_token_id)

    def check(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        """Refuse examples that cannot be kept, before anything is learned from them.

        Raises:
            DataError: the first has no labels.
            UnsupportedError: the data set is a stream, which has no rows to come back to, or see `checked_batch`.
        """
        if self._buffer is None:
            return
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UnsupportedError(
                "expected a training set of known length to keep examples of, found a stream; pass a Dataset, or set "
                "ilora_buffer_size=0"
            )
        if len(dataset):
            checked_batch(collate([dataset[0]]))

    def insert(self, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]], *, task: int) -> None:
        """Let each example of a task, for which `check` has nothing to say, go by once, in an order drawn by key."""
        if self._buffer is None:
            return
        order = torch.randperm(len(dataset), generator=keyed_generator(self.seed, "order", task))
        generator = keyed_generator(self.seed, "insert", task)
        for start in range(0, len(order), _CHUNK):
            part = order[start : start + _CHUNK].tolist()
            rows = collect_rows(dataset, part, collate, vocab_size=self.vocab_size)
            self._buffer.add(rows, torch.full((len(rows),), task), task, generator)

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors."""
        return {} if self._buffer is None else self._buffer.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned.

        Raises:
            OptionError: it holds more examples than this memory may.
        """
        found = len(state["labels"]) if state else 0
        if found > self.size:
            raise OptionError(
                f"expected ilora_buffer_size of at least {found}, the examples kept of earlier tasks, found {self.size}"
            )
        if self._buffer is not None and state:
            self._buffer.load_state(state)
            self._buffer.restore(TokenRows.of([], vocab_size=self.vocab_size))
