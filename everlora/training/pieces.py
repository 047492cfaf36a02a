"""The pieces in which an optimiser step is computed, over micro-batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones import Backbone
from everlora.backbones.batches import IGNORED
from everlora.methods.base import Batch, Recalled, Share
from everlora.training.data import TaskData

if TYPE_CHECKING:
    from everlora.training.loop import TaskTrainer

__all__ = ["Piece", "own_pieces", "piece_batch", "split_step"]


@dataclass(frozen=True)
class Piece:
    """A part of a step, computed in one go.

    Attributes:
        number: of the piece, from 0.
        rows: `(n,)` row numbers of the task, at least one.
        memory: `(m,)` row numbers among those that were recalled for the step, possibly none.
        share: see `Share`.
    """

    number: int
    rows: Tensor
    memory: Tensor
    share: Share


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
    return [Piece(number, now, before, Share(*share)) for number, (now, before, share) in enumerate(parts)]


def own_pieces(pieces: list[Piece], rank: int, size: int) -> list[Piece]:
    """The pieces that one of several processes computes: neighbours, and none where there are too few."""
    mine = np.array_split(np.arange(len(pieces)), size)[rank]
    return [pieces[int(number)] for number in mine]


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
    if recalled is None or not len(piece.memory):
        return replace(batch, share=piece.share)
    inputs = trainer.inputs(recalled.encoded, piece.memory, draws)
    device = batch.labels.device
    labels = inputs.pop("labels", recalled.labels[piece.memory]).to(device)
    memory = Batch(inputs, labels, tasks=recalled.tasks[piece.memory].to(device))
    return replace(batch, memory=memory, share=piece.share)


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
