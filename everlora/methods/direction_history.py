"""The directions of all tasks in all adapted layers: measured, absorbed, merged, stored and put back.

The factors lie in the layers, as their past; what they count with lies in `SealedBlocks`. Every change of either is
recorded under the task that made it, and the records alone rebuild the list of blocks and the model after any task.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everlora.errors import DataError, OptionError, ShapeError, StoreError
from everlora.lowrank import (
    Block,
    Direction,
    DirectionSum,
    LowRankLayer,
    fit_direction,
)
from everlora.lowrank.compression import allocate_ranks, plan_merge
from everlora.lowrank.factors import direction_norm
from everlora.methods.base import State
from everlora.methods.keys import task_key
from everlora.methods.sealing import ADOPTED, AbsorptionRules, BoundaryRules, MergeRules, Origin, SealedBlocks

__all__ = ["DirectionHistory"]

logger = logging.getLogger("everlora.methods")

_NORM_FLOOR = 1e-12  # times the norm of the base weight: a direction up to there is empty
_NORM_TOLERANCE = 1e-5  # relative; norms of stored factors are computed again on loading
_RARELY = 0.5  # residual above which absorption is out of reach
_RECORDS = ("magnitudes/", "absorption/", "merge/", "adoption/")


class DirectionHistory:
    """The blocks of all adapted layers, from task to task.

    Args:
        layers: name to layer; their past is managed here from now on.
        boundary: what happens to magnitudes between tasks.
        norm: what a sealed direction is divided by, `fro` or `factors`.
        absorption: when a new direction is replaced by old ones; None for never.
        merging: how the total rank is bounded; None for no bound.

    Attributes:
        sealed: what the blocks count with.
        num_tasks: finished tasks.
        exact_from: the earliest task since which no block was merged.
    """

    def __init__(
        self,
        layers: Mapping[str, LowRankLayer],
        boundary: BoundaryRules,
        *,
        norm: Literal["fro", "factors"],
        absorption: AbsorptionRules | None,
        merging: MergeRules | None,
    ) -> None:
        self.norm, self.absorption, self.merging = norm, absorption, merging
        self.sealed = SealedBlocks(len(layers), boundary)
        self.num_tasks = self.exact_from = 0
        self._layers = dict(layers)
        self._records: State = {}
        self._floors = [_NORM_FLOOR * _base_norm(layer) for layer in layers.values()]
        self._training = False

    def begin(self, task: int, rank: int) -> None:
        """Seal the newest block, and merge the oldest ones if a block of `rank` would exceed the bound."""
        self._training = True
        if self.num_tasks:
            self._absorb_late()
            self.sealed.seal()
        if self.sealed.origins and self.merging is not None:
            plan = plan_merge(self._block_ranks(), rank, self.merging.max_rank, keep_last=self.merging.keep_last)
            if plan is not None:
                self._merge(task, plan.num_blocks, plan.rank)

    def adopt(self, pairs: Mapping[str, Direction]) -> None:
        """Take factors from elsewhere as a sealed block before the first task, counting as they are.

        Args:
            pairs: layer name to factors; layers without any get an empty block.

        Raises:
            OptionError: a task was learned, or factors were taken before.
            ShapeError: factors that do not fit their layer.
        """
        if self.num_tasks or self.sealed.origins:
            raise OptionError("an adapter can be taken over only once, before the first task; make a new learner.")
        sizes = []
        for module, (name, layer) in enumerate(self._layers.items()):
            pair = Direction(*(factor.to(layer.past_scale) for factor in pairs.get(name, _empty(layer))))
            try:
                layer.load_past([pair.down], [pair.up])
            except ShapeError as error:
                raise ShapeError(f"layer '{name}': {error}") from error
            sizes.append(self._size(module, pair))
        norms, lengths = _columns(sizes)
        self.sealed.adopt(norms, lengths)
        self._record(0, "adoption", {"norms": norms, "lengths": lengths})
        self._drop_dead()
        self._write_scales()

    def attach_magnitudes(self, *, current: Literal["raw", "normalised"], soft_eps: float) -> nn.Parameter:
        """Make one parameter of all magnitudes, the new one last, and let every layer compute with it.

        Returns:
            `(blocks + 1,)`, or `(modules, blocks + 1)` with scope `module`.
        """
        sealed = self.sealed
        new = sealed.alpha.new_full((len(sealed.alpha), 1), sealed.rules.alpha_init)
        by_module = sealed.rules.scope == "module"
        alpha = torch.cat([sealed.alpha, new], dim=1)
        like = next(iter(self._layers.values())).past_scale
        values = nn.Parameter((alpha if by_module else alpha[0]).to(like))
        gains, offsets = sealed.gains()
        for module, layer in enumerate(self._layers.values()):
            place = layer.past_scale.device
            layer.set_magnitudes(
                values,
                gains[module].to(place),
                offsets[module].to(place),
                row=module if by_module else None,
                current=current,
                norm=self.norm,
                soft_eps=soft_eps,
            )
        return values

    def finish(self, task: int, values: Tensor) -> None:
        """Freeze the trained blocks as they count now, without those that are empty or that old ones span.

        Args:
            task: index of the task.
            values: the magnitudes as `attach_magnitudes` made them, trained.
        """
        layers = self._layers.values()
        current = torch.tensor([layer.settle_magnitudes() for layer in layers], dtype=torch.float64)
        pairs = [Direction(layer.down, layer.up) for layer in layers]
        self.sealed.add(task, *_columns([self._size(module, pair) for module, pair in enumerate(pairs)]))
        self.sealed.set_magnitudes(values, current)
        if self.absorption is not None:
            self._compare(task, self.absorption)
        for layer in layers:
            layer.fold_block()
        self._drop_dead()
        self._write_scales()
        self._remember(task)
        self.num_tasks, self._training = task + 1, False

    # -- absorption ---------------------------------------------------------------------------------------------------

    def _compare(self, task: int, rules: AbsorptionRules) -> None:
        """Express each new direction by the old ones; absorb it, now or later, where it lies close to their span."""
        sealed, weights = self.sealed, self.sealed.in_force()
        beta = torch.zeros(len(self._layers), len(sealed.origins) - 1, dtype=torch.float64)
        rho = torch.full((len(self._layers),), math.inf, dtype=torch.float64)  # infinite where nothing is compared
        found = []
        for module, layer in enumerate(self._layers.values()):
            if not bool((sealed.norms[module, :-1] > 0).any()) or not float(sealed.norms[module, -1]):
                continue  # nothing to express it by, or nothing to express
            old = [Direction(block.down, block.up) for block in layer.blocks()]
            new = Direction(layer.down, layer.up)
            fit = fit_direction(new, old, norm=self.norm, floor=self._floors[module])
            beta[module], rho[module] = fit.beta.cpu(), fit.rho
            if (fit.rho if rules.criterion == "rho" else fit.residual_squared) < rules.tau:
                found.append(module)
        for module in () if rules.late else found:
            sealed.absorb(module, float(weights[module]), beta[module])
        self._record(task, "absorption", {"beta": beta, "rho": rho, "modules": found})
        self._report(task, rho, len(found))

    def _report(self, task: int, rho: Tensor, num_absorbed: int) -> None:
        seen = rho[rho.isfinite()].tolist()
        if seen:
            parts = (task, min(seen), max(seen), num_absorbed, len(rho))
            logger.info("task %d: residual rho from %.3g to %.3g, within the threshold in %d of %d layers", *parts)
        if task != 4:
            return
        past = [value for key, value in self._records.items() if key.endswith("absorption/rho")]
        smallest = float(torch.cat(past).min())
        if _RARELY < smallest < math.inf:
            warnings.warn(
                f"the smallest residual of a new direction after 5 tasks is {smallest:.2f}: independent directions "
                "practically never lie in each other's span, so absorption saves nothing here; a cap on the total rank "
                "does, and starting every task from the first one's factors makes overlap likelier.",
                stacklevel=2,
            )

    def _absorb_late(self) -> None:
        """Absorb the newest block where that waited for the next task."""
        modules = self._waiting(self.num_tasks - 1)
        for module in modules:
            beta = self._records[task_key(self.num_tasks - 1, "absorption/beta")][module]
            self.sealed.absorb(module, self.sealed.rules.alpha_init, beta)
        if modules:
            self._drop_dead()

    def _waiting(self, task: int) -> list[int]:
        """Modules in which a task's block is absorbed when the next task begins."""
        late = self.absorption is not None and self.absorption.late
        return list(self._records[task_key(task, "absorption/modules")]) if late else []

    # -- merging ------------------------------------------------------------------------------------------------------

    def _block_ranks(self) -> list[int]:
        """Rank of each block: the largest over the layers, or the mean where ranks are shared out by energy."""
        ranks = torch.stack([layer.past_ranks for layer in self._layers.values()]).double()
        by_energy = self.merging is not None and self.merging.allocation == "energy"
        return [max(1, int(rank)) for rank in (ranks.mean(dim=0).ceil() if by_energy else ranks.amax(dim=0))]

    def _merge(self, task: int, count: int, rank: int) -> None:
        """Replace the oldest blocks of every layer by one, the nearest to their sum as it counts now."""
        multipliers = self.sealed.multipliers()[:, :count]
        past = [layer.blocks() for layer in self._layers.values()]
        sums = [
            DirectionSum([Direction(block.down, block.up) for block in blocks[:count]], row)
            for blocks, row in zip(past, multipliers, strict=True)
        ]
        errors, sizes = [], []
        for module, (blocks, each, cut) in enumerate(zip(past, sums, self._ranks_of(sums, rank), strict=True)):
            compressed = each.truncate(cut)
            size = self._replace(module, compressed.direction, blocks[count:])
            errors.append(compressed.error_rel)
            sizes.append(size)
        norms, lengths = _columns(sizes)
        self.sealed.merge(count, task, norms, lengths)
        self.exact_from = task
        losses = torch.tensor(errors, dtype=torch.float64)
        self._record(task, "merge", {"count": count, "norms": norms, "lengths": lengths, "errors": losses})
        logger.info("task %d: merged %d blocks, largest relative error %.3g", task, count, max(errors))

    def _ranks_of(self, sums: list[DirectionSum], rank: int) -> list[int]:
        """Rank of each layer's merged block: as the bound allows, or more where the error would be too large."""
        rules = self.merging
        assert rules is not None, "only called with a bound"
        values = [each.singular_values.cpu() for each in sums]
        wanted = allocate_ranks(values, rank, allocation=rules.allocation)
        needed = [each.rank_within(rules.max_error) for each in sums]
        raised = [name for name, w, n in zip(self._layers, wanted, needed, strict=True) if n > max(w, 1)]
        if raised:
            warnings.warn(
                f"merging old directions within a total rank of {rules.max_rank} would change {len(raised)} layers, "
                f"first '{raised[0]}', by more than {rules.max_error}, so they get a higher rank; allow more rank or "
                "error.",
                stacklevel=2,
            )
        return [max(w, n, 1) for w, n in zip(wanted, needed, strict=True)]

    def _replace(self, module: int, direction: Direction, kept: list[Block]) -> tuple[float, float]:
        """Put one direction before the kept blocks of a layer; return its norm and Frobenius norm as stored."""
        layer = list(self._layers.values())[module]
        merged = Direction(*(factor.to(layer.past_scale) for factor in direction))
        size = self._size(module, merged)
        merged = merged if size[0] else _empty(layer)
        layer.load_past([merged.down, *(b.down for b in kept)], [merged.up, *(b.up for b in kept)])
        return size

    # -- the layers ---------------------------------------------------------------------------------------------------

    def _size(self, module: int, direction: Direction) -> tuple[float, float]:
        """Norm and Frobenius norm of a direction; both 0 when it is empty."""
        length = direction_norm(direction)
        if length <= self._floors[module]:
            return 0.0, 0.0
        return (length if self.norm == "fro" else direction_norm(direction, self.norm)), length

    def _drop_dead(self) -> None:
        """Let go of the factors that count no more."""
        for layer, norms in zip(self._layers.values(), self.sealed.norms.tolist(), strict=True):
            if any(rank and not norm for rank, norm in zip(layer.past_ranks.tolist(), norms, strict=True)):
                pairs = [block if norm else _empty(layer) for block, norm in zip(layer.blocks(), norms, strict=True)]
                layer.load_past([pair.down for pair in pairs], [pair.up for pair in pairs])

    def _write_scales(self) -> None:
        self._set_scales(dict(zip(self._layers, self.sealed.multipliers(), strict=True)))

    def _set_scales(self, multipliers: Mapping[str, Tensor]) -> None:
        for name, row in multipliers.items():
            layer = self._layers[name]
            layer.past_scale.copy_(torch.repeat_interleave(row.to(layer.past_scale), layer.past_ranks))

    # -- records ------------------------------------------------------------------------------------------------------

    def _remember(self, task: int) -> None:
        sealed = self.sealed
        current = sealed.multipliers()[:, -1]
        found = {"alpha": sealed.alpha, "gamma": sealed.gamma, "delta": sealed.delta, "current": current}
        found |= {"norms": sealed.norms[:, -1], "lengths": sealed.lengths[:, -1]}
        self._record(task, "magnitudes", {key: value.clone() for key, value in found.items()})

    def _record(self, task: int, kind: str, values: Mapping[str, Any]) -> None:
        self._records |= {task_key(task, f"{kind}/{key}"): value for key, value in values.items()}

    def _read(self, task: int, kind: str, *keys: str) -> dict[str, Tensor]:
        return {key: self._records[task_key(task, f"{kind}/{key}")] for key in keys}

    def rho(self) -> dict[str, float]:
        """Relative residual of the newest task's direction by layer, where it could be compared."""
        key = task_key(self.num_tasks - 1, "absorption/rho")
        values = self._records[key].tolist() if key in self._records else []
        return {name: value for name, value in zip(self._layers, values, strict=False) if math.isfinite(value)}

    def compress_errors(self) -> dict[str, float]:
        """Sum of the relative errors of all merges, by layer: a bound on the error they made together."""
        found = [value for key, value in self._records.items() if key.endswith("merge/errors")]
        total = sum(found, torch.zeros(len(self._layers), dtype=torch.float64))
        return dict(zip(self._layers, total.tolist(), strict=True))

    def true_magnitudes(self) -> list[float]:
        """Frobenius norm that each block adds to a layer, with its sign, as a mean over the layers that have it."""
        live = (self.sealed.norms > 0).sum(dim=0).clamp(min=1)
        values: list[float] = ((self.sealed.multipliers() * self.sealed.lengths).sum(dim=0) / live).tolist()
        return values

    def state(self) -> State:
        """Factors of each block under the task that made it (of an older one, only those that count), and records."""
        state: State = dict(self._records)
        if self.num_tasks:
            state[task_key(0, "modules")] = list(self._layers)
        for name, layer in self._layers.items():
            for origin, block in zip(self.sealed.origins, layer.blocks(), strict=True):
                if len(block.scale) or self.num_tasks - 1 in (origin.tasks[-1], origin.merged_at):
                    key = _factor_key(origin, name)
                    state[key + "down"], state[key + "up"] = block.down.cpu(), block.up.cpu()
        return state

    def load_state(self, state: State, num_tasks: int) -> None:
        """Replay which blocks were merged and absorbed, then put back the factors and the newest magnitudes.

        Raises:
            StoreError: factors are missing or not those whose norm was recorded, or belong to other layers.
        """
        known = state[task_key(0, "modules")]
        if known != list(self._layers):
            mine = list(self._layers)[:3]
            raise StoreError(f"expected directions of the layers {mine} and so on, found those of {known[:3]}.")
        self._records = {key: value for key, value in state.items() if _is_record(key)}
        self.num_tasks = num_tasks
        for task in range(num_tasks):
            self._replay(task)
        self.sealed = self._after(num_tasks - 1)
        for module in range(len(self._layers)):
            self._load_layer(module, state)
        self._write_scales()

    def _replay(self, task: int) -> None:
        """Repeat what a task did to the list of blocks."""
        if task_key(task, "adoption/norms") in self._records:
            self.sealed.adopt(**self._read(task, "adoption", "norms", "lengths"))
        for module in self._waiting(task - 1) if task else ():
            self.sealed.drop(module)
        count = self._records.get(task_key(task, "merge/count"))
        if count is not None:
            self.sealed.merge(count, task, **self._read(task, "merge", "norms", "lengths"))
            self.exact_from = task
        self.sealed.add(task, **self._read(task, "magnitudes", "norms", "lengths"))

    def _after(self, task: int) -> SealedBlocks:
        """The blocks as they counted after a task since which none of them was merged or absorbed."""
        return self.sealed.with_values(**self._read(task, "magnitudes", "alpha", "gamma", "delta", "current"))

    def _load_layer(self, module: int, state: State) -> None:
        name, layer = list(self._layers.items())[module]
        pairs = []
        for origin, norm in zip(self.sealed.origins, self.sealed.norms[module].tolist(), strict=True):
            pair, key = _empty(layer), _factor_key(origin, name)
            if norm:
                if key + "down" not in state or key + "up" not in state:
                    raise StoreError(f"expected factors {key}down and {key}up, found none; restore them from a copy.")
                pair = Direction(state[key + "down"], state[key + "up"])
                self._check_norm(module, key, pair, norm)
            pairs.append(pair)
        layer.load_past([pair.down for pair in pairs], [pair.up for pair in pairs])

    def _check_norm(self, module: int, key: str, pair: Direction, norm: float) -> None:
        found = self._size(module, pair)[0]
        if abs(found - norm) > _NORM_TOLERANCE * norm:
            raise StoreError(
                f"expected a direction of norm {norm:.8g} in {key}, found {found:.8g}: its factors were changed; "
                "restore them from a copy."
            )

    # -- models of earlier tasks --------------------------------------------------------------------------------------

    @property
    def earliest_exact(self) -> int:
        """The first task from which on the model after every task can be rebuilt."""
        late = [task + 1 for task in range(self.exact_from, self.num_tasks - 1) if self._waiting(task)]
        return max([self.exact_from, *late])

    def coefficients_at(self, task: int) -> dict[str, Tensor]:
        """What the factors of each block counted with after a task: per layer `(blocks,)` float64, later ones 0.

        Raises:
            DataError: the task was not learned, or directions that its model used were merged or absorbed later.
        """
        if not 0 <= task < self.num_tasks:
            raise DataError(f"there is no model after task {task}; {self.num_tasks} tasks were learned, from 0 on.")
        if task < self.exact_from or (task < self.num_tasks - 1 and self._waiting(task)):
            raise DataError(
                f"the model after task {task} cannot be rebuilt, because directions it used were merged or absorbed "
                f"later; from task {self.earliest_exact} on every model can."
            )
        return self._by_layer(self._after(task).multipliers())

    def coefficients_before(self, task: int) -> dict[str, Tensor] | None:
        """What the blocks counted with when a task after the first began, or None where sealing changes nothing.

        Raises:
            DataError: as `coefficients_at` for the task before, whose newest block was sealed then.
        """
        self.coefficients_at(task - 1)
        if self.sealed.rules.boundary != "jump":
            return None
        sealed = self._after(task - 1)
        sealed.seal()
        return self._by_layer(sealed.multipliers())

    def _by_layer(self, multipliers: Tensor) -> dict[str, Tensor]:
        """Rows `(modules, blocks)` of the oldest blocks by layer, with 0 for the later ones."""
        values = multipliers.new_zeros(len(self._layers), len(self.sealed.origins))
        values[:, : multipliers.shape[1]] = multipliers
        return dict(zip(self._layers, values, strict=True))

    @contextmanager
    def counting(self, coefficients: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the blocks count with other coefficients, per layer `(blocks,)`, until the end of the `with` block.

        Raises:
            DataError: a task is being learned.
        """
        if self._training:
            raise DataError("a task is being learned; look at other models before or after it.")
        before = {name: self._layers[name].past_scale.clone() for name in coefficients}
        try:
            self._set_scales(coefficients)
            yield
        finally:
            for name, scale in before.items():
                self._layers[name].past_scale.copy_(scale)


def _is_record(key: str) -> bool:
    return key.startswith("tasks/") and key.split("/", 2)[2].startswith(_RECORDS)


def _factor_key(origin: Origin, layer: str) -> str:
    if origin == Origin((ADOPTED,)):
        return task_key(0, f"adopted/{layer}/")
    if origin.merged_at is None:
        return task_key(origin.tasks[0], f"adapter/{layer}/")
    return task_key(origin.merged_at, f"merged/{layer}/")


def _base_norm(layer: LowRankLayer) -> float:
    weight = layer.weight.detach()
    return float(weight.float().norm()) if weight.is_floating_point() else 0.0


def _empty(layer: LowRankLayer) -> Direction:
    like = layer.past_scale
    return Direction(like.new_zeros(0, layer.in_features), like.new_zeros(layer.out_features, 0))


def _columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(pairs, dtype=torch.float64)
    return table[:, 0].clone(), table[:, 1].clone()
