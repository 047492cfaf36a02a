"""PackNet: one network whose weights are handed out among tasks by pruning; what a task kept is never written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from everlora.errors import OptionError, TaskCountError
from everlora.isolation import NormMode, Rule, norm_copies, norm_layers
from everlora.isolation.ownership import MOST_TASKS, OwnedLayer, OwnedWeight, weighted_layers
from everlora.methods.base import Collect, Encoder, State, TaskInfo
from everlora.methods.isolated import IsolatedMethod
from everlora.methods.registry import register

__all__ = ["PackNet", "PackNetOptions"]

_LEAST_FREE = 0.01


@dataclass(frozen=True)
class PackNetOptions:
    """Options of PackNet.

    Attributes:
        prune: share of the weights of each layer that a task trained and gives back, those that matter least to it.
        schedule: `fixed` prunes the same share in every task; `equal` keeps an equal part of the network for each of
            `num_tasks`.
        num_tasks: how many tasks there will be, for `equal`.
        post_epochs: share of the epochs, the last ones, that train only what was kept.
        base: `pretrained` adds to the pretrained weights, so that a pruned weight is the pretrained one; `zero` sets
            pruned weights to 0, as published.
        select: how the task is recognised when it is not given, see `everlora.isolation.recognition`.
        norm: what a task owns of norms, and with their scale and shift of biases: `per_task` all of it, `affine_only`,
            `adabn` or `frozen_eval`.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
    """

    prune: Annotated[float, Field(ge=0, lt=1)] = 0.75
    schedule: Literal["fixed", "equal"] = "fixed"
    num_tasks: Annotated[int, Field(ge=1)] | None = None
    post_epochs: Annotated[float, Field(ge=0, lt=1)] = 0.33
    base: Literal["pretrained", "zero"] = "pretrained"
    select: Rule = "prototype"
    norm: NormMode = "per_task"
    head_init: Literal["uniform", "zeros"] = "uniform"


@register("packnet")
class PackNet(IsolatedMethod):
    """Train the free weights, prune most of them, retrain the others, and freeze these for ever.

    Source: Mallya and Lazebnik, "PackNet", 2018; section 7.4 of the reference on convolutional networks.
    """

    options_type: ClassVar[type] = PackNetOptions
    replaces_base = True
    options: PackNetOptions

    def __init__(self, options: PackNetOptions, encoder: Encoder, *, seed: int) -> None:
        if options.schedule == "equal" and options.num_tasks is None:
            raise OptionError("schedule=equal of packnet needs num_tasks, the number of tasks to come; give it too.")
        super().__init__(options, encoder, seed=seed)
        self.options = options
        self._pretrained_parameters = encoder.num_parameters
        layers = weighted_layers(encoder.model, without=self.unread)
        zero = options.base == "zero"
        self._weights = {name: OwnedWeight(layer, from_zero=zero) for name, layer in layers.items()}
        self.weights = nn.ModuleList(self._weights.values())
        self.settled = True

    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """The network as a new task sees it: all weights so far, norms and biases of its own."""
        own_bias = self.options.norm in ("per_task", "affine_only")
        layers: dict[str, nn.Module] = {
            name: OwnedLayer(self.task_modules.original(name), weight, index, own_bias=own_bias)
            for name, weight in self._weights.items()
        }
        norms = norm_layers(self.encoder.model, without=self.unread)
        return {**layers, **norm_copies(norms, self.options.norm)}

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Make the free weights trainable.

        Raises:
            TaskCountError: less than 1 % of the weights is free, or the schedule has no part left.
        """
        self._check_capacity(task)
        super().begin_task(task, collect)
        for weight in self._weights.values():
            weight.begin(task.index)
        self.settled = False

    def after_step(self, stepped: bool) -> None:
        """Put back what momentum and decay did to weights of earlier tasks and to pruned ones."""
        if stepped:
            for weight in self._weights.values():
                weight.restore()

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Prune when the epochs that remain are those for retraining; with a single epoch at its end."""
        retraining = min(epochs - 1, round(self.options.post_epochs * epochs))
        if epoch == epochs - 1 - retraining:
            self._prune(len(self.task_modules) - 1)

    def progress_state(self) -> State:
        """Which entries of each weight the task trains, once some were pruned."""
        if not self.settled:
            return {}
        return {f"mine/{name}": weight.trained for name, weight in self._weights.items()}

    def load_progress_state(self, state: State) -> None:
        """Prune the same entries."""
        self.settled = bool(state)
        for name, weight in self._weights.items() if state else ():
            weight.keep(state[f"mine/{name}"])

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Give the task the weights it kept, and learn to recognise it."""
        if not self.settled:
            self._prune(task.index)
        for weight in self._weights.values():
            weight.finish()
        super().end_task(task, collect)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The weights, frozen entries and all, the task's norms and biases, its head."""
        groups = super().parameters()
        groups["adapter"] += [weight.value for weight in self._weights.values() if weight.value.requires_grad]
        return groups

    def stored_parameters(self) -> int:
        """Count one network, the norms and biases of all tasks, and all heads; owners are no parameters.

        With `base=pretrained`, what later tasks than the first own is counted beside the pretrained weights, which
        earlier tasks go on reading in their place.
        """
        newer = range(1, len(self.task_modules))
        own = sum(p.numel() for index in newer for p in self.task_modules.parameters_of(index))
        beside = 0 if self.options.base == "zero" else sum(w.num_owned(1) for w in self._weights.values())
        return self._pretrained_parameters + own + beside + sum(p.numel() for p in self.heads.parameters())

    def panels(self) -> dict[str, dict[str, float]]:
        """The share of each layer's weights that no task owns yet."""
        return {"free_share": {name: w.num_free / w.owner.numel() for name, w in self._weights.items()}}

    def _module_state(self, index: int) -> State:
        """A task's norms and biases, and the weights it owns with their places."""
        state = super()._module_state(index)
        for name, weight in self._weights.items():
            state.update({f"{kind}/{name}": tensor for kind, tensor in weight.owned(index).items()})
        return state

    def _load_modules(self, index: int, state: State) -> None:
        """Put back what `_module_state` returned."""
        super()._load_modules(index, state)
        for name, weight in self._weights.items():
            weight.load(index, {kind: state[f"{kind}/{name}"] for kind in ("values", "places")})

    def _prune(self, index: int) -> None:
        planned = self.options.num_tasks
        share = self.options.prune
        if self.options.schedule == "equal" and planned is not None:
            share = 1 - 1 / (planned - index)
        for weight in self._weights.values():
            weight.prune(share)
        self.settled = True

    def _check_capacity(self, task: TaskInfo) -> None:
        planned = self.options.num_tasks if self.options.schedule == "equal" else None
        if task.index >= min(MOST_TASKS, planned or MOST_TASKS):
            raise TaskCountError(
                f"task '{task.name}' is number {task.index + 1}, but packnet hands out its weights among "
                f"{min(MOST_TASKS, planned or MOST_TASKS)} tasks; make a new learner with a larger num_tasks."
            )
        free = sum(weight.num_free for weight in self._weights.values())
        share = free / sum(weight.owner.numel() for weight in self._weights.values())
        if share < _LEAST_FREE:
            raise TaskCountError(
                f"task '{task.name}' finds {share:.2%} of the network's weights free, where packnet needs 1 %; make a "
                "new learner with a larger prune, or with schedule=equal and num_tasks."
            )
