"""Progressive networks: a network for each task, which reads those of all earlier tasks through lateral connections."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, UnsupportedError, nearest
from everlora.heads import HeadRows
from everlora.isolation import NormMode, Rule, train_by_mode
from everlora.isolation.columns import Lateral, Sites, block_sites, channel_dim, draw_anew
from everlora.methods.base import Batch, Collect, Encoder, Loss, State, TaskInfo
from everlora.methods.isolated import IsolatedMethod
from everlora.methods.keys import keyed_generator
from everlora.methods.registry import register

__all__ = ["ProgressiveNetwork", "ProgressiveOptions"]

_HEAD = "head"


@dataclass(frozen=True)
class ProgressiveOptions:
    """Options of progressive networks.

    Attributes:
        column_init: what a new column starts from: the `pretrained` weights, or `random` ones, as published.
        sites: names of the modules at whose inputs a column reads the older ones; None finds stages or blocks.
        select: how the task is recognised when it is not given, see `everlora.isolation.recognition`.
        norm: what a column trains of its norms: `per_task` all of it, `affine_only` scale and shift, `adabn` the
            statistics, `frozen_eval` nothing.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
    """

    column_init: Literal["pretrained", "random"] = "pretrained"
    sites: tuple[str, ...] | None = None
    select: Rule = "prototype"
    norm: NormMode = "per_task"
    head_init: Literal["uniform", "zeros"] = "uniform"


@register("pnn")
class ProgressiveNetwork(IsolatedMethod):
    """A column for each task; older ones are frozen and run with their own laterals, so that nothing is forgotten.

    The prediction of column `k` runs columns 1 to `k`, each once.
    Source: Rusu et al., "Progressive neural networks", 2016; section 6 of the reference on convolutional networks.
    """

    options_type: ClassVar[type] = ProgressiveOptions
    replaces_base = True
    options: ProgressiveOptions

    def __init__(self, options: ProgressiveOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.options = options
        self.laterals = nn.ModuleList()
        self._laterals: list[dict[str, Lateral]] = []
        self._sites = Sites(_checked_sites(encoder.model, options.sites))

    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """A copy of the network, or one of its kind with random weights."""
        model = self.encoder.model
        # copied at once, so that parameters that parts share stay shared
        column = copy.deepcopy({name: part for name, part in model.named_children() if name not in self.unread})
        if self.options.column_init == "random":
            draw_anew(column, generator)
        return {name: train_by_mode(part, self.options.norm) for name, part in column.items()}

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Add a column, and from the second on its laterals; their widths are those of a first batch."""
        super().begin_task(task, collect)
        sizes: dict[str, int] = {}
        if task.index:
            with self._sites.column({}) as entered:
                collect(None, stage="widths of the sites", augment=False, max_batches=1)
            self._sites.clear()
            found = {name: calls[0].shape[channel_dim(calls[0])] for name, calls in entered.items() if calls}
            sizes = self.processes.gather({"sizes": found})[0]["sizes"]  # the one batch is the first process's
        self._add_laterals(task.index, sizes)

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy of the newest column over the task's own classes."""
        return Loss(self.heads.rows_loss(self._head_rows_of(batch, len(self.heads.classes) - 1), batch.labels))

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Freeze the column and its laterals, and learn to recognise the task."""
        self.laterals.requires_grad_(False).zero_grad(set_to_none=True)
        super().end_task(task, collect)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The newest column, its laterals and its head."""
        groups = super().parameters()
        newest = [*self._laterals[-1].values()]
        groups["adapter"] += [weight for lateral in newest for weight in (lateral.reduce, lateral.project)]
        groups["magnitudes"] = [lateral.alpha for lateral in newest]
        return groups

    def head_rows(self) -> HeadRows:
        """The head of the first column; those of later ones are no plain rows.

        Raises:
            UnsupportedError: a later column is active.
        """
        if self.task_modules.active:
            raise UnsupportedError(
                "a column of pnn reads those before it, which no plain model can hold; learn the tasks with "
                "independent, senacnn or convlora to export the network of one of them."
            )
        return super().head_rows()

    def stored_parameters(self) -> int:
        """Count all columns, their laterals and their heads."""
        beside = [*self.laterals.parameters(), *self.heads.parameters()]
        columns = max(1, len(self.task_modules))
        return columns * self.encoder.num_parameters + sum(parameter.numel() for parameter in beside)

    def _module_state(self, index: int) -> State:
        """A column's tensors, and those of its laterals by `lateral/SITE/NAME`."""
        state = super()._module_state(index)
        for site, lateral in self._laterals[index].items():
            for name, tensor in lateral.state_dict().items():
                state[f"lateral/{site}/{name}"] = tensor.detach().cpu().clone()
        return state

    def _load_modules(self, index: int, state: State) -> None:
        """Put back what `_module_state` returned."""
        super()._load_modules(index, state)
        tensors = {name.removeprefix("lateral/"): t for name, t in state.items() if name.startswith("lateral/")}
        sizes = {name.rpartition("/")[0]: len(t) for name, t in tensors.items() if name.endswith("/reduce")}
        self._add_laterals(index, {site: size for site, size in sizes.items() if site != _HEAD})
        for site, lateral in self._laterals[index].items():
            lateral.load_state_dict({name: tensors[f"{site}/{name}"] for name in ("alpha", "reduce", "project")})
        self.laterals.requires_grad_(False)

    def _add(self, index: int) -> None:
        super()._add(index)
        self._sites.watch(self.encoder.model)

    def _add_laterals(self, index: int, sizes: Mapping[str, int]) -> None:
        """Make the laterals of a column at the given sites, of the given widths, and at the head."""
        made: dict[str, Lateral] = {}
        if index:
            generator = keyed_generator(self.seed, index, "laterals")
            widths = {site: (size, size) for site, size in sizes.items()}
            widths[_HEAD] = (self.encoder.feature_dim, len(self.heads.classes[index]))
            device = next(self.encoder.model.parameters()).device
            for site, (width, out_width) in widths.items():
                made[site] = Lateral(index, width, out_width, generator=generator).to(device)
        self._laterals.append(made)
        self.laterals.append(nn.ModuleList(made.values()))

    def _head_rows_of_all(self, batch: Batch) -> list[Tensor]:
        return self._run(batch, len(self.heads.classes))

    def _head_rows_of(self, batch: Batch, task: int) -> Tensor:
        return self._run(batch, task + 1)[-1]

    def _head_rows_from(self, batch: Batch, features: Tensor, task: int) -> Tensor:
        return self._head_rows_of(batch, task)  # features alone lack what the column reads of the others

    def _run(self, batch: Batch, count: int) -> list[Tensor]:
        """Run the first columns, each once; return the logits `(n, classes of its task)` of each.

        The older ones are frozen, so that no gradient is kept for them although gradients stay on: models may group
        the rows of a batch otherwise without them.
        """
        rows: list[Tensor] = []
        pooled: list[Tensor] = []
        self._sites.clear()
        for index in range(count):
            self.activate(index)
            laterals = self._laterals[index]
            with self._sites.column(laterals):
                features = self.encoder.features(batch.inputs)
            logits = self.heads.row_logits(features, index).float()
            rows.append(logits + laterals[_HEAD](pooled).float() if index else logits)
            pooled.append(features.detach())
        self._sites.clear()
        return rows


def _checked_sites(model: nn.Module, named: tuple[str, ...] | None) -> tuple[str, ...]:
    """The sites that were named, or those found in the network."""
    known = [name for name, _ in model.named_modules() if name]
    sites = block_sites(model) if named is None else named
    if not sites:
        raise UnsupportedError(
            "pnn found no list of blocks or stages in this model at which to join its columns; name the modules "
            "whose inputs to join with sites."
        )
    for site in sites:
        if site not in known:
            raise OptionError(f"sites of pnn names '{site}', which is no module of the model; {nearest(site, known)}")
    return sites
