"""Uncentred second moments of layer inputs, streamed over batches and merged over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everlora.errors import NumericError, OptionError, ShapeError, TargetError, UnsupportedError
from everlora.lowrank.adapted import base_of
from everlora.lowrank.patches import unfold_patches
from everlora.lowrank.precision import full_precision, normal_mode
from everlora.lowrank.ranks import layer_size

__all__ = ["SecondMoment", "record_moments"]

_POWER_STEPS = 30
_UNFOLDED = 2**22  # numbers of unfolded patches held at once


class SecondMoment:
    """The mean of `x x^T` over all tokens seen, kept as a sum and an integer count.

    Args:
        dim: length of a token vector.
        device: where the sum lies; devices without float64 keep it on the CPU.
        dtype: of the sum, float64 (default) or float32 (half the memory, about 1e-7 relative error).

    Raises:
        OptionError: `dim` is not a positive integer, or `dtype` is neither float64 nor float32.

    Source: sections 3 and 12 of the method page of InfLoRA: sums and counts are merged, matrices never averaged.
    Cost: `dim ** 2` numbers; an update of n tokens is one `n dim ** 2` product.
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise OptionError(f"dim must be a positive integer, got {dim!r}; pass the input width of the layer")
        if dtype not in (torch.float64, torch.float32):
            raise OptionError(f"a second moment is summed in float64 or float32, got {dtype}; use torch.float64")
        place = torch.device("cpu" if device is None else device)
        if place.type == "mps" and dtype == torch.float64:
            place = torch.device("cpu")  # that device has no float64
        self.dim = dim
        self._count = 0
        with normal_mode():
            self._sum = torch.zeros(dim, dim, dtype=dtype, device=place)

    @property
    def count(self) -> int:
        """Tokens accepted so far."""
        return self._count

    @property
    def matrix(self) -> Tensor:
        """The mean of `x x^T`, `(dim, dim)`, exactly symmetric, dtype of the sum.

        Raises:
            NumericError: no token has been accepted.
        """
        if self._count == 0:
            raise NumericError(
                "a second moment needs at least one token and has none; the data was empty or every token was masked"
            )
        return (self._sum + self._sum.T) / (2 * self._count)

    def leading_share(self, power: int = 2) -> float:
        """Share of the largest eigenvalue in the sum of all eigenvalues to the power 1 or 2, to about a percent.

        Raises:
            NumericError: no token has been accepted.
        """
        matrix = self.matrix
        with normal_mode():
            vector = matrix.diagonal().sqrt()  # a start that no symmetric direction is orthogonal to by accident
            for _ in range(_POWER_STEPS):
                vector = matrix @ nn.functional.normalize(vector, dim=0)
            largest = float(vector.norm())
            whole = float(matrix.square().sum() if power == 2 else matrix.diagonal().sum())
        return largest**power / whole if whole > 0 else 0.0

    def update(self, x: Tensor, mask: Tensor | None = None) -> SecondMoment:
        """Add the tokens of one batch.

        Args:
            x: `(..., dim)`, any float dtype; below float64 the product runs in float32.
            mask: `(...,)` bool (or 0/1 integers); False marks a token to be left out of sum and count.

        Returns:
            Itself, so that calls can be chained.

        Raises:
            ShapeError: a shape or dtype does not fit.
            NumericError: an accepted token holds NaN or infinity, or its square overflows; nothing was added.
        """
        if x.ndim < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(f"expected real tokens of shape (..., {self.dim}), got {tuple(x.shape)} of {x.dtype}")
        with normal_mode(), full_precision(x.device):
            tokens = self._select(x.detach(), mask)
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            gram = tokens.T @ tokens
            # A sum of squares is finite only if every entry is, and bounds the entries beside it.
            if not bool(torch.isfinite(gram.diagonal()).all()):
                raise NumericError(
                    "expected finite layer inputs, found NaN, infinity or values whose square overflows; "
                    "check the data, the learning rate or a half-precision overflow in the model"
                )
            self._sum += gram.to(self._sum.device, self._sum.dtype)
        self._count += tokens.shape[0]
        return self

    def _select(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x.reshape(-1, self.dim)
        if mask.shape != x.shape[:-1] or mask.is_floating_point() or mask.is_complex():
            raise ShapeError(
                f"expected a bool mask of shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)} of {mask.dtype}"
            )
        return x[mask.to(x.device, torch.bool)].reshape(-1, self.dim)

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add the tokens another second moment has seen.

        Raises:
            ShapeError: the dimensions differ.
        """
        if other.dim != self.dim:
            raise ShapeError(f"cannot merge a second moment of dim {other.dim} into one of dim {self.dim}")
        with normal_mode():
            self._sum += other._sum.to(self._sum.device, self._sum.dtype)
        self._count += other._count
        return self

    def reset(self) -> None:
        """Forget all tokens."""
        self._sum.zero_()
        self._count = 0

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up sums and counts over all processes; call it once per pass. Without processes it does nothing."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        place = self._sum.device
        if dist.get_backend(group) == "nccl" and place.type == "cpu":
            place = torch.device("cuda", torch.cuda.current_device())
        total = self._sum.to(place, torch.float64, copy=True)
        count = torch.tensor([self._count], dtype=torch.int64, device=place)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        dist.all_reduce(count, op=dist.ReduceOp.SUM, group=group)
        self._sum.copy_(total)
        self._count = int(count.item())

    def sum_with(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up sums and counts over processes, once per pass.

        Args:
            total: returns the sum of a tensor over all processes; of an only one the tensor itself.
        """
        self._sum = total(self._sum)
        self._count = int(total(torch.tensor([self._count])))

    def state_dict(self) -> dict[str, Any]:
        """Return `{"dim", "count", "sum"}`; the tensor is a copy."""
        return {"dim": self.dim, "count": self._count, "sum": self._sum.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the tokens of a saved state; on an error nothing changes.

        Raises:
            ShapeError: the state is of another dimension or lacks a field.
            NumericError: the sum is not finite.
        """
        missing = sorted({"dim", "count", "sum"} - set(state))
        if missing:
            raise ShapeError(f"the state of a second moment lacks {', '.join(missing)}; it is not a saved state")
        total, count = state["sum"], int(state["count"])
        if int(state["dim"]) != self.dim or tuple(total.shape) != (self.dim, self.dim) or count < 0:
            raise ShapeError(
                f"expected the state of a second moment of dim {self.dim}, got dim {state['dim']}, "
                f"sum {tuple(total.shape)}, count {count}"
            )
        if not bool(torch.isfinite(total).all()):
            raise NumericError("the saved sum of a second moment holds NaN or infinity; the file is damaged")
        self._sum.copy_(total)
        self._count = count


@contextmanager
def record_moments(
    groups: Mapping[str, nn.Module], mask: Callable[[], Tensor | None] | None = None, *, normalize: bool = False
) -> Iterator[dict[str, SecondMoment]]:
    """Collect the second moment of what each module reads, for as long as the block runs.

    Args:
        groups: name of an input group to the one member that is listened to.
        mask: gives the token mask `(batch, tokens)` of the batch that is running, or None for all tokens. Modules
            that read one vector per row, `(batch, dim)`, ignore it.
        normalize: scale every vector to length 1 first.

    Yields:
        A second moment for each name, on the device of the module's weight.

    Raises:
        TargetError: a module is no `nn.Linear`, no `nn.Conv2d` (read as unfolded patches), and no adapted layer.
        UnsupportedError: a convolution has several groups.
        ShapeError: in the forward pass, the mask does not fit a module's input; the group is named.
        NumericError: in the forward pass, an input is not finite; the group is named.
    """
    moments = {name: _moment_for(name, module) for name, module in groups.items()}
    handles = []
    try:
        for name, module in groups.items():
            hook = _recording_hook(name, moments[name], mask, normalize=normalize)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _moment_for(name: str, module: nn.Module) -> SecondMoment:
    base = base_of(module)
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        raise TargetError(
            f"cannot record the input of '{name}', a {type(module).__name__}; "
            "linear layers, convolutions and adapted layers only"
        )
    size = layer_size(base)
    if size.groups != 1:
        raise UnsupportedError(
            f"the inputs of '{name}', a convolution with {size.groups} groups, have no common second moment, since "
            "each group reads other channels; name other layers"
        )
    return SecondMoment(size.inputs, device=base.weight.device)


def _recording_hook(
    name: str, moment: SecondMoment, mask: Callable[[], Tensor | None] | None, *, normalize: bool
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        conv = base_of(module)
        try:
            if isinstance(conv, nn.Conv2d):
                _add_patches(moment, x, conv, normalize=normalize)
            else:
                moment.update(_unit(x) if normalize else x, _mask_for(x, None if mask is None else mask()))
        except (NumericError, ShapeError) as error:
            raise type(error)(f"input group '{name}': {error}") from error

    return hook


def _unit(x: Tensor) -> Tensor:
    """Vectors `(..., dim)` of length 1, in at least float32; those of zeros stay."""
    return nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _add_patches(moment: SecondMoment, x: Tensor, conv: nn.Conv2d, *, normalize: bool) -> None:
    """Add a batch of images, some at a time, which bounds the memory that unfolding takes."""
    images = x if x.ndim == 4 else x[None]
    at_once = max(1, _UNFOLDED // max(1, moment.dim * images.shape[-1] * images.shape[-2]))
    for part in torch.split(images, at_once):
        patches = unfold_patches(part, conv)
        moment.update(_unit(patches) if normalize else patches)


def _mask_for(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Bring the batch's mask to the leading shape of one layer's input."""
    if mask is None or mask.shape == x.shape[:-1]:
        return mask
    if mask.numel() == x.numel() // x.shape[-1]:
        return mask.reshape(x.shape[:-1])  # tokens flattened before the layer
    if x.ndim == 2 and x.shape[0] == mask.shape[0]:
        return None  # one pooled vector per row: no padding left
    return mask
