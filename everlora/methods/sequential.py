"""Plain fine-tuning, one LoRA trained on task after task without protection: the lower bound of every table.

The same class with other options gives two more reference rows: `joint` sees the rows of all tasks at once (the upper
bound), and `probe` leaves the encoder frozen and trains the heads only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from everlora.heads import HeadRows, TaskHeads
from everlora.lowrank import LowRankLinear, attach
from everlora.methods.base import (
    Batch,
    Collect,
    Encoder,
    Loss,
    Method,
    State,
    TaskInfo,
    aligner_of,
    check_classes,
    heads_state,
    keyed_generator,
    load_heads,
    realign,
    task_key,
)
from everlora.methods.registry import register

__all__ = ["Sequential", "SequentialOptions", "TunedEncoder"]


@dataclass(frozen=True)
class SequentialOptions:
    """Options of sequential fine-tuning.

    Attributes:
        rank: rank of the LoRA.
        targets: name patterns of the layers to adapt; None takes keys and values.
        train: `adapter` trains the LoRA, `all` the whole encoder, `head` nothing but the head.
        trains_on: `task` for one task after the other, `stream` for the rows of all tasks at once.
        loss: cross-entropy over the task's own classes (`local`) or over all `seen` classes.
        head_init: a new head's rows: `uniform` (official) or `zeros`, which makes heads of different tasks more alike.
        forward_mode: how an adapted layer computes.
        alignment: realign all heads after each task on features drawn from class Gaussians, as InfLoRA's "CA" does.
        alignment_epochs: passes over the drawn features.
        alignment_lr: learning rate of the alignment.
    """

    rank: Annotated[int, Field(ge=1)] = 10
    targets: tuple[str, ...] | None = None
    train: Literal["adapter", "all", "head"] = "adapter"
    trains_on: Literal["task", "stream"] = "task"
    loss: Literal["local", "seen"] = "local"
    head_init: Literal["uniform", "zeros"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"
    alignment: bool = False
    alignment_epochs: Annotated[int, Field(ge=1)] = 5
    alignment_lr: Annotated[float, Field(gt=0)] = 0.01


class TunedEncoder:
    """An encoder that is fine-tuned: one LoRA on its target layers, all of its own weights, or nothing."""

    def __init__(self, options: SequentialOptions, encoder: Encoder, seed: int) -> None:
        self.encoder = encoder
        self.layers: dict[str, LowRankLinear] = {}
        self._started = False
        self._options = options
        self._seed = seed
        if options.train == "adapter":
            targets = options.targets or encoder.default_targets
            self.layers = attach(encoder.model, targets, options.rank, forward_mode=options.forward_mode)

    def start(self) -> None:
        """Before the first task: draw the starting factors, or make the encoder trainable."""
        if self._started:
            return
        self._started = True
        for name, layer in self.layers.items():
            layer.start_block(self._options.rank, generator=keyed_generator(self._seed, name))
        if self._options.train == "all":
            self.encoder.model.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        if self._options.train == "all":
            return list(self.encoder.model.parameters())
        return [factor for layer in self.layers.values() for factor in (layer.down, layer.up)]

    def state(self) -> State:
        """The LoRA's factors, or the encoder's weights, as they are now."""
        if self._options.train == "all":
            return {f"encoder/{k}": v.detach().cpu().clone() for k, v in self.encoder.model.state_dict().items()}
        factors: State = {}
        for name, layer in self.layers.items():
            factors[f"adapter/{name}/down"] = layer.down.detach().cpu().clone()
            factors[f"adapter/{name}/up"] = layer.up.detach().cpu().clone()
        return factors

    def load(self, state: State) -> None:
        """Put back what `state` returned."""
        self.start()
        if self._options.train == "all":
            self.encoder.model.load_state_dict({k.removeprefix("encoder/"): v for k, v in state.items()})
        for name, layer in self.layers.items():
            layer.start_block(self._options.rank, down=state[f"adapter/{name}/down"])
            with torch.no_grad():
                layer.up.copy_(state[f"adapter/{name}/up"])


@register(
    "sequential",
    presets={"joint": {"trains_on": "stream"}, "probe": {"train": "head"}},
    aliases={"seq": "sequential", "head_only": "probe"},
    about={
        "joint": "All tasks' rows at once through one LoRA: the upper bound.",
        "probe": "A frozen encoder with heads trained task after task.",
    },
)
class Sequential(Method):
    """Train one LoRA (or everything, or only heads) on each task in turn, with one head per task."""

    options_type: ClassVar[type] = SequentialOptions

    def __init__(self, options: SequentialOptions, encoder: Encoder, *, seed: int) -> None:
        self.options = options
        self.encoder = encoder
        self.seed = seed
        self.trains_on = options.trains_on
        self.fixed_features = options.train == "head"
        self.heads = TaskHeads(encoder.feature_dim, options.head_init)
        self.tuned = TunedEncoder(options, encoder, seed)
        self.aligner = aligner_of(options)

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's head; the LoRA goes on from where it is."""
        check_classes(task, self.heads.classes, over=self.options.loss)
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))
        self.tuned.start()

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head."""
        return Loss(self.heads.loss(self._features(batch), batch.labels, self.options.loss))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the head, and realign all heads if asked for; the encoder stays as this task left it."""
        self.heads.freeze()
        realign(self.aligner, self.heads, task, collect, seed=self.seed)

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores from all heads, or from one task's head."""
        return self.heads.class_logits(self._features(batch), task)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is fine-tuned, and the new head."""
        return {"adapter": self.tuned.parameters(), "head": list(self.heads.heads[-1].parameters())}

    def layers(self) -> dict[str, LowRankLinear]:
        """The adapted layers, if any."""
        return self.tuned.layers

    def head_rows(self) -> HeadRows:
        """All heads as rows."""
        return self.heads.rows()

    def state(self) -> State:
        """Each task's head, and the fine-tuned weights as the newest task left them."""
        state = heads_state(self.heads, self.aligner)
        newest = len(self.heads.classes) - 1
        for key, value in self.tuned.state().items() if newest >= 0 else ():
            # factors are kept with every task, so that a learner can go back; a whole encoder only as it is now
            state[task_key(newest, key) if key.startswith("adapter/") else key] = value
        return state

    def load_state(self, state: State) -> None:
        """Put back the heads of all tasks and the newest weights."""
        count = load_heads(self.heads, self.aligner, state)
        if count:
            prefix = task_key(count - 1, "")
            newest = {k.removeprefix(prefix): v for k, v in state.items()}
            self.tuned.load({k: v for k, v in newest.items() if k.startswith(("adapter/", "encoder/"))})

    def _features(self, batch: Batch) -> Tensor:
        return self.encoder.features(batch.inputs) if batch.features is None else batch.features
