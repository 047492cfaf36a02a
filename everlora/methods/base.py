"""What a method is: a few hooks around one training loop, and its memory as plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from everlora.errors import UnsupportedError
from everlora.heads import HeadRows
from everlora.lowrank import AdaptedLayer
from everlora.methods.forgetting import TRAINED, Forgetting
from everlora.methods.resuming import Resumable

__all__ = [
    "ANY_MODALITY",
    "Batch",
    "Collect",
    "Encoder",
    "Loss",
    "Method",
    "Recalled",
    "Share",
    "State",
    "TaskInfo",
    "Together",
]

State = dict[str, Any]
"""Flat mapping name -> tensor or plain JSON value; names under `tasks/000/` are written once, with that task."""

ANY_MODALITY = frozenset({"image", "text", "language"})


class Encoder(Protocol):
    """What a method sees of a pretrained model (a `Backbone`)."""

    feature_dim: int
    model: nn.Module

    @property
    def output_head(self) -> nn.Module | None:
        """The output layer of a causal language model; None for an encoder, whose classifier a method adds."""

    def hidden_states(self, batch: dict[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Hidden states `(n, T, d)` float32 of a causal language model after some of its blocks, 0 for embeddings."""

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks of a causal language model, the largest number of `hidden_states`."""

    @property
    def num_parameters(self) -> int:
        """Number of pretrained parameters that the features depend on."""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Name patterns of the layers to adapt by default."""

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        """Name patterns of the projections of the attention with the given roles: `query`, `key`, `value`."""

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled features `(n, feature_dim)` float32; of a causal language model those of all tokens, `(n, T, d)`."""

    def token_mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """True for real tokens, `(n, tokens)`, or None when all are real."""


@dataclass(frozen=True)
class TaskInfo:
    """One task as a method sees it.

    Attributes:
        index: number of the task, from 0.
        name: its name.
        classes: class indices of its labels (indices are given in order of first appearance over all tasks).
        num_examples: training rows.
        steps: optimiser steps that it will be trained for.
        judged_apart: whether scores do not come from a loss over the task's classes alone, so that one class will do.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    num_examples: int
    steps: int = 0
    judged_apart: bool = False


@dataclass(frozen=True)
class Share:
    """What part of an optimiser step a batch is, where a step is computed in several pieces or processes.

    The training loop multiplies the loss of a piece, a mean over its supervised rows or tokens, by `supervised`. A term
    that is a mean over memory tokens must be multiplied by `memory / supervised`. The sum over the pieces is then what
    one large batch would give.

    Attributes:
        supervised: of the supervised rows or tokens, those of the batch and its memory together.
        memory: of the tokens, or rows, of the memory.
    """

    supervised: float = 1.0
    memory: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Rows of one task on the model's device.

    Attributes:
        inputs: keyword tensors of the encoder (may be empty when `features` is given).
        labels: `(n,)` class indices; for a causal language model `(n, T)` token ids, -100 where nothing is learned.
        features: `(n, d)` features computed beforehand, for a model that does not change.
        rows: `(n,)` row numbers within the task's data, as `Collect.rows` takes them; None outside of training.
        memory: rows of earlier tasks to be trained along with these, where `Method.recall` gave any.
        tasks: `(n,)` number of the task each row was learned with; only in a `memory`.
        share: see `Share`.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    features: Tensor | None = None
    rows: Tensor | None = None
    memory: Batch | None = None
    tasks: Tensor | None = None
    share: Share = Share()


@dataclass(frozen=True)
class Recalled:
    """Rows that a method kept of earlier tasks and wants to train on again.

    Attributes:
        encoded: rows as `Collect.rows` gave them out.
        labels: `(n,)` class indices.
        tasks: `(n,)` number of the task each row was learned with.
    """

    encoded: Any
    labels: Tensor
    tasks: Tensor


@dataclass(frozen=True)
class Loss:
    """What `Method.loss` returns: the scalar to minimise and its named parts, for the log."""

    value: Tensor
    terms: Mapping[str, float] = field(default_factory=dict)


class Together(Protocol):
    """Several processes that learn a task together; each must make the same calls in the same order."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes, the same bits in each."""

    def gather(self, state: Mapping[str, Any]) -> list[State]:
        """Tensors and plain JSON values by name, of each process, in their order."""


class _Alone:
    """One process."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, state: Mapping[str, Any]) -> list[State]:
        return [dict(state)]


class Collect(Protocol):
    """A pass over the current task's training rows, without gradients and in evaluation mode.

    Of several processes each visits some of the batches, each batch whole and in one process alone; the first batch is
    the first process's, and a process may get none. So what a method gathered is a part until it is put together, once,
    after the pass and in every process, whether or not it visited anything:

    - sums and counts, of any integer or float dtype, by `total = self.processes.sum(total)`. With one process that is
      the tensor itself, so nothing is added twice; sums that go on over several passes must add the total of each.
    - rows that are needed one by one (features, logits) by `everlora.methods.gathering.gather_rows`, which puts those
      of all processes together in the order of the pass, so that they are the very rows of one process.
    - what a single batch decides, such as shapes, by `self.processes.gather({...})[0]`, that of the first process.

    All processes go on with the same bits then. Nothing may be exchanged while a pass runs, as processes visit unequal
    numbers of batches; and `gathered` and `resume_gathering` speak of this process's part.
    """

    def __call__(
        self,
        visit: Callable[[Batch, Tensor], None] | None = None,
        *,
        stage: str,
        before: Callable[[Batch], None] | None = None,
        augment: bool = True,
        max_batches: int | None = None,
        validation: bool = False,
    ) -> int:
        """Run the encoder on every row and hand `(batch, features)` to `visit`.

        Args:
            visit: called once for each batch of this process; None when only forward hooks are of interest.
            stage: what the pass is for; names the progress bar and keys the augmentation.
            before: called with each batch before the encoder runs on it.
            augment: training augmentation (one draw a row) or the evaluation transform.
            max_batches: stop early.
            validation: pass over the rows kept for validation instead, never augmented; there may be none.

        Returns:
            The number of rows seen, by all processes.
        """

    def rows(self, numbers: Tensor | None = None) -> tuple[Any, Tensor]:
        """Return training rows as they were encoded, before augmentation, and their labels `(n,)`.

        Args:
            numbers: `(n,)` row numbers; None for all.
        """


class Method(Resumable, ABC):
    """A continual-learning method.

    Life of a task: `begin_task`; for every batch `loss`, backward, `after_backward`, optimiser step, `after_step`; then
    `end_task`. A method never reads files, loaders or clocks; passes over data come as `collect`.
    A class is final: variants are options.
    """

    options_type: ClassVar[type]
    encoder: Encoder
    trains_on: Literal["task", "stream"] = "task"
    """`"stream"`: wants the rows of all tasks at once, in a single task (an upper bound, not a continual method)."""
    fixed_features: bool = False
    """True when the encoder never changes, so that its features may be computed once and kept."""
    isolated: bool = False
    """True when each task has a network of its own: `logits` then needs `Batch.inputs`, and its answer with a given
    task is another than its answer without, restricted to that task's classes."""
    suits: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    """Modalities of the models it can train; `language` stands for causal language models."""
    variants: tuple[str, ...] = ()
    """Names of the weights that one may predict with, the usual ones first; empty where there is but one choice."""
    processes: Together = _Alone()
    """Those that learn the task together; the training loop puts them here. See `Collect` for what they are for."""
    counts_padding: bool = False
    """True where a loss looks at padding, too: rows of tokens are then padded alike in all pieces of a step."""
    settled: bool = True
    """False while the weights of a task are not yet of the kind that is kept, before pruning for instance: until then
    no epoch is remembered as the best."""

    @classmethod
    def training_defaults(cls, options: Any) -> Mapping[str, Any]:
        """Training options that the method wants other defaults for; what a user gives stands above them.

        Args:
            options: the method's options, validated.
        """
        return {}

    @abstractmethod
    def __init__(self, options: Any, encoder: Encoder, *, seed: int) -> None:
        """Attach what the method needs to `encoder.model`; nothing is trained before `begin_task`."""

    def adopt(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Start from the LoRA of another model, on a newly made method; kept with the state from the first task on.

        Args:
            factors: layer name to `(down, up)`, `(rank, in)` and `(out, rank)`, scaling included.

        Raises:
            UnsupportedError: the method has no use for it.
            TargetError: a layer that the method does not adapt.
            ShapeError: factors that do not fit their layer.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot start from an adapter; leave start_from out.")

    @abstractmethod
    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Prepare the parameters of a new task; may pass over its training rows."""

    def train_mode(self) -> None:
        """Put into training mode what the task trains beyond plain layers: batch norms whose statistics shall move.

        Called before each step; all else is in training mode by then, and batch norms move only if this hook says so.
        """

    def moves_statistics(self) -> bool:
        """Whether `train_mode` will let batch norms follow the rows, which must then see those of a step at once."""
        return False

    def before_step(self, rows: Tensor) -> None:
        """React to the beginning of a step over rows `(n,)` of the task, those of all pieces and processes."""

    def optimizer_state(self) -> State | None:
        """What the optimiser goes on from, given by `keep_optimizer`, empty at first; None: each task begins anew."""
        return None

    def keep_optimizer(self, state: State) -> None:
        """Keep, after a task's training, what `optimizer_state` is to return: tensors on the CPU by plain names."""

    def recall(self, count: int, generator: torch.Generator) -> Recalled | None:
        """Draw rows of earlier tasks to train along with a batch of `count` rows; None without such rows."""
        return None

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Return the training loss of a batch; changes nothing."""

    def after_backward(self) -> None:
        """Look at or change gradients, before the optimiser steps."""

    def after_step(self, stepped: bool) -> None:
        """React to an optimiser step, once after each; `stepped` is False for a step that was skipped."""

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """React to the end of an epoch, before it is validated; may change what is trained.

        Args:
            epoch: its number, from 0.
            epochs: how many the task is trained for.
        """

    @abstractmethod
    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Consolidate: freeze, fold, update memories; may pass over the training rows once more."""

    @abstractmethod
    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Score of every class seen so far, `(n, classes)` float32; with `task`, only that task's rows compete.

        Of a causal language model, scores `(n, T, vocabulary)` of the token after each.
        """

    def features(self, batch: Batch) -> Tensor:
        """Features of a batch, those given with it where there are any."""
        return self.encoder.features(batch.inputs) if batch.features is None else batch.features

    def predicting(self, variant: str | None = None) -> AbstractContextManager[None]:
        """Put the weights in place that predict, inside a `with` block.

        Args:
            variant: one of `variants`; None for the usual ones.
        """
        return nullcontext()

    @abstractmethod
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters of the current task by group; empty when nothing is.

        Groups: `"adapter"`, `"head"`, `"norm"` for scales, shifts and biases and `"magnitudes"` for scalars; the last
        two are never decayed.
        """

    @abstractmethod
    def state(self) -> State:
        """Everything remembered between tasks."""

    def newest_state(self) -> State:
        """As much of `state` as is written after a task: its own entries and what is carried on.

        Earlier tasks' entries may be in it. Leaving them out is for methods to which gathering them is dear.
        """
        return self.state()

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Restore what `state` returned, on a newly made method."""

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let rows, and statistics of whole classes, leave a state: this method's newest, an earlier one or a part.

        Nothing else of the method changes; it is made anew from the state. What cannot leave is said with
        `request.remains`.

        Returns:
            How much left, by kind; empty where the state holds nothing of the kind.
        """
        request.remains(TRAINED)
        return {}

    @abstractmethod
    def head_rows(self) -> HeadRows:
        """The classifier as plain rows, for export; of the active task where tasks have networks of their own."""

    def activate(self, task: int | None) -> None:
        """Put the network of a task in place, None for the pretrained one; nothing to do where all share one."""

    def own_modules(self) -> list[nn.Module]:
        """Modules among the method's attributes, such as heads, which must follow the encoder to its device."""
        encoder: object = self.encoder
        return [value for value in vars(self).values() if isinstance(value, nn.Module) and value is not encoder]

    def stored_parameters(self) -> int:
        """Count the parameters needed to predict on all tasks learned so far, the encoder's included.

        Running statistics, masks and prototypes are no parameters.
        Source: section 9 of the reference on convolutional networks.
        """
        head = self.head_rows()
        return self.adapted_parameters() + head.weight.numel() + head.bias.numel()

    def adapted_parameters(self) -> int:
        """Count those of the encoder with its adapters, a factor that layers share once."""
        layers = self.layers().values()
        added = {id(f): f for layer in layers for f in (layer.down, layer.up, layer.past_down, layer.past_up)}
        return self.encoder.num_parameters + sum(factor.numel() for factor in added.values())

    def layers(self) -> dict[str, AdaptedLayer]:
        """Adapted layers by qualified name; empty for a frozen encoder."""
        return {}

    def panels(self) -> dict[str, dict[str, float]]:
        """Figures worth a curve over tasks: panel -> name -> value after the newest task.

        Names are free, of layers for instance. Where every name of a panel says `task 3`, or `tasks 0 to 3`, counted
        from 0, the figures belong to those tasks, and reports set them against the task after which they were taken.
        """
        return {}

    def path(self, first: int, second: int, position: float, *, heads: int) -> AbstractContextManager[None]:
        """Let the weights be those on the straight line through the models after two tasks, inside a `with` block.

        Args:
            first: task whose model lies at position 0.
            second: task whose model lies at position 1.
            position: any number; outside of 0 to 1 the line goes on.
            heads: only the classes of that many tasks compete; `logits` returns no others.

        Raises:
            UnsupportedError: the method does not keep what earlier models were.
            DataError: one of the two models cannot be rebuilt.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot go back to the weights between two tasks.")

    def path_start(self, second: int, *, heads: int) -> AbstractContextManager[None] | None:
        """Let the model be the one that a task began from, where that is not the one evaluated before; else None.

        Args:
            second: the task.
            heads: as in `path`.
        """
        return None
