"""InfLoRA: low-rank branches designed to lie outside the input space of old tasks (Liang & Li, CVPR 2024).

Each adapted layer gets one branch `up @ down` per task. `down` is computed before training from the layer's
inputs on the new task, restricted to the directions no old task occupies, and stays fixed; `up` starts at zero and is
trained with the task's head by cross-entropy over the task's own classes. Afterwards the layer's inputs are measured
again and a gradient memory (DualGPM) absorbs their dominant new directions. All branches act on every input, so no
task identity and no old data are needed. A convolution is a linear layer on the patches it reads.

`inflora_opt` computes the same function with all earlier branches folded into one working weight.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from everlora.errors import NumericError, OptionError
from everlora.heads import HeadRows
from everlora.lowrank import (
    AdaptedLayer,
    ConstantThreshold,
    GeometricThreshold,
    GradientMemory,
    LinearThreshold,
    SecondMoment,
    attach,
    input_groups,
    record_moments,
    share_down,
)
from everlora.lowrank.attach import require_one_group
from everlora.methods.base import ANY_MODALITY, Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.classifiers import aligner_of, check_classes, heads_state, load_heads, make_heads, realign
from everlora.methods.forgetting import Forgetting, forget_gaussians
from everlora.methods.keys import keyed_generator, task_key
from everlora.methods.measured_tokens import measured_tokens
from everlora.methods.registry import register

__all__ = ["InfLoRA", "InfLoRAOptions"]

Result = TypeVar("Result")

logger = logging.getLogger("everlora.methods")
_MOST = 0.95  # of the energy in one direction


@dataclass(frozen=True)
class InfLoRAOptions:
    """Options of InfLoRA; the defaults are the official ones for ten tasks.

    Attributes:
        rank: rows of each task's `down`.
        targets: name patterns of the layers to adapt; None takes keys and values, or a convolutional network's
            convolutions.
        threshold: how the energy threshold of the memory grows: `linear` needs `total_tasks` (official), `geometric`
            and `constant` are open-ended, `auto` takes `linear` when `total_tasks` is given and else `geometric`.
        threshold_start: threshold after the first task.
        threshold_end: where `linear` would arrive after `total_tasks` tasks.
        total_tasks: number of tasks, when it is known.
        horizon: number of tasks after which `geometric` meets `linear`.
        form: `moment_squared` designs from `P C C P` (official code), `moment` from `P C P` (paper).
        energy: what the threshold counts: squared eigenvalues of the second moment (official) or eigenvalues.
        first_task: `below` stops one direction short of the threshold at the first task (official); `reach` reaches it.
        reserve: input directions of each layer that the memory never takes, so that later tasks have room; 0 (official)
            lets the threshold alone decide.
        projection: False leaves the memory out, so that branches may overlap old tasks (the paper's ablation).
        second_pass: measure inputs again after training (official); False reuses the pass before training.
        stats_max_batches: cap on the batches of a measuring pass; None sees all rows.
        tokens: of a language model's rows measure `all` tokens, or those that predict one with a `loss`.
        exclude_tokens: ids of tokens that are not measured: a few, such as that of the beginning, can hold nearly all
            of the energy.
        normalize_tokens: scale each input vector to length 1 before it is measured, against the same.
        forward_mode: how a layer computes: one working weight (`folded`) or concatenated factors (`factored`).
        loss: cross-entropy over the task's own classes (`local`, official) or over all `seen` classes.
        head_init: a new head's rows: `uniform` (official) or `zeros`, which makes heads of different tasks more alike.
        strict_new_classes: refuse a task that repeats a known class.
        alignment: realign all heads after each task on features drawn from class Gaussians ("CA").
        alignment_epochs: passes over the drawn features.
        alignment_lr: learning rate of the alignment.
        alignment_logit_norm: divisor of the normalised logits; None for plain cross-entropy.
        alignment_covariance: keep the full covariance of a class, or its diagonal.
    """

    rank: Annotated[int, Field(ge=1)] = 10
    targets: tuple[str, ...] | None = None
    threshold: Literal["auto", "linear", "geometric", "constant"] = "auto"
    threshold_start: Annotated[float, Field(gt=0, lt=1)] = 0.95
    threshold_end: Annotated[float, Field(gt=0, le=1)] = 1.0
    total_tasks: Annotated[int, Field(ge=1)] | None = None
    horizon: Annotated[int, Field(ge=2)] = 10
    form: Literal["moment_squared", "moment"] = "moment_squared"
    energy: Literal["moment_squared", "moment"] = "moment_squared"
    first_task: Literal["below", "reach"] = "below"
    reserve: Annotated[int, Field(ge=0)] = 0
    projection: bool = True
    second_pass: bool = True
    stats_max_batches: Annotated[int, Field(ge=1)] | None = None
    tokens: Literal["all", "loss"] = "all"
    exclude_tokens: tuple[int, ...] = ()
    normalize_tokens: bool = False
    forward_mode: Literal["auto", "folded", "factored"] = "auto"
    loss: Literal["local", "seen"] = "local"
    head_init: Literal["uniform", "zeros"] = "uniform"
    strict_new_classes: bool = False
    alignment: bool = False
    alignment_epochs: Annotated[int, Field(ge=1)] = 5
    alignment_lr: Annotated[float, Field(gt=0)] = 0.01
    alignment_logit_norm: Annotated[float, Field(gt=0)] | None = 0.1
    alignment_covariance: Literal["full", "diag"] = "full"


@register(
    "inflora",
    presets={"inflora_opt": {"forward_mode": "folded"}},
    about={"inflora_opt": "InfLoRA with earlier branches folded into one working weight: same function, flat cost."},
)
class InfLoRA(Method):
    """InfLoRA (arXiv 2404.00228), in the official order of steps: section 7 of the reference page."""

    options_type = InfLoRAOptions
    suits = ANY_MODALITY

    def __init__(self, options: InfLoRAOptions, encoder: Encoder, *, seed: int) -> None:
        self.options = options
        self.encoder = encoder
        self.seed = seed
        self.threshold = _schedule(options)
        self.heads = make_heads(encoder, options.head_init)
        self._layers = attach(
            encoder.model,
            options.targets or encoder.default_targets,
            options.rank,
            forward_mode=options.forward_mode,
            train_down=False,
        )
        require_one_group(self._layers, "the space of its inputs")
        _require_room(self._layers, options.reserve)
        self._groups: dict[str, list[str]] = {}
        self.memories: dict[str, GradientMemory] = {}
        self.aligner = aligner_of(options, encoder)
        self._moments: dict[str, SecondMoment] = {}
        self._gathering: dict[str, SecondMoment] = {}
        self._protected: State = {}
        self._has_warned = False

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Steps 1 to 5: threshold check, new head, pass 1, design of `down`, choice of the trainable parameters."""
        self.threshold(task.index)
        check_classes(task, self.heads.classes, over=self.options.loss, strict=self.options.strict_new_classes)
        if not self._groups:
            self._set_groups(self._trace_groups(collect))
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))
        self._moments = self._measure(collect, "inputs before training")
        for group, names in self._groups.items():
            self._design(group, names)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head."""
        return Loss(self.heads.loss(self.features(batch), batch.labels, self.options.loss))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Steps 7 to 10: pass 2, memory update, freezing, optional classifier alignment."""
        moments = self._measure(collect, "inputs after training") if self.options.second_pass else self._moments
        epsilon = self.threshold(task.index)
        if self.options.projection:
            self._warn_of_single_directions(moments)
            for group in self.memories:
                self._protected[task_key(task.index, f"memory/{group}")] = self._protect(group, moments, epsilon)
        for layer in self._layers.values():
            layer.fold_block()
        self.heads.freeze()
        self._moments = {}
        realign(self.aligner, self.heads, task, collect, processes=self.processes, seed=self.seed)

    def gathered(self) -> State | None:
        """The second moments of the running pass."""
        moments = {group: moment.state_dict() for group, moment in self._gathering.items()}
        return {f"{kind}/{group}": m[kind] for group, m in moments.items() for kind in ("dim", "count", "sum")} or None

    def resume_gathering(self, state: State) -> None:
        """Put second moments back."""
        for group, moment in self._gathering.items():
            moment.load_state_dict({kind: state[f"{kind}/{group}"] for kind in ("dim", "count", "sum")})

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores from all heads, or from one task's head."""
        return self.heads.class_logits(self.features(batch), task)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """`up` of every layer that has a branch in this task, and the new head."""
        ups = [layer.up for layer in self._layers.values() if layer.up.numel()]
        return {"adapter": ups, "head": self.heads.trained()}

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers."""
        return self._layers

    def head_rows(self) -> HeadRows:
        """All heads as rows."""
        return self.heads.rows()

    def panels(self) -> dict[str, dict[str, float]]:
        """Directions that old tasks occupy, and those left free, per input group."""
        return {
            "occupied_rank": {group: float(memory.occupied_rank) for group, memory in self.memories.items()},
            "free_rank": {group: float(memory.free_rank) for group, memory in self.memories.items()},
        }

    def state(self) -> State:
        """Factors, directions and head of every task (written once); realigned heads and statistics if any."""
        factors: State = {}
        for name, layer in self._layers.items():
            for index, block in enumerate(layer.blocks()):
                factors[task_key(index, f"adapter/{name}/down")] = block.down.cpu()
                factors[task_key(index, f"adapter/{name}/up")] = block.up.cpu()
        return {"groups": self._groups, **factors, **self._protected, **heads_state(self.heads, self.aligner)}

    def load_state(self, state: State) -> None:
        """Replay every task: append its factors, its protected directions and its head."""
        count = load_heads(self.heads, self.aligner, state)
        if count:
            self._set_groups({group: list(names) for group, names in state["groups"].items()})
        self._protected = {k: v for k, v in state.items() if "/memory/" in k}
        for index in range(count if self.options.projection else 0):
            for group, memory in self.memories.items():
                columns = state[task_key(index, f"memory/{group}")]
                # the first update that saw anything adds a direction; one of zeros is not the first
                memory.append(columns, counted=bool(columns.shape[1]) or memory.updates > 0)
        for name, layer in self._layers.items():
            blocks = [task_key(index, f"adapter/{name}/") for index in range(count)]
            layer.load_past([state[key + "down"] for key in blocks], [state[key + "up"] for key in blocks])

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let Gaussians of classes go, where heads are realigned."""
        return {**super().forget(request), **forget_gaussians(request)}

    def _trace_groups(self, collect: Collect) -> dict[str, list[str]]:
        """Group the layers that read the same tensor, in one traced forward pass."""
        groups = input_groups(
            self.encoder.model, self._layers, lambda: collect(stage="layer inputs", max_batches=1, augment=False)
        )
        # the one batch of the pass is the first process's
        traced: dict[str, list[str]] = self.processes.gather({"groups": groups})[0]["groups"]
        return traced

    def _set_groups(self, groups: dict[str, list[str]]) -> None:
        self._groups = groups
        self.memories = {
            group: self._empty_memory(self._layers[names[0]].in_features) for group, names in groups.items()
        }

    def _measure(self, collect: Collect, stage: str) -> dict[str, SecondMoment]:
        """One pass over the training rows: the second moment of every group's input, padding left out."""
        mask: list[Tensor | None] = [None]
        options = self.options

        def keep_mask(batch: Batch) -> None:
            real = self.encoder.token_mask(batch.inputs)
            mask[0] = measured_tokens(batch, real, tokens=options.tokens, excluded=options.exclude_tokens)

        first = {group: self._layers[names[0]] for group, names in self._groups.items()}
        with record_moments(first, lambda: mask[0], normalize=options.normalize_tokens) as moments:
            self._gathering = moments
            collect(before=keep_mask, stage=stage, max_batches=options.stats_max_batches)
        self._gathering = {}
        for moment in moments.values():
            moment.sum_with(self.processes.sum)
        self._check_counts(moments)
        return moments

    def _check_counts(self, moments: dict[str, SecondMoment]) -> None:
        """Say which layers read too little, as an expert that few tokens are sent to.

        Raises:
            NumericError: no layer read anything.
        """
        counts = {group: moment.count for group, moment in moments.items()}
        if not any(counts.values()):
            raise NumericError(
                f"layer '{next(iter(counts))}' read no token, and no other did; the data was empty or every token was "
                "left out."
            )
        for group, count in counts.items():
            if count < self.options.rank:
                done = "it is left as it is" if count == 0 else "the rest of its branch is of no use"
                logger.warning("layer '%s' read %d tokens for rank %d; %s", group, count, self.options.rank, done)

    def _warn_of_single_directions(self, moments: dict[str, SecondMoment]) -> None:
        """Say once where one direction holds nearly all that the threshold counts."""
        if self._has_warned:
            return
        power = 2 if self.options.energy == "moment_squared" else 1
        single = [group for group, moment in moments.items() if moment.count and moment.leading_share(power) > _MOST]
        if single:
            self._has_warned = True
            parts = (len(single), len(moments), single[0], 100 * _MOST)
            logger.warning(
                "in %d of %d input groups, such as '%s', one direction holds more than %g %% of the energy, so the "
                "memory protects little else; set normalize_tokens=true, or leave tokens out with exclude_tokens",
                *parts,
            )

    def _design(self, group: str, names: list[str]) -> None:
        """Give the layers of one input group the same new `down`; `up` starts at zero."""
        memory = self.memories[group] if self.options.projection else self._empty_memory(self.memories[group].dim)
        rank = min(self.options.rank, memory.free_rank) if self._moments[group].count else 0
        if self._moments[group].count and rank < self.options.rank:
            warnings.warn(
                f"layer '{group}': {memory.free_rank} free input directions are left for rank {self.options.rank}; "
                "this task's branch is smaller; lower threshold_start or rank to keep room for later tasks.",
                stacklevel=2,
            )
        down = _named(group, memory.design, self._moments[group], rank) if rank else None
        for name in names:
            self._layers[name].start_block(rank, down=down)
        if rank:
            share_down([self._layers[name] for name in names])  # their product with the common input is computed once

    def _protect(self, group: str, moments: dict[str, SecondMoment], epsilon: float) -> Tensor:
        """Let a memory take in what its layers read; returns the directions added, `(d, n)`, none for unread layers."""
        memory = self.memories[group]
        if not moments[group].count:
            return torch.zeros(memory.dim, 0, dtype=torch.float64)
        _named(group, memory.update, moments[group], epsilon, self.options.reserve)
        return memory.last_added.cpu()

    def _empty_memory(self, dim: int) -> GradientMemory:
        options = self.options
        return GradientMemory(dim, form=options.form, energy=options.energy, first_task=options.first_task)


def _schedule(options: InfLoRAOptions) -> Callable[[int], float]:
    """The energy threshold as a function of the task index."""
    kind = options.threshold
    if kind == "auto":
        kind = "linear" if options.total_tasks else "geometric"
    if kind == "constant":
        return ConstantThreshold(options.threshold_start)
    if kind == "geometric":
        return GeometricThreshold(options.threshold_start, horizon=options.horizon)
    if options.total_tasks is None:
        raise OptionError("threshold=linear needs total_tasks; give it, or use threshold=geometric for an open stream.")
    return LinearThreshold(options.threshold_start, options.threshold_end, options.total_tasks)


def _require_room(layers: Mapping[str, AdaptedLayer], reserve: int) -> None:
    for name, layer in layers.items():
        if reserve >= layer.in_features:
            raise OptionError(
                f"reserve={reserve} leaves nothing to protect of the {layer.in_features} input directions of layer "
                f"'{name}'; give less."
            )


def _named(group: str, compute: Callable[..., Result], *arguments: object) -> Result:
    """Run a memory's computation and name the layer in what it refuses."""
    try:
        return compute(*arguments)
    except NumericError as error:
        raise NumericError(f"layer '{group}': {error}") from error
