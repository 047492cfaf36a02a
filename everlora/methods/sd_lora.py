"""SD-LoRA: one low-rank direction per task, with trainable magnitudes of all of them (Wu et al., ICLR 2025).

Each adapted layer gets one direction `up @ down` per task, trained with the task's head by cross-entropy over
the task's own classes and then frozen. The magnitudes, one scalar for each direction old and new, are trained in every
task. No old data, no task identity, and one model at test time. A convolution is a linear layer on the patches that it
reads.

`sd_lora_rr` gives later tasks smaller ranks. `sd_lora_kd` absorbs a direction that the old ones already span: their
magnitudes take it up and its factors are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from everlora.errors import OptionError, TargetError, UnsupportedError
from everlora.heads import HeadRows
from everlora.lowrank import AdaptedLayer, Direction, attach, find_targets
from everlora.lowrank.attach import require_one_group
from everlora.methods.base import ANY_MODALITY, Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.classifiers import aligner_of, check_classes, heads_state, load_heads, make_heads, realign
from everlora.methods.direction_history import DirectionHistory
from everlora.methods.forgetting import Forgetting, forget_gaussians
from everlora.methods.keys import keyed_generator
from everlora.methods.registry import register
from everlora.methods.sealing import AbsorptionRules, BoundaryRules, MergeRules, block_name

__all__ = ["SDLoRA", "SDLoRAOptions"]

_PUBLIC: dict[str, Any] = {
    "norm": "factors",
    "current": "raw",
    "alpha": "reset",
    "boundary": "jump",
    "scope": "network",
    "kd_criterion": "abs_sq",
}
_OURS: dict[str, Any] = {"norm": "fro", "alpha_init": 1.0, "alpha": "carry", "boundary": "continuous"} | {
    "scope": "network",
    "kd_criterion": "rho",
}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_OURS, "current": "normalised"},
    "official": {**_PUBLIC, "alpha_init": 0.8},
    "libcontinual": {**_PUBLIC, "alpha_init": 1.0},
    "everlora": {**_OURS, "current": "raw"},
}


@dataclass(frozen=True)
class SDLoRAOptions:
    """Options of SD-LoRA; those that are none by default take the value of the preset.

    Attributes:
        preset: sets the switches that are not given: `everlora`, `paper`, or the two public implementations
            `official` and `libcontinual`.
        norm: what a sealed direction is divided by: its Frobenius norm (`fro`), or the product of the norms of its
            factors.
        current: the direction in training counts with its magnitude alone (`raw`), or is divided by its norm too.
        alpha_init: magnitude of a new direction, and the reset value.
        alpha: at a new task, old magnitudes are `reset`, or carried on.
        boundary: whether sealing and reset may change what the network computes (`jump`).
        scope: one magnitude a task for the whole network, or for each adapted module.
        offset: how a continuous boundary makes up for a shared magnitude: an offset (`add`) or a gain (`mul`).
        soft_eps: softening of the norm of the direction in training, for `current=normalised`.
        rank: of each task's direction, when there is no `rank_schedule`.
        rank_schedule: rank from a task on, such as 0: 10, 4: 8, 8: 6.
        targets: name patterns of the layers to adapt; None takes queries and values, or a convolutional network's
            convolutions.
        kd: absorb a direction that the old ones span.
        kd_tau: threshold of the criterion; None takes 0.03 for `rho` and 0.0009 for `abs_sq`.
        kd_criterion: what is compared: the relative residual, or the squared residual of the normalised direction.
        kd_weight: an absorbed direction is replaced as it counts now (`in_force`), or as it would after the reset.
        a_init: `down` of a task starts afresh, or where the first task's did.
        max_rank: cap on the total rank of a layer; the oldest directions are merged to keep it. None: no cap.
        keep_last: how many of the newest directions are not merged.
        max_compress_error: relative error of a merge beyond which the cap is exceeded instead, with a warning.
        rank_alloc: merged layers get the same rank, or ranks by energy.
        forward_mode: how a layer computes: one working weight (`folded`) or concatenated factors (`factored`).
        loss: cross-entropy over the task's own classes (`local`, official) or over all `seen` classes.
        head_init: a new head's rows: `kaiming` (official), `uniform` as torch draws them, or `zeros`.
        alignment: realign all heads after each task on features drawn from class Gaussians.
        alignment_epochs: passes over the drawn features.
        alignment_lr: learning rate of the alignment.
        alignment_logit_norm: divisor of the normalised logits; None for plain cross-entropy.
        alignment_covariance: keep the full covariance of a class, or its diagonal.
    """

    preset: Literal["everlora", "paper", "official", "libcontinual"] = "everlora"
    norm: Literal["fro", "factors"] | None = None
    current: Literal["raw", "normalised"] | None = None
    alpha_init: Annotated[float, Field(allow_inf_nan=False)] | None = None
    alpha: Literal["reset", "carry"] | None = None
    boundary: Literal["jump", "continuous"] | None = None
    scope: Literal["network", "module"] | None = None
    offset: Literal["add", "mul"] = "add"
    soft_eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    rank: Annotated[int, Field(ge=1)] = 10
    rank_schedule: dict[int, int] | None = None
    targets: tuple[str, ...] | None = None
    kd: bool = False
    kd_tau: Annotated[float, Field(gt=0)] | None = None
    kd_criterion: Literal["rho", "abs_sq"] | None = None
    kd_weight: Literal["in_force", "alpha_init"] | None = None
    a_init: Literal["fresh", "first"] = "fresh"
    max_rank: Annotated[int, Field(ge=2)] | None = None
    keep_last: Annotated[int, Field(ge=0)] = 2
    max_compress_error: Annotated[float, Field(ge=0)] = 0.05
    rank_alloc: Literal["uniform", "energy"] = "uniform"
    forward_mode: Literal["auto", "folded", "factored"] = "auto"
    loss: Literal["local", "seen"] = "local"
    head_init: Literal["kaiming", "uniform", "zeros"] = "kaiming"
    alignment: bool = False
    alignment_epochs: Annotated[int, Field(ge=1)] = 5
    alignment_lr: Annotated[float, Field(gt=0)] = 0.01
    alignment_logit_norm: Annotated[float, Field(gt=0)] | None = 0.1
    alignment_covariance: Literal["full", "diag"] = "full"

    def __post_init__(self) -> None:
        """Fill in what the preset says, so that the stored options are complete."""
        for name, value in _PRESETS[self.preset].items():
            self._fill(name, value)
        late = self.preset in ("official", "libcontinual") and self.boundary == "jump"
        self._fill("kd_weight", "alpha_init" if late else "in_force")
        self._fill("kd_tau", 0.03 if self.kd_criterion == "rho" else 9e-4)

    def rank_at(self, task: int) -> int:
        """Rank of a task's direction, a function of its number alone."""
        if self.rank_schedule is None:
            return self.rank
        return self.rank_schedule[max(start for start in self.rank_schedule if start <= task)]

    def largest_rank(self) -> int:
        """Largest rank that any task gets."""
        return self.rank if self.rank_schedule is None else max(self.rank_schedule.values())

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)


@register(
    "sd_lora",
    presets={"sd_lora_rr": {"rank_schedule": {0: 10, 4: 8, 8: 6}}, "sd_lora_kd": {"kd": True}},
    about={
        "sd_lora_rr": "SD-LoRA with smaller ranks for later tasks.",
        "sd_lora_kd": "SD-LoRA that absorbs a direction which the old ones span.",
    },
)
class SDLoRA(Method):
    """SD-LoRA (arXiv 2501.13198); the order of steps is that of section 4 of the reference page.

    Between tasks the layers hold nothing but factors and scales. The magnitudes of the next task, and the jump or
    reset that a preset asks for, come in `begin_task`: what is evaluated is the model before it.
    """

    options_type = SDLoRAOptions
    suits = ANY_MODALITY

    def __init__(self, options: SDLoRAOptions, encoder: Encoder, *, seed: int) -> None:
        _check(options)
        self.options, self.encoder, self.seed = options, encoder, seed
        self.heads = make_heads(encoder, options.head_init)
        self._layers = attach(
            encoder.model,
            options.targets or _default_targets(encoder),
            options.largest_rank(),
            forward_mode=options.forward_mode,
            generator=keyed_generator(seed, "attach"),
        )
        require_one_group(self._layers, "the norm of a direction")
        for layer in self._layers.values():
            layer.start_block(0)  # nothing is trained before the first task
        self.past = DirectionHistory(
            self._layers,
            _boundary(options),
            norm=options.norm or "fro",
            absorption=_absorption(options),
            merging=_merging(options),
        )
        self.magnitudes: nn.Parameter | None = None
        self.aligner = aligner_of(options, encoder)

    @classmethod
    def training_defaults(cls, options: SDLoRAOptions) -> Mapping[str, Any]:
        """One constant rate, SGD with momentum or, in the paper, Adam; the published presets also say how long."""
        optimizer = "adam" if options.preset == "paper" else "sgd"
        common = {"optimizer": optimizer, "lr": 8e-3, "head_lr": None, "momentum": 0.9, "lr_schedule": "constant"}
        return common if options.preset == "everlora" else {**common, "epochs": 20, "batch_size": 128}

    def adopt(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take a plain LoRA as a sealed direction before the first task; its magnitude is trained with the others."""
        absent = sorted(factors.keys() - self._layers.keys())
        if absent:
            mine = sorted({name.rsplit(".", 1)[-1] for name in self._layers})
            raise TargetError(
                f"expected an adapter of the layers {', '.join(mine)}, found one that changes {absent[0]}; name all of "
                "its layers with targets."
            )
        self.past.adopt({name: Direction(*pair) for name, pair in factors.items()})

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Seal the newest direction, keep the rank cap, and start the next block with all magnitudes trainable."""
        check_classes(task, self.heads.classes, over=self.options.loss)
        rank = self.options.rank_at(task.index)
        self.past.begin(task.index, rank)
        first = 0 if self.options.a_init == "first" else task.index
        for name, layer in self._layers.items():
            layer.start_block(rank, generator=keyed_generator(self.seed, first, name))
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))
        current = self.options.current or "raw"
        self.magnitudes = self.past.attach_magnitudes(current=current, soft_eps=self.options.soft_eps)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the new head."""
        return Loss(self.heads.loss(self.features(batch), batch.labels, self.options.loss))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the new directions as they count now, absorb those that old ones span; realign heads if asked for."""
        if self.magnitudes is not None:
            self.past.finish(task.index, self.magnitudes)
        self.magnitudes = None
        self.heads.freeze()
        realign(self.aligner, self.heads, task, collect, processes=self.processes, seed=self.seed)

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores from all heads, or from one task's head."""
        return self.heads.class_logits(self.features(batch), task)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Both factors of every layer, the magnitudes of all tasks, and the new head."""
        factors = [factor for layer in self._layers.values() for factor in (layer.down, layer.up)]
        magnitudes = [] if self.magnitudes is None else [self.magnitudes]
        return {"adapter": factors, "magnitudes": magnitudes, "head": self.heads.trained()}

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers."""
        return self._layers

    def head_rows(self) -> HeadRows:
        """All heads as rows."""
        return self.heads.rows()

    def panels(self) -> dict[str, dict[str, float]]:
        """Magnitudes by task, total ranks, and what absorption and merging found, after the newest task."""
        sealed, names = self.past.sealed, [block_name(origin) for origin in self.past.sealed.origins]
        panels = {
            "magnitude": dict(zip(names, sealed.alpha.mean(dim=0).tolist(), strict=True)),
            "true_magnitude": dict(zip(names, self.past.true_magnitudes(), strict=True)),
            "total_rank": {name: float(layer.total_rank) for name, layer in self._layers.items()},
        }
        if self.options.kd:
            panels["rho"] = self.past.rho()
        if self.options.max_rank is not None:
            panels["compress_error"] = self.past.compress_errors()
        return panels

    def state(self) -> State:
        """Factors, magnitudes and head of every task: all of it written once."""
        return {**self.past.state(), **heads_state(self.heads, self.aligner)}

    def load_state(self, state: State) -> None:
        """Put back heads, factors and magnitudes.

        Raises:
            StoreError: factors are missing or not those whose norm was recorded.
        """
        count = load_heads(self.heads, self.aligner, state)
        if count:
            self.past.load_state(state, count)

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let Gaussians of classes go, where heads are realigned."""
        return {**super().forget(request), **forget_gaussians(request)}

    @contextmanager
    def model_at(self, task: int) -> Iterator[None]:
        """Let the layers be those of the model after a task, until the end of the `with` block.

        Heads stay; rows of the tasks up to then never changed, unless heads are realigned. For models in between see
        `past.coefficients_at` and `past.counting`.

        Raises:
            DataError: the task was not learned, or directions it used were merged or absorbed later.
        """
        with self.past.counting(self.past.coefficients_at(task)):
            yield

    def path(self, first: int, second: int, position: float, *, heads: int) -> AbstractContextManager[None]:
        """Mix the coefficients of two models, which is exact: their factors are the same."""
        self._check_heads()
        one, two = self.past.coefficients_at(first), self.past.coefficients_at(second)
        mixed = {name: (1 - position) * one[name] + position * two[name] for name in one}
        return self._with(mixed, heads)

    def path_start(self, second: int, *, heads: int) -> AbstractContextManager[None] | None:
        """The model after sealing and reset, for a boundary that jumps."""
        self._check_heads()
        coefficients = self.past.coefficients_before(second)
        return None if coefficients is None else self._with(coefficients, heads)

    @contextmanager
    def _with(self, coefficients: Mapping[str, Tensor], heads: int) -> Iterator[None]:
        """Let the blocks count with these coefficients, and only the first heads compete."""
        whole = self.heads
        with self.past.counting(coefficients):
            self.heads = whole.first(heads)
            try:
                yield
            finally:
                self.heads = whole

    def _check_heads(self) -> None:
        if self.aligner is not None:
            raise UnsupportedError("alignment rewrites the heads of earlier tasks, so their models are not kept.")


def _default_targets(encoder: Encoder) -> tuple[str, ...]:
    """Queries and values, or what is adapted by default where that is convolutions."""
    convolutions = {name for name, module in encoder.model.named_modules() if isinstance(module, nn.Conv2d)}
    # Vision transformers have one as well, for their patches, which is none of their targets.
    if convolutions and convolutions.issuperset(find_targets(encoder.model, encoder.default_targets)):
        return encoder.default_targets
    return encoder.attention_targets("query", "value")


def _check(options: SDLoRAOptions) -> None:
    """Refuse options that contradict each other (section 13 of the reference page)."""
    if options.boundary == "continuous" and options.kd_weight == "alpha_init":
        raise OptionError("kd_weight=alpha_init changes the function, which boundary=continuous forbids; use in_force.")
    if options.offset == "mul" and options.boundary == "jump":
        raise OptionError("offset=mul is a kind of boundary=continuous, found boundary=jump; leave offset out.")
    if options.offset == "mul" and options.alpha_init == 0:
        raise OptionError("offset=mul divides by alpha_init, found 0; use offset=add or another alpha_init.")
    schedule = options.rank_schedule
    if schedule is not None and (0 not in schedule or min(schedule) < 0 or min(schedule.values()) < 1):
        raise OptionError(f"rank_schedule must start at task 0 with ranks of at least 1, found {schedule}; mend it.")
    least = 2 * options.largest_rank()
    if options.max_rank is not None and options.max_rank < least:
        raise OptionError(
            f"max_rank={options.max_rank} leaves no room for the past beside a block of rank {options.largest_rank()}; "
            f"use at least {least}."
        )


def _boundary(options: SDLoRAOptions) -> BoundaryRules:
    names = ("alpha_init", "alpha", "boundary", "scope", "offset")
    return BoundaryRules(**{name: getattr(options, name) for name in names})


def _absorption(options: SDLoRAOptions) -> AbsorptionRules | None:
    if not options.kd or options.kd_criterion is None or options.kd_tau is None:
        return None
    return AbsorptionRules(options.kd_criterion, options.kd_tau, options.kd_weight == "alpha_init")


def _merging(options: SDLoRAOptions) -> MergeRules | None:
    if options.max_rank is None:
        return None
    return MergeRules(options.max_rank, options.keep_last, options.max_compress_error, options.rank_alloc)
