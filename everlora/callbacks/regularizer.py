"""What the callback asks of a method that adds a penalty on the adapter's weights to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn

__all__ = ["Examples", "Regularizer"]

Examples = Iterable[Mapping[str, Any]]  # one row each, as the model takes it, with labels


class Regularizer(ABC):
    """A penalty on the trained adapter that stands for what earlier tasks need.

    `begin` is called as a task's training begins, `finish` after it; only `finish` changes what is carried on.
    """

    options_type: ClassVar[type]
    needs_examples: ClassVar[bool]

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def begin(self, model: PeftModel, *, resumed: bool) -> None:
        """Check that the model fits what earlier tasks left, and put in place what it needs; may be called again."""

    @abstractmethod
    def penalty(self, model: PeftModel) -> Tensor:
        """Return the penalty as it would be added to the loss, with a graph to the trained parameters."""

    @abstractmethod
    def gradients(self, model: PeftModel) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the gradient of the penalty for each trained parameter that has one."""

    @abstractmethod
    def finish(self, model: PeftModel, examples: Examples) -> None:
        """Take in the task that was just learned; calling it twice for one task counts the task once."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return what the next task needs as files, and adapters as PEFT folders."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return plain values that go with the files."""

    @abstractmethod
    def load(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put back what `record` and `files` returned."""
