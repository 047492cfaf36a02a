"""Methods that fine-tune one encoder for all tasks: what of it is trained, and the hooks they have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everlora.errors import UnsupportedError
from everlora.heads import Aligner, HeadRows
from everlora.isolation import has_batch_norm, set_statistics_moving
from everlora.lowrank import AdaptedLayer, attach, capped_ranks, find_targets
from everlora.methods.base import ANY_MODALITY, Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.classifiers import check_classes, heads_state, load_head, load_heads, make_heads
from everlora.methods.forgetting import Forgetting, forget_gaussians
from everlora.methods.keys import keyed_generator, task_key, tasks_in

__all__ = ["BatchNorms", "Trained", "TunedEncoder", "TunedMethod", "TunedOptions"]

Trained: TypeAlias = Literal["auto", "adapter", "all", "head"]
"""What of the encoder is trained: one LoRA, all of its weights, or nothing but the head. `auto` takes `all` for
networks with batch norms, `adapter` for others."""
BatchNorms: TypeAlias = Literal["shared", "affine_only", "frozen_eval"]
"""What of the batch norms is trained along with all weights: `shared` scale, shift and statistics; `affine_only` scale
and shift over the pretrained statistics; `frozen_eval` nothing. All tasks share what is trained."""


class TunedOptions(Protocol):
    """Options that every method with one fine-tuned encoder has."""

    @property
    def rank(self) -> int:
        """Rank of the LoRA."""

    @property
    def alpha(self) -> float | None:
        """The LoRA counts with alpha over rank; None for 1."""

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Name patterns of the layers to adapt; None takes the encoder's own."""

    @property
    def train(self) -> Trained:
        """See `Trained`."""

    @property
    def bn(self) -> BatchNorms:
        """See `BatchNorms`."""

    @property
    def loss(self) -> Literal["local", "seen"]:
        """Cross-entropy over the task's own classes or over all classes seen so far."""

    @property
    def head_init(self) -> Literal["uniform", "zeros"]:
        """How a new head starts."""

    @property
    def forward_mode(self) -> Literal["auto", "folded", "factored"]:
        """How an adapted layer computes."""


class TunedEncoder:
    """An encoder that is fine-tuned: one LoRA on its target layers, all of its own weights, or nothing.

    Attributes:
        encoder: the encoder.
        layers: the adapted layers by qualified name.
        train: what is trained, `auto` resolved.
        bn: what of batch norms is trained.
    """

    def __init__(self, options: TunedOptions, encoder: Encoder, seed: int) -> None:
        self.encoder = encoder
        self.layers: dict[str, AdaptedLayer] = {}
        self.bn = options.bn
        self.train = options.train
        if options.train == "auto":
            self.train = "all" if has_batch_norm(encoder.model) else "adapter"
        self._started = False
        self._seed = seed
        if self.train == "adapter":
            targets = options.targets or encoder.default_targets
            rank: int | dict[str, int] = options.rank
            if has_batch_norm(encoder.model):  # layers of a convolutional network differ too much for one rank
                rank = capped_ranks(encoder.model, find_targets(encoder.model, targets), options.rank)
            self.layers = attach(encoder.model, targets, rank, forward_mode=options.forward_mode)
            for layer in self.layers.values():
                layer.scale = 1.0 if options.alpha is None else options.alpha / options.rank
        elif self.train == "head" and encoder.output_head is not None:
            raise UnsupportedError("a language model has no head of its own to train; use train=adapter or train=all.")

    def start(self) -> None:
        """Before the first task: draw the starting factors, or make the encoder trainable."""
        if self._started:
            return
        self._started = True
        for name, layer in self.layers.items():
            layer.start_block(layer.rank, generator=keyed_generator(self._seed, name))
        if self.train == "all":
            self.encoder.model.requires_grad_(True)
            for norm in self._frozen_norms():
                norm.requires_grad_(False)

    def train_mode(self) -> None:
        """Let the statistics of batch norms follow the data, where they are trained."""
        if self.train == "all" and self.bn == "shared":
            set_statistics_moving([self.encoder.model])

    def moves_statistics(self) -> bool:
        """Whether `train_mode` sets any batch norm moving."""
        return self.train == "all" and self.bn == "shared" and has_batch_norm(self.encoder.model)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by a name that stays."""
        if self.train == "all":
            return {name: p for name, p in self.encoder.model.named_parameters() if p.requires_grad}
        sides = {name: {"down": layer.down, "up": layer.up} for name, layer in self.layers.items()}
        return {f"{name}/{side}": factor for name, pair in sides.items() for side, factor in pair.items()}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained by group of the optimiser; scales, shifts and biases are never decayed."""
        trained = list(self.named_parameters().values())
        if self.train != "all":
            return {"adapter": trained}
        return {"adapter": [p for p in trained if p.ndim > 1], "norm": [p for p in trained if p.ndim < 2]}

    def state(self) -> State:
        """The LoRA's factors, or the encoder's weights and statistics, as they are now."""
        if self.train == "all":
            return {f"encoder/{k}": v.detach().cpu().clone() for k, v in self.encoder.model.state_dict().items()}
        factors: State = {}
        if any(layer.scale != 1.0 for layer in self.layers.values()):
            factors["alphas"] = {name: layer.scale * layer.rank for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            factors[f"adapter/{name}/down"] = layer.down.detach().cpu().clone()
            factors[f"adapter/{name}/up"] = layer.up.detach().cpu().clone()
        return factors

    def load(self, state: State) -> None:
        """Put back what `state` returned."""
        self.start()
        if self.train == "all":
            self.encoder.model.load_state_dict({k.removeprefix("encoder/"): v for k, v in state.items()})
        for name, layer in self.layers.items():
            layer.start_block(layer.rank, down=state[f"adapter/{name}/down"])
            with torch.no_grad():
                layer.up.copy_(state[f"adapter/{name}/up"])

    def _frozen_norms(self) -> list[nn.Module]:
        modules = self.encoder.model.modules() if self.bn == "frozen_eval" else ()
        return [module for module in modules if isinstance(module, _BatchNorm)]


class TunedMethod(Method):
    """One encoder that every task goes on training, and one head a task; subclasses say what protects the old tasks.

    Attributes:
        heads: of all tasks.
        tuned: the encoder with what is trained of it.
        aligner: realigns the heads after each task, where a subclass sets one.
    """

    all_heads_train: ClassVar[bool] = False
    """Whether the heads of earlier tasks go on training; if so, they are carried on and not kept with their task."""
    options: TunedOptions
    suits = ANY_MODALITY

    def __init__(self, options: Any, encoder: Encoder, *, seed: int) -> None:
        self.options = options
        self.encoder = encoder
        self.seed = seed
        self.fixed_features = options.train == "head"
        self.heads = make_heads(encoder, options.head_init)
        self.tuned = TunedEncoder(options, encoder, seed)
        self.aligner: Aligner | None = None

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add the task's head; the encoder goes on from where it is."""
        check_classes(task, self.heads.classes, over=self.options.loss)
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))
        if self.all_heads_train:
            self.heads.train_all()
        self.tuned.start()

    def train_mode(self) -> None:
        """Let the statistics of batch norms follow the data, where they are trained."""
        self.tuned.train_mode()

    def moves_statistics(self) -> bool:
        """Whether the statistics of batch norms are trained."""
        return self.tuned.moves_statistics()

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head."""
        return Loss(self.heads.loss(self.features(batch), batch.labels, self.options.loss))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the heads; the encoder stays as this task left it."""
        self.heads.freeze()

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores from all heads, or from one task's head."""
        return self.heads.class_logits(self.features(batch), task)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is fine-tuned, and the heads that train."""
        return {**self.tuned.groups(), "head": self.heads.trained()}

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers, if any."""
        return self.tuned.layers

    def head_rows(self) -> HeadRows:
        """All heads as rows."""
        return self.heads.rows()

    def state(self) -> State:
        """All heads, and the fine-tuned weights as the newest task left them."""
        state = self._carried_heads() if self.all_heads_train else heads_state(self.heads, self.aligner)
        newest = len(self.heads.classes) - 1
        for key, value in self.tuned.state().items() if newest >= 0 else ():
            # factors are kept with every task, so that a learner can go back; a whole encoder only as it is now
            state[key if key.startswith("encoder/") else task_key(newest, key)] = value
        return state

    def load_state(self, state: State) -> None:
        """Put back the heads of all tasks and the newest weights."""
        count = self._load_carried_heads(state) if self.all_heads_train else load_heads(self.heads, self.aligner, state)
        if count:
            prefix = task_key(count - 1, "")
            newest = {k.removeprefix(prefix): v for k, v in state.items()}
            self.tuned.load({k: v for k, v in newest.items() if k.startswith(("adapter/", "encoder/"))})

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let Gaussians of classes go, where heads are realigned."""
        return {**super().forget(request), **forget_gaussians(request)}

    def _carried_heads(self) -> State:
        """Heads that go on training: their classes once, with the task, their rows as they are now."""
        state: State = {}
        for index, classes in enumerate(self.heads.classes):
            state[task_key(index, "classes")] = list(classes)
            state |= {f"heads/{index:03d}/{name}": rows for name, rows in self.heads.task_rows(index).items()}
        return state

    def _load_carried_heads(self, state: State) -> int:
        count = tasks_in(state, "classes")
        for index in range(count):
            load_head(self.heads, state, index, f"heads/{index:03d}/")
        return count
