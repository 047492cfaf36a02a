"""A callback for the Hugging Face Trainer that adds a penalty for what earlier tasks need."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import TrainerCallback

from everlora.callbacks.adapters import refuse_sharded, trained_adapter
from everlora.callbacks.ewc import ElasticAdapter
from everlora.callbacks.fisher import single_rows
from everlora.callbacks.folders import read_record, write_folder
from everlora.callbacks.o_lora import OrthogonalAdapters
from everlora.callbacks.regularizer import Regularizer
from everlora.errors import OptionError, StoreError, nearest
from everlora.methods.registry import parse_options

__all__ = ["EverloraCallback"]

logger = logging.getLogger("everlora.callbacks")

_FORMAT = 1
_RECORD = "everlora.json"
_METHODS: Mapping[str, type[Regularizer]] = MappingProxyType({"ewc": ElasticAdapter, "o_lora": OrthogonalAdapters})


class EverloraCallback(TrainerCallback):  # type: ignore[misc]  # transformers comes without types
    """Brings a method that regularises the adapter to an existing script on a PEFT model.

    The gradient of the penalty is put in place as each optimiser step begins, before the first backward pass: what the
    Trainer then clips, logs as its norm and steps on is the gradient of loss plus penalty, once per step however many
    batches are accumulated. (When `on_pre_optimizer_step` runs, the Trainer has clipped already.)

    Args:
        method: `ewc` or `o_lora`.
        state: folder that `save` wrote after the task before; None for the first task.
        finish_at_end: call `finish` with the training's own data when the training ends; else the script does.
        seed: which examples `finish` takes.
        options: options of the method, see `ElasticOptions` and `OrthogonalOptions`.

    Raises:
        OptionError: no such method or option.
        StoreError: the folder is damaged, or was written by another method.
    """

    def __init__(
        self,
        method: str = "ewc",
        state: str | Path | None = None,
        *,
        finish_at_end: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        name = method.lower().replace("-", "_")
        if name not in _METHODS:
            raise OptionError(f"no callback for method '{method}'; {nearest(name, _METHODS)}")
        chosen = _METHODS[name]
        self.method = name
        self.finish_at_end = finish_at_end
        self.seed = seed
        self.num_tasks = 0
        self._earlier_tasks = 0
        self._added = False
        self._regularizer = chosen(parse_options(chosen.options_type, options, f"the callback for '{name}'"))
        if state is not None:
            self.load(state)

    @property
    def options(self) -> Any:
        """The method's options, validated."""
        return self._regularizer.options

    def penalty(self, model: Any) -> Tensor:
        """Return the penalty as it would be added to the loss: a scalar, for logs and checks."""
        return self._regularizer.penalty(model)

    def begin(self, model: Any, *, resumed: bool = False) -> None:
        """Check the model and put in place what the method needs; the Trainer's events call it.

        Raises:
            ModelError: not a PEFT model with one trained adapter.
            StoreError: the model does not fit what earlier tasks left.
        """
        trained_adapter(model)
        self._earlier_tasks = self.num_tasks
        self._regularizer.begin(model, resumed=resumed)

    def finish(self, model: Any, dataloader: Any = None) -> None:
        """Take in the task the model has learned; a second call for the same task replaces the first.

        Args:
            model: the PEFT model, trained.
            dataloader: loader of the task's training data, of which single rows are collated; methods that
                measure nothing do without.

        Raises:
            DataError: the method measures something, and there is no loader, or its rows have no labels.
        """
        needed = self._regularizer.needs_examples
        keys = (self.seed, self._earlier_tasks, "fisher")
        self._regularizer.finish(model, single_rows(dataloader, keys=keys) if needed else ())
        self.num_tasks = self._earlier_tasks + 1

    def save(self, folder: str | Path) -> None:
        """Write what the next task needs: safetensors, JSON and the sha256 of each file.

        With `o_lora`, `adapter/` in it is the sum of all tasks' adapters as one plain PEFT adapter.

        Raises:
            StoreError: no task is finished, or the folder holds something.
        """
        if not self.num_tasks:
            raise StoreError("expected a finished task to save, found none; train, or call finish(model, dataloader)")
        content = {"format": _FORMAT, "method": self.method, "num_tasks": self.num_tasks}
        record = {**content, "state": self._regularizer.record()}
        write_folder(Path(folder), self._regularizer.files(), (_RECORD, record))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            StoreError: the folder is damaged, newer, or was written by another method.
        """
        record, files = read_record(Path(folder), _RECORD)
        if record.get("format") != _FORMAT:
            raise StoreError(f"{folder}: expected format {_FORMAT}, found {record.get('format')!r}; update everlora")
        if record.get("method") != self.method:
            raise StoreError(f"{folder}: expected a state of '{self.method}', found one of '{record.get('method')}'")
        self._regularizer.load(record["state"], files)
        self.num_tasks = self._earlier_tasks = int(record["num_tasks"])

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare the model before the Trainer makes its optimiser and wraps the model."""
        self.begin(model, resumed=True)  # whether it starts where the task before ended is known as training begins

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare the model again: a checkpoint may have been loaded, or the callback added later."""
        refuse_sharded(args)
        self._added = False
        self.begin(model, resumed=state.global_step > 0)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start the step's gradients from the penalty's."""
        self._add(model, _loss_scale(optimizer))
        self._added = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the penalty's gradient now where a loop has not announced the step's beginning."""
        if not self._added:
            self._add(model, 1.0)
        self._added = False

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Take in the task."""
        if self.finish_at_end:
            self.finish(model, train_dataloader)

    def _add(self, model: Any, scale: float) -> None:
        with torch.no_grad():
            for parameter, gradient in self._regularizer.gradients(model):
                value = (gradient * scale if scale != 1.0 else gradient).to(parameter.dtype)
                parameter.grad = value if parameter.grad is None else parameter.grad.add_(value)


def _loss_scale(optimizer: Any) -> float:
    """What a float16 run multiplies the loss with, and divides the gradients by before it steps."""
    scaled = isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None
    return float(optimizer.scaler.get_scale()) if scaled else 1.0
