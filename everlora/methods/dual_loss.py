"""The loss of two adapters: cross-entropy of the one that is trained, and its distance from the one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor

from everlora.errors import UnsupportedError
from everlora.lowrank import AdaptedLayer, exchanged
from everlora.methods.base import Batch, Encoder, Loss, Recalled, Share
from everlora.methods.classifiers import Heads
from everlora.methods.consistency import (
    ConsistencyMode,
    ConsistencyRows,
    ConsistencyTokens,
    StepTokens,
    distance,
    numbered_layers,
)
from everlora.methods.rehearsal import IGNORED, described_alike, joined, stack_rows
from everlora.methods.stable import StableAdapter

__all__ = ["DualLoss", "DualOptions"]


class DualOptions(Protocol):
    """The options that say what is compared."""

    @property
    def consistency_weight(self) -> float:
        """Weight of the distance."""

    @property
    def selective_update(self) -> bool:
        """Whether the cross-entropies of both adapters are wanted."""

    @property
    def hidden_state_layers(self) -> tuple[int, ...] | Literal["all"] | None:
        """Layers whose hidden states are compared."""

    @property
    def consistency_mode(self) -> ConsistencyMode | None:
        """What counts as distance."""

    @property
    def consistency_rows(self) -> ConsistencyRows | None:
        """Rows whose hidden states are compared."""

    @property
    def consistency_tokens(self) -> ConsistencyTokens | None:
        """Tokens of these."""

    @property
    def ce_reduction(self) -> Literal["union_token", "mean_of_means"] | None:
        """How the cross-entropies of batch and memory become one."""


class DualLoss:
    """Cross-entropy of the trained adapter on a batch and its memory, and how far it has moved from a stable one.

    Args:
        options: see `DualOptions`.
        encoder: a causal language model.
        heads: its output layer.
        layers: the adapted layers.
        stable: the adapter beside the trained one.

    Attributes:
        recalled: rows of the memory for the step.
        cross_entropies: sums over the step's tokens so far, of the stable and of the trained adapter, `(2,)` float64,
            where the options ask for them.

    Raises:
        OptionError: a layer is out of range.

    Source: section 2 of the reference on I-LoRA.
    """

    def __init__(
        self,
        options: DualOptions,
        encoder: Encoder,
        heads: Heads,
        *,
        layers: dict[str, AdaptedLayer],
        stable: StableAdapter,
    ) -> None:
        self._options = options
        self._encoder = encoder
        self._heads = heads
        self._adapted = layers
        self._stable = stable
        self._numbers = numbered_layers(options.hidden_state_layers or (-1,), encoder.num_blocks)
        self.begin_step(None)

    def begin_step(self, count: Callable[[Recalled | None], StepTokens] | None) -> None:
        """Forget the step before.

        Args:
            count: gives the tokens of the whole step, when it is known what was recalled for it.
        """
        self._count = count
        self._step: StepTokens | None = None
        self.recalled: Recalled | None = None
        self.cross_entropies = torch.zeros(2, dtype=torch.float64)

    def __call__(self, batch: Batch, task: int) -> Loss:
        """Return the loss of a batch with its memory.

        Args:
            batch: rows of the newest task.
            task: number of the newest task; in the first one nothing is compared.
        """
        parts = joined(batch, task)
        labels = stack_rows([part.labels for part in parts], IGNORED)
        compares = self._compares(batch, task)
        # The stable pass first: a checkpointed block is computed again on the way back, as the model is then.
        numbers = self._numbers if compares else ()
        selective = self._options.selective_update
        targets = self._stable_states(batch, parts, labels, numbers) if compares or selective else []
        layers = [*numbers, self._encoder.num_blocks]
        *states, last = _stacked(self._encoder.hidden_states(part.inputs, layers) for part in parts)
        own = self._cross_entropy(batch, last, labels)
        if selective:
            self._note(1, last, labels)
        if not compares:
            return Loss(own)
        mode = self._options.consistency_mode or "mse"
        moved = distance([self._compared(s, batch) for s in states], targets, self._mask(batch, parts), mode)
        weight = self._options.consistency_weight * self._part(batch, parts)
        terms = {"cross_entropy": float(own.detach()), "consistency": float(moved.detach())}
        return Loss(own + weight * moved, terms)

    def _compares(self, batch: Batch, task: int) -> bool:
        has_rows = batch.memory is not None or self._options.consistency_rows != "memory"
        return task > 0 and self._options.consistency_weight > 0 and has_rows

    def _stable_states(
        self, batch: Batch, parts: list[Batch], labels: Tensor, numbers: tuple[int, ...]
    ) -> list[Tensor]:
        """Hidden states of the stable adapter, of the rows to compare; and its cross-entropy, where that is wanted."""
        selective = self._options.selective_update
        seen: Iterable[Batch] = parts
        if not selective and self._options.consistency_rows != "all":
            is_current = self._options.consistency_rows == "current"
            seen = [batch if is_current or batch.memory is None else described_alike(batch.memory, batch)]
        layers = [*numbers, *([self._encoder.num_blocks] if selective else [])]
        with torch.no_grad(), exchanged(self._adapted, self._stable.factors()):
            states = _stacked(self._encoder.hidden_states(part.inputs, layers) for part in seen)
        if not selective:
            return states
        self._note(0, states.pop(), labels)
        return [self._compared(s, batch) for s in states]

    def _compared(self, rows: Tensor, batch: Batch) -> Tensor:
        """Those of the rows of batch and memory that are compared, without the padding of the others."""
        chosen, count = self._options.consistency_rows, len(batch.labels)
        if chosen == "memory" and batch.memory is not None:
            return rows[count:, : batch.memory.labels.shape[1]]
        return rows[:count, : batch.labels.shape[1]] if chosen == "current" else rows

    def _mask(self, batch: Batch, parts: list[Batch], *, attended: bool = False) -> Tensor:
        """True for the tokens that are compared, or for all that are no padding."""
        tokens = "attended" if attended else self._options.consistency_tokens
        if tokens == "all":
            return torch.ones_like(self._compared(stack_rows([part.labels for part in parts]), batch)).bool()
        if tokens == "supervised":
            return self._compared(stack_rows([part.labels for part in parts], IGNORED), batch) != IGNORED
        masks = [self._encoder.token_mask(part.inputs) for part in parts]
        return self._compared(stack_rows([m for m in masks if m is not None]), batch)

    def _part(self, batch: Batch, parts: list[Batch]) -> float:
        """What a mean over the compared tokens of this piece of a step counts in the mean over the step."""
        share, rows = batch.share, self._options.consistency_rows or "memory"
        if share == Share():
            return 1.0
        if self._options.consistency_tokens == "all" and (rows == "memory" or "segments" not in batch.inputs):
            return self._tokens().part_of_rows(rows, len(self._mask(batch, parts))) / share.supervised
        supervised = self._options.consistency_tokens == "supervised"
        if rows == "memory" and not supervised:
            return share.memory / share.supervised
        mask = self._mask(batch, parts, attended=not supervised)
        return self._tokens().part(mask, rows, supervised=supervised) / share.supervised

    def _cross_entropy(self, batch: Batch, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over all labelled tokens, or half of the mean of either part."""
        separate = self._options.ce_reduction == "mean_of_means"
        if not separate or (batch.share == Share() and batch.memory is None):
            return self._heads.loss(features, labels)
        count, share = len(batch.labels), batch.share
        sides = {"current": slice(count), "memory": slice(count, None)}
        if batch.memory is None:
            del sides["memory"]
        means = {side: self._heads.loss(features[rows], labels[rows]) for side, rows in sides.items()}
        if share == Share():
            return torch.stack(list(means.values())).mean()
        tokens = self._tokens()
        if not tokens.count("memory", supervised=True):
            return means["current"]
        parts = {side: tokens.part(_predicted(labels[rows]), side, supervised=True) for side, rows in sides.items()}
        return torch.stack([means[side] * parts[side] for side in means]).sum() / (2 * share.supervised)

    def _tokens(self) -> StepTokens:
        """Tokens of the whole step.

        Raises:
            UnsupportedError: a piece of a step came before the step itself.
        """
        if self._step is None:
            if self._count is None:
                raise UnsupportedError("a piece of a step needs the step's rows; call before_step first.")
            self._step = self._count(self.recalled)
        return self._step

    def _note(self, place: int, features: Tensor, labels: Tensor) -> None:
        """Add a cross-entropy to the sums of the step."""
        with torch.no_grad():
            mean = self._heads.loss(features, labels)
        self.cross_entropies[place] += float(mean) * int(_predicted(labels).sum())


def _predicted(labels: Tensor) -> Tensor:
    """True for the labels that a token before them predicts."""
    return labels[:, 1:] != IGNORED


def _stacked(passes: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """Put the rows of all passes together, layer by layer."""
    return [stack_rows(layer) for layer in zip(*passes, strict=True)]
