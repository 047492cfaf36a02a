"""Methods that give each task a network of its own, so that nothing learned before can change."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from everlora.errors import DataError
from everlora.heads import HeadRows, TaskHeads
from everlora.isolation import (
    NormMode,
    Recogniser,
    Rule,
    TaskModules,
    factors_of,
    factors_to_rows,
    has_batch_norm,
    set_statistics_moving,
    statistics_move,
    unread_children,
)
from everlora.lowrank import AdaptedLayer
from everlora.methods.base import Batch, Collect, Encoder, Loss, Method, State, TaskInfo
from everlora.methods.classifiers import features_by_class, heads_state, load_heads
from everlora.methods.forgetting import Forgetting, forget_prototypes
from everlora.methods.gathering import gather_rows
from everlora.methods.keys import keyed_generator, task_key

__all__ = ["IsolatedMethod", "IsolatedOptions"]

logger = logging.getLogger("everlora.methods")


class IsolatedOptions(Protocol):
    """Options that all methods with one network a task share."""

    @property
    def select(self) -> Rule:
        """How the task is recognised when it is not given, see `everlora.isolation.recognition`."""

    @property
    def norm(self) -> NormMode:
        """What a task owns of the normalisation layers, see `everlora.isolation.norms`."""

    @property
    def head_init(self) -> Literal["uniform", "zeros"]:
        """Start of a new head's rows."""


class IsolatedMethod(Method):
    """One version of some modules and one head a task; the versions of earlier tasks are never written again.

    Subclasses build a task's modules. Without a task given, the task is recognised first.
    Source: sections 2 and 8 of the reference on convolutional networks.
    """

    isolated = True
    replaces_base: bool = False
    """True when the pretrained modules that task 0 has versions of are not needed any more once it is learned."""

    def __init__(self, options: IsolatedOptions, encoder: Encoder, *, seed: int) -> None:
        self.common = options
        self.encoder = encoder
        self.seed = seed
        self.unread = unread_children(encoder.model, encoder.num_parameters)
        self.heads = TaskHeads(encoder.feature_dim, options.head_init)
        self.task_modules = TaskModules(encoder.model)
        self.recogniser = Recogniser(options.select)

    @classmethod
    def training_defaults(cls, options: Any) -> Mapping[str, Any]:
        """AdamW with a little decay of weights; scales, shifts and biases are never decayed."""
        return {"optimizer": "adamw", "weight_decay": 1e-4}

    @abstractmethod
    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """Make the modules of a new task, the pretrained ones being in place.

        Args:
            index: number of the task.
            generator: source of random starts.

        Returns:
            Qualified name in the encoder's model -> module; what is to be trained has `requires_grad`.
        """

    def activate_reference(self) -> None:
        """Put the network in place by whose features tasks are recognised, one that never changes: the pretrained.

        Where the pretrained network is not kept, the network of task 0.
        """
        self.activate(0 if self.replaces_base else None)

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Build the task's modules and head; all earlier ones are frozen.

        Raises:
            DataError: a task of one class, which the rule that recognises tasks cannot compare.
        """
        if len(task.classes) == 1:
            if not self.recogniser.by_reference:
                raise DataError(
                    f"task '{task.name}' has one class, of which its network is always sure, so tasks cannot be "
                    f"recognised with select={self.recogniser.rule}; use select=prototype, or two classes or more."
                )
            logger.warning("task '%s' has one class: given the task, every answer of it is right", task.name)
        self._add(task.index)
        self.heads.add_task(task.classes, keyed_generator(self.seed, task.index, "head"))

    def train_mode(self) -> None:
        """Let the statistics of the task's own batch norms follow its data."""
        active = self.task_modules.active
        if active is not None and statistics_move(self.common.norm):
            set_statistics_moving(self.task_modules.own(active).values())

    def moves_statistics(self) -> bool:
        """Whether a task has batch norms whose statistics are its own."""
        return statistics_move(self.common.norm) and has_batch_norm(self.encoder.model)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy over the task's own classes."""
        return Loss(self.heads.loss(self.encoder.features(batch.inputs), batch.labels, "local"))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the task's modules and head, and learn to recognise the task."""
        self._freeze(task.index)
        self._learn_to_recognise(task, collect)
        self.activate(task.index)

    def logits(self, batch: Batch, task: int | None = None) -> Tensor:
        """Class scores of the given task's network, or of the network of the task that each row is taken to be of."""
        if task is not None or len(self.heads.classes) == 1:
            return self._task_logits(batch, task or 0)
        if not self.recogniser.by_reference:
            return self._compare(batch)
        self.activate_reference()
        chosen = self.recogniser.choose(self.encoder.features(batch.inputs))
        scores = torch.full((len(batch.labels), self.heads.num_classes()), -torch.inf, device=batch.labels.device)
        for index in torch.unique(chosen).tolist():
            places = (chosen == index).nonzero()[:, 0]
            part = replace(
                batch, inputs={k: v[places] for k, v in batch.inputs.items()}, labels=batch.labels[places], rows=None
            )
            scores[places] = self._task_logits(part, index)
        return scores

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What the newest task owns: modules, scales and shifts, head."""
        groups: dict[str, list[nn.Parameter]] = {"adapter": [], "norm": [], "head": []}
        for parameter in self.task_modules.parameters_of(len(self.task_modules) - 1):
            if parameter.requires_grad:
                groups["norm" if parameter.ndim < 2 else "adapter"].append(parameter)
        groups["head"] = list(self.heads.heads[-1].parameters())
        return groups

    def activate(self, task: int | None) -> None:
        """Put a task's network in place, or the pretrained one."""
        self.task_modules.activate(task)

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers of the active task, if any."""
        active = self.task_modules.active
        modules = {} if active is None else self.task_modules.version(active)
        return {path: module for path, module in modules.items() if isinstance(module, AdaptedLayer)}

    def head_rows(self) -> HeadRows:
        """The head of the active task."""
        active = self.task_modules.active
        rows = self.heads.rows()
        if active is None:
            return rows
        start = sum(len(classes) for classes in self.heads.classes[:active])
        stop = start + len(self.heads.classes[active])
        return HeadRows(rows.weight[start:stop], rows.bias[start:stop], rows.classes[start:stop])

    def stored_parameters(self) -> int:
        """Count the encoder, what each task owns beside it, and all heads."""
        total = self.encoder.num_parameters + sum(p.numel() for p in self.heads.parameters())
        total += sum(self.task_modules.num_parameters(task) for task in range(len(self.task_modules)))
        if self.replaces_base and len(self.task_modules):
            originals = [self.task_modules.original(path) for path in self.task_modules.own(0)]
            total -= sum({id(p): p.numel() for module in originals for p in module.parameters()}.values())
        return total

    def state(self) -> State:
        """Each task's modules and head, and what its recognition needs."""
        return self._state_of(range(len(self.task_modules)))

    def newest_state(self) -> State:
        """The same without the networks of earlier tasks."""
        return self._state_of(range(len(self.task_modules))[-1:])

    def _state_of(self, tasks: range) -> State:
        state = heads_state(self.heads, None)
        for index in tasks:
            for name, value in {**self._module_state(index), **self.task_values(index)}.items():
                state[task_key(index, name)] = value
            for name, value in self.recogniser.state(index).items():
                state[task_key(index, f"recognition/{name}")] = value
        return state | {f"recognition/{name}": value for name, value in self.recogniser.carried().items()}

    def task_values(self, index: int) -> State:
        """Plain values to keep with a task."""
        return {}

    def load_state(self, state: State) -> None:
        """Build the modules of all tasks anew and put their tensors back."""
        for index in range(load_heads(self.heads, None, state)):
            self._add(index)
            self._load_modules(index, _below(state, task_key(index, "")))
            self._freeze(index)
            self.recogniser.load_state(_below(state, task_key(index, "recognition/")))
        self.recogniser.load_carried(_below(state, "recognition/"))
        self.activate(None)  # whoever moves the encoder to its device next is to find the pretrained modules in it

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let prototypes of classes go."""
        return {**super().forget(request), **forget_prototypes(request)}

    def _module_state(self, index: int) -> State:
        """Tensors of a task's own modules: `adapter/LAYER/down` and `up` as PEFT shapes them, `module/PATH/NAME`."""
        adapted = {p: m for p, m in self.task_modules.own(index).items() if isinstance(m, AdaptedLayer)}
        state: State = {}
        for path, name, tensor in self.task_modules.tensors(index):
            if path not in adapted:
                state[f"module/{path}/{name}"] = tensor.detach().cpu().clone()
        for path, layer in adapted.items():
            for side, factor in zip(("down", "up"), factors_of(layer), strict=True):
                state[f"adapter/{path}/{side}"] = factor.detach().cpu().clone()
        return state

    def _load_modules(self, index: int, state: State) -> None:
        tensors: dict[tuple[str, str], Tensor] = {}
        for key, value in _below(state, "module/").items():
            path, _, name = key.rpartition("/")
            tensors[path, name] = value
        for path, layer in self.task_modules.own(index).items():
            factors = _below(state, f"adapter/{path}/")
            if isinstance(layer, AdaptedLayer) and factors:
                tensors |= {(path, side): rows for side, rows in factors_to_rows(layer, factors).items()}
        self.task_modules.load(index, tensors)

    def _add(self, index: int) -> None:
        self.activate(None)
        self.task_modules.add(self.build(index, keyed_generator(self.seed, index, "modules")))
        self.activate(index)

    def _freeze(self, index: int) -> None:
        """Stop training a task's modules and head, and let go of their last gradients."""
        for module in (self.heads, *self.task_modules.own(index).values()):
            module.requires_grad_(False).eval().zero_grad(set_to_none=True)

    def _learn_to_recognise(self, task: TaskInfo, collect: Collect) -> None:
        if self.recogniser.by_reference:
            self.activate_reference()
            self.recogniser.observe_features(features_by_class(task, collect, self.processes))
            return
        logits, labels = self._own_logits(task, collect, validation=True)
        spare = None
        if not len(labels):
            logger.info("task '%s' keeps no validation rows: its temperature stays 1", task.name)
            spare = self._own_logits(task, collect, validation=False)[0] if self.recogniser.wants_mean else None
        self.recogniser.observe_logits(logits, labels, spare)

    def _own_logits(self, task: TaskInfo, collect: Collect, *, validation: bool) -> tuple[Tensor, Tensor]:
        """Own logits `(n, classes)` and columns of the right classes `(n,)`; rows of foreign classes are left out."""
        own = torch.tensor(task.classes)
        rows: list[Tensor] = []
        labels: list[Tensor] = []

        def keep(batch: Batch, features: Tensor) -> None:
            matches = batch.labels.cpu()[:, None] == own[None, :]
            known = matches.any(dim=1)
            rows.append(self._head_rows_from(batch, features, task.index).cpu()[known])
            labels.append(matches[known].int().argmax(dim=1))

        collect(keep, stage="confidence", augment=False, validation=validation)
        nothing = {"rows": torch.empty(0, len(own)), "labels": torch.empty(0, dtype=torch.long)}
        seen = {**nothing, **gather_rows(self.processes, {"rows": rows, "labels": labels})}
        return seen["rows"], seen["labels"]

    def _compare(self, batch: Batch) -> Tensor:
        """Class scores where the logits of all tasks decide."""
        tasks = range(len(self.heads.classes))
        rows = self._head_rows_of_all(batch)
        if self.recogniser.rule == "concat":
            logs = self.recogniser.log_probabilities(rows)
            return torch.stack([self.heads.best_rows(logs[index], index) for index in tasks]).amax(dim=0)
        scores = torch.stack([self.heads.best_rows(rows[index], index) for index in tasks])
        chosen = self.recogniser.choose_by_logits(rows)
        return scores[chosen, torch.arange(len(chosen), device=chosen.device)]

    def _head_rows_of_all(self, batch: Batch) -> list[Tensor]:
        return [self._head_rows_of(batch, index) for index in range(len(self.heads.classes))]

    def _head_rows_of(self, batch: Batch, task: int) -> Tensor:
        self.activate(task)
        return self._head_rows_from(batch, self.encoder.features(batch.inputs), task)

    def _head_rows_from(self, batch: Batch, features: Tensor, task: int) -> Tensor:
        """Own logits of a task from the features of its network; a hook for networks whose logits need more."""
        return self.heads.row_logits(features, task).float()

    def _task_logits(self, batch: Batch, task: int) -> Tensor:
        return self.heads.best_rows(self._head_rows_of(batch, task), task)


def _below(state: Mapping[str, Any], prefix: str) -> State:
    """Entries whose names start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
