"""The memory of protected input directions (DualGPM), and the design of new down-projections outside it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from everlora.errors import OptionError, ShapeError, nearest
from everlora.lowrank.leading import Wanted, leading
from everlora.lowrank.moments import SecondMoment
from everlora.lowrank.precision import normal_mode, without_autocast
from everlora.lowrank.spectrum import (
    as_symmetric,
    complete,
    energy_tails,
    orient,
    require_orthonormal,
    scaled,
    spectrum,
    total_energy,
)

__all__ = ["GradientMemory"]

_LOG = logging.getLogger("everlora.lowrank.memory")
_ENERGIES = ("moment_squared", "moment")
_FIRST_TASKS = ("below", "reach")
_DECOMPOSITIONS = ("auto", "full", "partial")
_WIDE = 448  # from this many free directions on a partial decomposition is faster
_SLACK = 1e-12  # rounding allowed in a comparison with a threshold
_CLEAN = 1e-13  # deviation from orthonormal columns that is left as it is
_NEGLIGIBLE = 1e-8  # protected part of new directions that one round removes to rounding
_PROBES, _SEED = 8, 20240404  # one skewed pair escapes eight normal numbers with a probability below 1e-8
_STATE_FIELDS = ("dim", "occupied", "last_added", "updates", "form", "energy", "first_task")


class GradientMemory:
    """Orthonormal input directions that later tasks must leave alone.

    Directions are only ever appended: an update never changes a bit of those already there, so a memory can be
    rebuilt exactly from what each task added. The complement is a deterministic function of the directions.

    Args:
        dim: length of an input vector.
        form: what `design` decomposes in the free space, `"moment_squared"` (the official code) or `"moment"` (the
            paper).
        energy: what `update` and `captured` count as energy, squared eigenvalues of the moment or eigenvalues.
        first_task: `"below"` stops the first update one direction short of the threshold, as the official code
            does; `"reach"` uses the general rule.
        decomposition: `"full"` takes whole eigen-decompositions; `"partial"` looks for the leading directions alone
            and takes the whole one where it cannot prove that they agree to 1e-7 (near-ties, flat spectra, many
            directions); `"auto"` is partial while at least 448 directions are free. The number added is the same.
        dtype: of the tensors handed out, float64 or float32; inside, everything is float64.
        device: where the memory lies; devices without float64 are served from the CPU.

    Raises:
        OptionError: an option is unknown or out of range.

    Source: sections 4, 5, 8 and 12 of the method page of InfLoRA; Liang and Li, "InfLoRA", CVPR 2024.
    Cost: `dim * occupied_rank` float64, plus `dim * free_rank` for the complement while it is cached.
    """

    def __init__(
        self,
        dim: int,
        *,
        form: str = "moment_squared",
        energy: str = "moment_squared",
        first_task: str = "below",
        decomposition: Literal["auto", "full", "partial"] = "auto",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise OptionError(f"dim must be a positive integer, got {dim!r}; pass the input width of the layer")
        if dtype not in (torch.float64, torch.float32):
            raise OptionError(f"a memory hands out float64 or float32, got {dtype}; use torch.float64")
        self.dim = dim
        self.form = _choice("form", form, _ENERGIES)
        self.energy = _choice("energy", energy, _ENERGIES)
        self.first_task = _choice("first_task", first_task, _FIRST_TASKS)
        self.decomposition = _choice("decomposition", decomposition, _DECOMPOSITIONS)
        self.dtype = dtype
        self.device = torch.device("cpu" if device is None else device)
        self._place = torch.device("cpu") if self.device.type == "mps" else self.device
        self._updates = 0
        self._last_added = 0
        with normal_mode():
            self._occupied = torch.zeros(dim, 0, dtype=torch.float64, device=self._place)
        self._free: Tensor | None = None

    @property
    def occupied_rank(self) -> int:
        """Number of protected directions."""
        return self._occupied.shape[1]

    @property
    def free_rank(self) -> int:
        """Number of directions left; `occupied_rank + free_rank == dim`."""
        return self.dim - self.occupied_rank

    @property
    def updates(self) -> int:
        """Successful updates so far; the first one may follow its own rule."""
        return self._updates

    @property
    def kind(self) -> str:
        """`"occupied"` while at most half of the space is protected, then `"free"`: the smaller side."""
        return "free" if 2 * self.occupied_rank > self.dim else "occupied"

    @property
    def basis(self) -> Tensor:
        """Orthonormal columns of the side that `kind` names, `(dim, m)`, a copy in the memory's dtype."""
        side = self._occupied if self.kind == "occupied" else self._free_basis()
        return side.to(self.device, self.dtype, copy=True)

    @property
    def last_added(self) -> Tensor:
        """What the last update or `append` added, `(dim, n)` float64, a copy bit for bit."""
        return self._occupied[:, self.occupied_rank - self._last_added :].clone()

    def design(self, second_moment: SecondMoment | Tensor, rank: int, pad: bool = False) -> Tensor:
        """Choose a down-projection for the next task, inside the free space; the memory does not change.

        Args:
            second_moment: of the new task's inputs, a `SecondMoment` or a symmetric `(dim, dim)` tensor.
            rank: how many rows are wanted.
            pad: append rows of zeros where the free space has too few directions.

        Returns:
            `(min(rank, free_rank), dim)`, or `(rank, dim)` with `pad`: orthogonal rows of norm `1 / sqrt(3)`, the
            expected norm under the usual LoRA start, each with its largest entry positive.

        Raises:
            OptionError: `rank` is not a positive integer.
            ShapeError: the moment has the wrong shape, dtype or is not symmetric.
            NumericError: the moment is empty or not finite.

        Warns:
            UserWarning: fewer than `rank` directions are free.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise OptionError(f"rank must be a positive integer, got {rank!r}; the usual value is 10")
        with normal_mode():
            moment, _ = self._accept(second_moment)
            count = min(rank, self.free_rank)
            if count < rank:
                warnings.warn(
                    f"only {self.free_rank} of {self.dim} input directions are free, fewer than rank {rank}; "
                    f"the branch gets {count}; lower the thresholds or the rank to keep room for later tasks",
                    stacklevel=2,
                )
            down = self._leading_directions(moment, count).T / math.sqrt(3.0)
            if pad and count < rank:
                down = torch.cat([down, down.new_zeros(rank - count, self.dim)])
            return down.to(self.device, self.dtype).contiguous()

    def update(self, second_moment: SecondMoment | Tensor, threshold: float, reserve: int = 0) -> int:
        """Protect the fewest further directions with which the captured energy reaches the threshold.

        Args:
            second_moment: of the inputs of the task just learned, a `SecondMoment` or a symmetric tensor.
            threshold: fraction of the energy, in (0, 1]. Energy of at most 1e-12 of the total counts as rounding:
                with threshold 1 directions whose eigenvalue is below about 1e-6 of the largest stay free.
            reserve: directions to keep free for later tasks, fewer than `dim`: where the threshold asks for more
                than that leaves, the leading ones are taken and the energy left out is logged.

        Returns:
            How many directions were added; 0 is normal.

        Raises:
            OptionError: `threshold` is outside (0, 1], or `reserve` is outside [0, dim).
            ShapeError: the moment has the wrong shape, dtype or is not symmetric.
            NumericError: the moment is empty or not finite.

        Warns:
            UserWarning: the moment is zero; nothing is added and the update does not count as the first.
        """
        if isinstance(threshold, bool) or not 0.0 < threshold <= 1.0:
            raise OptionError(f"threshold must lie in (0, 1], got {threshold!r}; the usual value is 0.95")
        if not 0 <= reserve < self.dim:
            raise OptionError(f"reserve={reserve} leaves nothing to protect of {self.dim} input directions; lower it")
        with normal_mode():
            moment, scale = self._accept(second_moment)
            if scale == 0.0:
                warnings.warn("the second moment is zero, nothing to protect; check the layer's inputs", stacklevel=2)
                self._last_added = 0
                return 0
            needed = self._directions_needed(moment, threshold)
            directions = needed[:, : max(0, self.free_rank - reserve)]
            self._extend(self._orthogonalised(directions))
            if directions.shape[1] < needed.shape[1]:
                self._log_left_out(moment, needed.shape[1] - directions.shape[1])
            return directions.shape[1]

    def append(self, directions: Tensor, *, counted: bool = True) -> None:
        """Replay directions that an earlier update added, bit for bit.

        Args:
            directions: `(dim, n)` float64 as `last_added` gave them; `n = 0` replays an update that added nothing.
            counted: whether the replayed update counted (`updates` rose); False only for a zero second moment.

        Raises:
            ShapeError: wrong shape or dtype, more columns than are free, or columns that are not orthonormal to
                each other and to the memory.
        """
        if directions.ndim != 2 or directions.shape[0] != self.dim or directions.dtype != torch.float64:
            raise ShapeError(
                f"expected float64 directions of shape ({self.dim}, n), got {tuple(directions.shape)} of "
                f"{directions.dtype}; pass what last_added gave"
            )
        if directions.shape[1] > self.free_rank:
            raise ShapeError(f"{directions.shape[1]} directions do not fit: only {self.free_rank} are free")
        with normal_mode():
            added = directions.detach().to(self._place, copy=True)
            require_orthonormal(self._occupied, added)
            self._extend(added, counted=counted)

    def project_free(self, x: Tensor) -> Tensor:
        """Remove from each vector its component in the protected space.

        Args:
            x: `(..., dim)`, any float dtype; the product runs in at least float32.

        Returns:
            Same shape and dtype as `x`; a copy of `x` when nothing is protected.

        Raises:
            ShapeError: the last dimension is not `dim`, or `x` is not of a float dtype.
        """
        if x.ndim < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(f"expected real vectors of shape (..., {self.dim}), got {tuple(x.shape)} of {x.dtype}")
        if self.occupied_rank == 0:
            return x.clone()
        compute = torch.promote_types(x.dtype, torch.float32)
        side = (self._occupied if self.kind == "occupied" else self._free_basis()).to(x.device, compute)
        with without_autocast(x.device):
            wide = x.to(compute)
            inside = (wide @ side) @ side.T
            return (wide - inside if self.kind == "occupied" else inside).to(x.dtype)

    def captured(self, second_moment: SecondMoment | Tensor, energy: str | None = None) -> float:
        """Return the fraction of a moment's energy inside the protected space, 0 for a zero moment.

        Args:
            second_moment: a `SecondMoment` or a symmetric `(dim, dim)` tensor.
            energy: `"moment_squared"` for `|M^T C|^2 / |C|^2`, `"moment"` for `tr(M^T C M) / tr(C)`; the memory's
                own by default.

        Raises:
            OptionError: `energy` is unknown.
            ShapeError: the moment has the wrong shape, dtype or is not symmetric.
            NumericError: the moment is empty or not finite.
        """
        squared = _choice("energy", self.energy if energy is None else energy, _ENERGIES) == "moment_squared"
        with normal_mode():
            moment, scale = self._accept(second_moment)
            if scale == 0.0:
                return 0.0
            return self._held_energy(moment, squared) / total_energy(moment, squared)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: the directions (a copy), counts and options."""
        return {
            "dim": self.dim,
            "occupied": self._occupied.clone(),
            "last_added": self._last_added,
            "updates": self._updates,
            "form": self.form,
            "energy": self.energy,
            "first_task": self.first_task,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved memory, bit for bit; on an error nothing changes.

        Raises:
            ShapeError: a field is missing, or the directions do not fit `dim` or are not orthonormal.
            OptionError: the state was made with another form, energy or first-task rule.
        """
        missing = [name for name in _STATE_FIELDS if name not in state]
        if missing:
            raise ShapeError(f"the state of a memory lacks {', '.join(missing)}; it is not a saved state")
        for name, mine in (("form", self.form), ("energy", self.energy), ("first_task", self.first_task)):
            if state[name] != mine:
                raise OptionError(
                    f"this memory has {name}='{mine}', the saved one {name}='{state[name]}'; use the same"
                )
        occupied = state["occupied"]
        added, updates = int(state["last_added"]), int(state["updates"])
        shape = tuple(occupied.shape)
        fits = len(shape) == 2 and shape[0] == self.dim == int(state["dim"]) and 0 <= added <= shape[1] <= self.dim
        if not fits or updates < 0 or occupied.dtype != torch.float64:
            raise ShapeError(
                f"expected the state of a memory of dim {self.dim} in float64, got dim {state['dim']} with directions "
                f"{shape} of {occupied.dtype}, {added} added last, {updates} updates"
            )
        with normal_mode():
            columns = occupied.detach().to(self._place, copy=True)
            require_orthonormal(columns[:, :0], columns)
        self._occupied, self._last_added, self._updates, self._free = columns, added, updates, None

    def _free_basis(self) -> Tensor:
        if self._free is None:
            with normal_mode():
                self._free = complete(self._occupied)
        return self._free

    def _leading_directions(self, moment: Tensor, count: int) -> Tensor:
        """Design directions in the free space, `(dim, count)`."""
        squared = self.form == "moment_squared"
        if self._is_partial and count:
            part = leading(moment, self._occupied, Wanted(count=count), squared=squared)
            if part is not None:
                return orient(part.directions)
        whole = spectrum(moment, self._occupied, squared=squared, resolve=count)
        self._log_effective_rank(whole.values, count)
        return whole.leading(count)

    def _directions_needed(self, moment: Tensor, threshold: float) -> Tensor:
        """Fewest directions that reach the threshold, `(dim, n)`."""
        squared = self.energy == "moment_squared"
        total = total_energy(moment, squared)
        one_less = self._updates == 0 and self.first_task == "below" and threshold < 1.0
        resolve_all = 1.0 - threshold < 1e-10
        if self._is_partial and not resolve_all:
            wanted = Wanted(
                rest=total - self._held_energy(moment, squared),
                limit=(1.0 - threshold + _SLACK) * total,
                total=total,
                one_less=one_less,
            )
            if wanted.is_enough_already():
                return moment.new_zeros(self.dim, 0)
            part = leading(moment, self._occupied, wanted, squared=squared)
            if part is not None:
                return orient(part.directions)
        whole = spectrum(moment, self._occupied, squared=squared, resolve=None if resolve_all else 0)
        count = int((energy_tails(whole.values / total) > 1.0 - threshold + _SLACK).sum())
        return whole.leading(max(1, count - 1) if one_less else count)

    @property
    def _is_partial(self) -> bool:
        return self.decomposition == "partial" or (self.decomposition == "auto" and self.free_rank >= _WIDE)

    def _held_energy(self, moment: Tensor, squared: bool) -> float:
        inside = self._occupied.T @ moment
        return float(inside.square().sum() if squared else (inside * self._occupied.T).sum())

    def _orthogonalised(self, directions: Tensor) -> Tensor:
        """Clean rounding off new directions, oriented as they come; the protected ones stay as they are."""
        for _ in range(2 if self.occupied_rank else 0):
            inside = self._occupied.T @ directions
            directions = directions - self._occupied @ inside
            if not inside.numel() or float(inside.abs().max()) < _NEGLIGIBLE:
                break  # what rounding adds when so little is removed, a second round would add again
        if directions.shape[1] == 0 or _skew(directions) < _CLEAN:
            # As a decomposition mostly leaves them; factorising many costs as much again.
            return orient(directions) if self.occupied_rank else directions
        columns, triangle = torch.linalg.qr(directions)
        # The factorisation may flip columns; undo that, then settle the sign of ties on the final values.
        return orient(columns * torch.where(triangle.diagonal() < 0, -1.0, 1.0))

    def _extend(self, directions: Tensor, *, counted: bool = True) -> None:
        if directions.shape[1]:
            self._occupied = torch.cat([self._occupied, directions], dim=1)
            self._free = None
        self._last_added = directions.shape[1]
        self._updates += int(counted)
        _LOG.debug("%d directions added, %d of %d protected", self._last_added, self.occupied_rank, self.dim)

    def _accept(self, second_moment: SecondMoment | Tensor) -> tuple[Tensor, float]:
        matrix = second_moment.matrix if isinstance(second_moment, SecondMoment) else second_moment
        return scaled(as_symmetric(matrix, self.dim, self._place))

    def _log_left_out(self, moment: Tensor, count: int) -> None:
        squared = self.energy == "moment_squared"
        share = 1.0 - self._held_energy(moment, squared) / total_energy(moment, squared)
        message = (
            "%d directions that the threshold asks for are left out to keep %d free; %.3g %% of energy is unprotected"
        )
        _LOG.info(message, count, self.free_rank, 100 * share)

    def _log_effective_rank(self, values: Tensor, count: int) -> None:
        if count == 0:
            return
        excited = int((values[:count] > 1e-16 * values[0]).sum())
        if excited < count:
            _LOG.info("only %d of %d designed directions are excited by the task's inputs", excited, count)


def _skew(columns: Tensor) -> float:
    """Estimate how far `columns (dim, n)` are from orthonormal, by a few fixed probes instead of all inner products."""
    generator = torch.Generator().manual_seed(_SEED)
    probes = torch.randn(columns.shape[1], _PROBES, generator=generator, dtype=torch.float64).to(columns.device)
    return float((columns.T @ (columns @ probes) - probes).abs().max())


def _choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise OptionError(f"{name}={value!r} is not known; {nearest(str(value), known)}")
    return value
