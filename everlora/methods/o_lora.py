"""O-LoRA: one adapter a task, with rows kept orthogonal to those of all earlier adapters (Wang et al., EMNLP 2023).

Each adapted layer gets a new branch `up @ down` per task; old ones are frozen and go on acting on every input. A
penalty keeps the rows of the new `down` away from the space that the rows of the old ones span. No old data and no task
identity are needed. The memory grows by one adapter a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from everlora.errors import UnsupportedError
from everlora.heads import HeadRows
from everlora.isolation import has_batch_norm
from everlora.lowrank import AdaptedLayer, LowRankLinear, attach, capped_ranks, find_targets
from everlora.lowrank.attach import require_one_group
from everlora.methods.base import ANY_MODALITY, Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.classifiers import check_classes, heads_state, load_heads, make_heads
from everlora.methods.keys import keyed_generator, task_key
from everlora.methods.registry import register

__all__ = ["OLora", "OLoraOptions", "overlap"]

_DROPOUT = 0.1


@dataclass(frozen=True)
class OLoraOptions:
    """Options of O-LoRA; the defaults are those of the public code for orders of four tasks.

    Attributes:
        lambda_1: weight of the overlap of the new adapter's rows with the old ones'.
        lambda_2: weight of the norms of the new factors.
        orth_norm: the overlap is the sum of absolute products of rows (`l1`, public code) or of their squares (`fro2`).
        rank: of each task's adapter.
        alpha: an adapter counts with `alpha / rank`, also in a layer too small for all of the rank.
        lora_dropout: share of the inputs of the new adapter that are dropped in training; None takes 0.1, and 0 where
            convolutions are adapted.
        targets: name patterns of the layers to adapt; None takes those of the model.
        loss: cross-entropy over the task's own classes (`local`) or over all `seen` classes; the same for a language
            model.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
        forward_mode: how an adapted layer computes.
    """

    lambda_1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    lambda_2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    orth_norm: Literal["l1", "fro2"] = "l1"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    targets: tuple[str, ...] | None = None
    loss: Literal["local", "seen"] = "local"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"


@register("o_lora", aliases={"olora": "o_lora"})
class OLora(Method):
    """O-LoRA (arXiv 2310.14152): section 10 of the reference on I-LoRA.

    Between tasks the layers hold nothing but frozen blocks.
    """

    options_type: ClassVar[type] = OLoraOptions
    suits = ANY_MODALITY

    def __init__(self, options: OLoraOptions, encoder: Encoder, *, seed: int) -> None:
        self.options, self.encoder, self.seed = options, encoder, seed
        self.heads = make_heads(encoder, options.head_init)
        targets = options.targets or encoder.default_targets
        names = find_targets(encoder.model, targets)
        self._ranks = dict.fromkeys(names, options.rank)
        if has_batch_norm(encoder.model):  # layers of a convolutional network differ too much for one rank
            self._ranks = capped_ranks(encoder.model, names, options.rank)
        self._layers = attach(encoder.model, targets, self._ranks, forward_mode=options.forward_mode)
        require_one_group(self._layers, "the space of its rows")
        dropout = _dropout(options, self._layers)
        for layer in self._layers.values():
            layer.scale, layer.dropout = options.alpha / options.rank, dropout
            layer.start_block(0)  # nothing is trained before the first task

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Start the task's adapter, which computes nothing yet, and its head."""
        check_classes(task, self.heads.classes, over=self.options.loss)
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))
        for name, layer in self._layers.items():
            layer.start_block(self._ranks[name], generator=keyed_generator(self.seed, task.index, name))

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head, the overlap with old adapters, and the size of the new one."""
        options, value = self.options, self.heads.loss(self.features(batch), batch.labels, self.options.loss)
        terms = {"cross_entropy": float(value.detach())}
        if options.lambda_1 and any(layer.total_rank for layer in self._layers.values()):
            shared = torch.stack([overlap(r.past_down, r.down, options.orth_norm) for r in self._layers.values()]).sum()
            terms["overlap"] = float(shared.detach())
            value = value + options.lambda_1 * shared
        if options.lambda_2:
            norms = [factor.norm() for layer in self._layers.values() for factor in (layer.down, layer.up)]
            value = value + options.lambda_2 * torch.stack(norms).sum()
        return Loss(value, terms)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the task's adapter and head; both go on acting."""
        for layer in self._layers.values():
            layer.fold_block()
        self.heads.freeze()

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores from all heads, or from one task's head."""
        return self.heads.class_logits(self.features(batch), task)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Both factors of the new adapter, and the new head."""
        factors = [factor for layer in self._layers.values() for factor in (layer.down, layer.up)]
        return {"adapter": factors, "head": self.heads.trained()}

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers."""
        return self._layers

    def head_rows(self) -> HeadRows:
        """All heads as rows."""
        return self.heads.rows()

    def panels(self) -> dict[str, dict[str, float]]:
        """How far the newest adapter's rows lie in the span of older ones': mean cosine of each with its nearest."""
        return {} if len(self.heads.classes) < 2 else {"row_overlap": {n: _cosine(r) for n, r in self._layers.items()}}

    def state(self) -> State:
        """Adapter and head of every task, written once."""
        state = heads_state(self.heads, None)
        for name, layer in self._layers.items():
            for index, block in enumerate(layer.blocks()):
                state[task_key(index, f"adapter/{name}/down")] = block.down.cpu()
                state[task_key(index, f"adapter/{name}/up")] = block.up.cpu()
        alphas = {name: self.options.alpha * rank / self.options.rank for name, rank in self._ranks.items()}
        for index in range(len(self.heads.classes)):
            state[task_key(index, "alphas")] = alphas
        return state

    def load_state(self, state: State) -> None:
        """Put back every task's adapter and head."""
        count = load_heads(self.heads, None, state)
        for name, layer in self._layers.items():
            keys = [task_key(index, f"adapter/{name}/") for index in range(count)]
            scales = [layer.scale] * count
            layer.load_past([state[key + "down"] for key in keys], [state[key + "up"] for key in keys], scales)


def overlap(old: Tensor, new: Tensor, norm: Literal["l1", "fro2"]) -> Tensor:
    """Size of the products of rows, `||A_old A_new^T||`: the sum of absolute values, or of squares.

    Args:
        old: `(R, in)`, constant.
        new: `(rank, in)`.
        norm: see above.
    """
    products = old @ new.T
    return products.abs().sum() if norm == "l1" else products.square().sum()


def _dropout(options: OLoraOptions, layers: dict[str, AdaptedLayer]) -> float:
    linear = all(isinstance(layer, LowRankLinear) for layer in layers.values())
    if options.lora_dropout and not linear:
        raise UnsupportedError("convolutions have no adapter dropout; set lora_dropout to 0 or leave it out.")
    return (_DROPOUT if linear else 0.0) if options.lora_dropout is None else options.lora_dropout


def _cosine(layer: AdaptedLayer) -> float:
    """Mean over the newest block's rows of the largest cosine, in absolute value, with an older row."""
    rows = nn.functional.normalize(layer.past_down, dim=1)
    newest = int(layer.past_ranks[-1])
    return float((rows[-newest:] @ rows[:-newest].T).abs().amax(dim=1).mean())
