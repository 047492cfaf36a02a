"""The pieces in which an optimiser step is computed, over micro-batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from everlora.backbones import Backbone
from everlora.backbones.batches import IGNORED, width_of
from everlora.errors import UnsupportedError
from everlora.methods.base import Batch, Recalled, Share
from everlora.training.data import TaskData

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Piece", "own_pieces", "piece_batch", "require_whole_steps", "split_step"]


@dataclass(frozen=True)
class Piece:
    """A part of a step, computed in one go.

    Attributes:
        number: of the piece, from 0.
        rows: `(n,)` row numbers of the task, at least one.
        memory: `(m,)` row numbers among those that were recalled for the step, possibly none.
        share: see `Share`.
        widths: tokens of the longest row of the step and of its memory, for a language model.
    """

    number: int
    rows: Tensor
    memory: Tensor
    share: Share
    widths: tuple[int, int] = (0, 0)


def split_step(backbone: Backbone, encoded: Any, rows: Tensor, recalled: Recalled | None, count: int) -> list[Piece]:
    """Split a step in pieces of nearly equal numbers of rows.

    Args:
        backbone: tells what of a row is supervised.
        encoded: rows of the task, as the backbone encoded them.
        rows: `(n,)` row numbers of the step, at least one.
        recalled: rows of earlier tasks that the step trains along.
        count: how many pieces, fewer where there are not as many rows.
    """
    kept = torch.arange(0 if recalled is None else len(recalled.labels))
    count = min(count, len(rows))
    if count == 1:
        return [Piece(0, rows, kept, Share())]
    labelled, _ = _units(backbone, encoded, rows)
    again, attended = _units(backbone, None if recalled is None else recalled.encoded, kept)
    supervised = _sums(labelled, count) + _sums(again, count)
    memory = _sums(attended, count)
    shares = zip((supervised / supervised.sum()).tolist(), (memory / memory.sum().clamp(min=1)).tolist(), strict=True)
    parts = zip(rows.tensor_split(count), kept.tensor_split(count), shares, strict=True)
    widths = (0, 0)
    if backbone.modality == "language":
        widths = (_longest(encoded, rows), 0 if recalled is None else _longest(recalled.encoded, kept))
    return [Piece(number, now, before, Share(*share), widths) for number, (now, before, share) in enumerate(parts)]


def own_pieces(pieces: list[Piece], rank: int, size: int) -> list[Piece]:
    """The pieces that one of several processes computes: neighbours, and none where there are too few."""
    mine = np.array_split(np.arange(len(pieces)), size)[rank]
    return [pieces[int(number)] for number in mine]


def require_whole_steps(processes: int, micro_batches: int) -> None:
    """Refuse to split the steps of a network whose batch norms follow the rows.

    Raises:
        UnsupportedError: there are several processes or micro-batches.
    """
    if processes * micro_batches > 1:
        raise UnsupportedError(
            "batch norms whose statistics move must see all rows of a step at once, found "
            f"{processes} processes with {micro_batches} micro-batches; use one of each, or options of the method that "
            "keep the statistics."
        )


def piece_batch(
    trainer: TaskTrainer,
    data: TaskData,
    piece: Piece,
    recalled: Recalled | None,
    *,
    epoch: int,
    cached: Tensor | None,
    draws: int,
) -> Batch:
    """The rows of a piece, and with them its rows of earlier tasks, which are augmented like the others.

    Args:
        trainer: makes batches.
        data: rows of the task.
        piece: of a step.
        recalled: rows of earlier tasks that the step trains along.
        epoch: key of the augmentation of the task's rows.
        cached: features of all rows of the task, where the encoder never changes.
        draws: key of the augmentation of the earlier rows.
    """
    batch = trainer.batch(data, piece.rows, epoch=epoch, cached=cached, pack=trainer.options.packing)
    alike = trainer.method.counts_padding
    if alike and not trainer.options.packing:
        batch = _widened(trainer, batch, piece.widths[0])
    if recalled is None or not len(piece.memory):
        return replace(batch, share=piece.share)
    inputs = trainer.inputs(recalled.encoded, piece.memory, draws)
    device = batch.labels.device
    labels = inputs.pop("labels", recalled.labels[piece.memory]).to(device)
    memory = Batch(inputs, labels, tasks=recalled.tasks[piece.memory].to(device))
    if alike:
        memory = _widened(trainer, memory, piece.widths[1])
    return replace(batch, memory=memory, share=piece.share)


def _longest(encoded: Any, rows: Tensor) -> int:
    return int(torch.as_tensor(encoded.lengths)[rows].max()) if len(rows) else 0


def _widened(trainer: TaskTrainer, batch: Batch, longest: int) -> Batch:
    """Pad rows of tokens as the whole step would be padded."""
    inputs: Any = trainer.backbone.inputs
    missing = width_of(longest, inputs.max_length, trainer.device) - batch.labels.shape[1]
    if missing <= 0:
        return batch
    wide = {
        k: functional.pad(v, (0, missing), value=inputs.pad if k == "input_ids" else 0) for k, v in batch.inputs.items()
    }
    return replace(batch, inputs=wide, labels=functional.pad(batch.labels, (0, missing), value=IGNORED))


def _units(backbone: Backbone, encoded: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What of each row is supervised and what attended, `(n,)`: of a language model its tokens, else the row itself."""
    if backbone.modality != "language" or not len(rows):
        return torch.ones(len(rows)), torch.ones(len(rows))
    batch = backbone.collate(encoded, rows)
    labelled = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    return labelled.cpu(), batch["attention_mask"].sum(dim=1).cpu()


def _sums(values: Tensor, count: int) -> Tensor:
    """Sums over the parts that `Tensor.tensor_split` makes, `(count,)` float64."""
    return torch.stack([part.double().sum() for part in values.tensor_split(count)])
