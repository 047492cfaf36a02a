"""How much every direction counts, from task to task: sealing, absorption and merging as plain float64 numbers.

A block is the direction `M = up @ down` that one task added to every adapted module. While it is trained it counts with
a multiplier `c`; once sealed, with the coefficient `alpha * gamma + delta` of `M / n`. Here are those numbers for all
modules and blocks, and the rules by which a boundary between tasks changes them; the factors stay in the layers.

Source: sections 1, 3, 6 and 7 of the method page of SD-LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["ADOPTED", "AbsorptionRules", "BoundaryRules", "MergeRules", "Origin", "SealedBlocks", "block_name"]

ADOPTED = -1  # in the place of a task
_TOO_SMALL = 1e-3  # a magnitude under which `offset=mul` would divide by almost nothing


@dataclass(frozen=True)
class BoundaryRules:
    """What happens to magnitudes between two tasks.

    Attributes:
        alpha_init: magnitude of a new block, and the reset value.
        alpha: old magnitudes go back to `alpha_init`, or are carried on.
        boundary: whether sealing may change the function.
        scope: one magnitude a block for the whole network, or one for each module.
        offset: how a continuous boundary makes up for a shared magnitude: by an offset, or by a gain.
    """

    alpha_init: float
    alpha: Literal["reset", "carry"]
    boundary: Literal["jump", "continuous"]
    scope: Literal["network", "module"]
    offset: Literal["add", "mul"] = "add"


@dataclass(frozen=True)
class AbsorptionRules:
    """When a new direction is replaced by old ones (section 6 of the method page of SD-LoRA).

    Attributes:
        criterion: what is compared, the relative residual (`rho`) or the squared residual of the normalised direction.
        tau: absorbed below.
        late: absorb at the next task's start, with the coefficient that the direction would get there; else at once,
            as it counts now.
    """

    criterion: Literal["rho", "abs_sq"]
    tau: float
    late: bool


@dataclass(frozen=True)
class MergeRules:
    """How old directions are merged to bound the total rank of a layer (section 7 of the method page of SD-LoRA).

    Attributes:
        max_rank: the bound.
        keep_last: how many of the newest are left alone.
        max_error: relative error of a merge beyond which the bound is exceeded instead.
        allocation: `uniform` or `energy`, as `allocate_ranks` takes it.
    """

    max_rank: int
    keep_last: int
    max_error: float
    allocation: Literal["uniform", "energy"]


class Origin(NamedTuple):
    """Where a block comes from: the tasks it stands for, and the task that merged them, if any did.

    `ADOPTED` stands for what was there before the first task.
    """

    tasks: tuple[int, ...]
    merged_at: int | None = None


class SealedBlocks:
    """Norms, magnitudes, gains and offsets of all blocks of all modules, on the CPU in float64.

    Attributes:
        origins: one for each block, oldest first.
        norms: `(modules, blocks)`, what a direction is divided by; 0 for a block that does not count in a module,
            because it is empty or was absorbed.
        lengths: `(modules, blocks)`, Frobenius norms; 0 likewise.
        alpha: `(1, blocks)`, or `(modules, blocks)` with scope `module`.
        gamma: `(modules, blocks)` gains; 1 for a block that is not sealed.
        delta: `(modules, blocks)` offsets; 0 for a block that is not sealed.
        current: `(modules,)` multipliers of the newest block's raw product, until it is sealed; then None.
    """

    def __init__(self, num_modules: int, rules: BoundaryRules) -> None:
        self.rules = rules
        self.origins: list[Origin] = []
        self.norms, self.lengths, self.gamma, self.delta = (_none(num_modules) for _ in range(4))
        self.alpha = _none(num_modules if rules.scope == "module" else 1)
        self.current: Tensor | None = None

    def add(self, task: int, norms: Tensor, lengths: Tensor) -> None:
        """Append the trained block of a task; what it counts with comes by `set_magnitudes`.

        Args:
            task: index of the task.
            norms: `(modules,)`, 0 where the block is empty.
            lengths: `(modules,)` Frobenius norms, 0 likewise.
        """
        self.origins.append(Origin((task,)))
        self.norms, self.lengths = _append(self.norms, norms), _append(self.lengths, lengths)
        self.gamma, self.delta = _append(self.gamma, 1.0), _append(self.delta, 0.0)

    def set_magnitudes(self, alpha: Tensor, current: Tensor) -> None:
        """Take the trained magnitudes `(blocks,)` or `(modules, blocks)` and the newest block's multipliers."""
        self.alpha = alpha.detach().to("cpu", torch.float64).reshape(-1, len(self.origins)).clone()
        self.current = current.detach().to("cpu", torch.float64).clone()

    def with_values(self, *, alpha: Tensor, gamma: Tensor, delta: Tensor, current: Tensor) -> SealedBlocks:
        """Return the oldest of these blocks, as many as `gamma (modules, blocks)` has, with other magnitudes."""
        count = gamma.shape[1]
        other = SealedBlocks(len(gamma), self.rules)
        other.origins = self.origins[:count]
        other.norms, other.lengths = self.norms[:, :count].clone(), self.lengths[:, :count].clone()
        other.gamma, other.delta = gamma.clone(), delta.clone()
        other.set_magnitudes(alpha, current)
        return other

    def multipliers(self) -> Tensor:
        """What each raw product `M` counts with, `(modules, blocks)`; exactly 0 where a block does not count."""
        values = _over(self.alpha * self.gamma + self.delta, self.norms)
        if self.current is not None:
            values[:, -1] = torch.where(self.norms[:, -1] > 0, self.current, 0.0)
        return values

    def gains(self) -> tuple[Tensor, Tensor]:
        """`(modules, blocks)` gain and offset, both over the norm: block k counts with `alpha * gain + offset`."""
        return _over(self.gamma, self.norms), _over(self.delta, self.norms)

    def in_force(self) -> Tensor:
        """`(modules,)` coefficient of the newest direction as it counts now, its multiplier times its norm."""
        return self.multipliers()[:, -1] * self.norms[:, -1]

    def absorb(self, module: int, weight: float, beta: Tensor) -> None:
        """Replace the newest direction of a module by `weight * sum_i beta_i D_i` of the older ones.

        Args:
            module: its number.
            weight: coefficient that the direction has, or would get.
            beta: `(blocks - 1,)` least-squares coefficients.
        """
        self.delta[module, :-1] += weight * beta
        self.drop(module)

    def drop(self, module: int) -> None:
        """Let the newest block count no more in a module."""
        self.norms[module, -1] = self.lengths[module, -1] = 0.0

    def seal(self) -> None:
        """Turn the newest block into a normalised direction, and reset or carry the magnitudes."""
        rules = self.rules
        after = self.alpha.clone() if rules.alpha == "carry" else torch.full_like(self.alpha, rules.alpha_init)
        if rules.boundary == "continuous":
            self._keep_function(after)
        self.alpha, self.current = after, None

    def merge(self, count: int, task: int, norms: Tensor, lengths: Tensor) -> None:
        """Replace the oldest sealed blocks by one that stands for their sum as it counts now.

        Args:
            count: how many.
            task: the task before whose training this happens.
            norms: `(modules,)` of the new block, whose raw product is the sum; 0 where there is nothing to keep.
            lengths: `(modules,)` Frobenius norms, 0 likewise.
        """
        tasks = tuple(index for origin in self.origins[:count] for index in origin.tasks)
        self.origins = [Origin(tasks, task), *self.origins[count:]]
        self._put_first(norms, lengths, count)

    def adopt(self, norms: Tensor, lengths: Tensor) -> None:
        """Begin with a sealed block that counts as it is.

        Args:
            norms: `(modules,)` of the product of its factors, 0 where there are none.
            lengths: `(modules,)` Frobenius norms, 0 likewise.
        """
        self.origins = [Origin((ADOPTED,))]
        self._put_first(norms, lengths, 0)

    def _put_first(self, norms: Tensor, lengths: Tensor, count: int) -> None:
        """Put a sealed block that counts with its own norm in the place of the oldest ones."""
        self.norms, self.lengths = _first(norms, self.norms, count), _first(lengths, self.lengths, count)
        start = self.rules.alpha_init
        self.alpha = _first(torch.full((len(self.alpha),), start, dtype=torch.float64), self.alpha, count)
        self.gamma = _first(torch.ones_like(norms), self.gamma, count)
        self.delta = _first(torch.where(norms > 0, norms - start, 0.0), self.delta, count)

    def _keep_function(self, after: Tensor) -> None:
        """Set gains and offsets so that every direction counts as before although the magnitudes become `after`."""
        weight, live = self.in_force(), self.norms[:, -1] > 0
        self.delta[:, :-1] += (self.gamma * (self.alpha - after))[:, :-1]
        newest = after[:, -1].expand(len(weight))
        if self.rules.scope == "module" and self.rules.alpha == "carry":
            after[:, -1] = weight
            return
        gains = live & (newest.abs() >= _TOO_SMALL) if self.rules.offset == "mul" else torch.zeros_like(live)
        self.gamma[:, -1] = torch.where(gains, weight / newest, 1.0)
        self.delta[:, -1] = torch.where(live & ~gains, weight - newest, 0.0)


def block_name(origin: Origin) -> str:
    """Name of a block in figures: the task or tasks that it stands for."""
    first, last = origin.tasks[0], origin.tasks[-1]
    if first == ADOPTED:
        return "adapter" if last == ADOPTED else f"adapter to task {last}"
    return f"task {first}" if first == last else f"tasks {first} to {last}"


def _none(rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.float64)


def _append(matrix: Tensor, column: Tensor | float) -> Tensor:
    values = torch.as_tensor(column, dtype=torch.float64).expand(len(matrix))
    return torch.cat([matrix, values[:, None]], dim=1)


def _first(column: Tensor, matrix: Tensor, count: int) -> Tensor:
    return torch.cat([column[:, None], matrix[:, count:]], dim=1)


def _over(values: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, values / torch.where(norms > 0, norms, 1.0), 0.0)
