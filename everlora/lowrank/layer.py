"""Adapted layers: a frozen base, the frozen past as factors, and the block that is being trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlora.errors import ShapeError, UnsupportedError
from everlora.lowrank.adapted import FORWARD_MODES, LowRankLayer
from everlora.lowrank.kernels import trained_kernel
from everlora.lowrank.magnitudes import Magnitudes
from everlora.lowrank.patches import unfold_patches
from everlora.lowrank.precision import autocast_dtype, without_autocast
from everlora.lowrank.products import factored_branch, folded_linear
from everlora.lowrank.scaled_products import Branches, factored_scaled, folded_scaled, known_form
from everlora.lowrank.sharing import project

__all__ = ["FORWARD_MODES", "AdaptedLayer", "LowRankConv2d", "LowRankLinear"]


class LowRankLinear(LowRankLayer):
    """`y = x (W0 + sum_s scale_s up_s down_s + scale * up down)^T + bias`: see `LowRankLayer` for all options.

    Both forms give gradients to the current factors by thin products only.
    """

    kind = nn.Linear
    base: nn.Linear

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the tokens of `x (..., in)` as rows `(n, in)`."""
        return x.reshape(-1, self.in_features)

    def _folded(self, x: Tensor) -> Tensor:
        weight, bias = self._refresh(), self.base.bias
        dtype = autocast_dtype(x)
        trains = self.rank > 0 and (self.up.requires_grad or self.down.requires_grad)
        by = self._magnitudes
        flows = self._trains() or x.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and flows):
            weight = weight if dtype is None else self._working.weight_as(dtype)
            return functional.linear(x, weight, bias)
        wide = x if dtype is None else x.to(dtype)
        if by is not None:
            return folded_scaled(wide, bias, self._branches(by), self._working, known_form(self.gradient_form))
        projection = self._project(x, self.down) if trains else None
        return folded_linear(
            wide, self.up, self.down, bias, projection=projection, working=self._working, scale=self.scale
        )

    def _factored(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.rank + self.total_rank == 0:
            return y
        if self._magnitudes is not None:
            return factored_scaled(y, x, self._branches(self._magnitudes))
        columns = self._joined.refresh(self._past(), self.down, self.up, self.group, scale=self.scale)
        projection = self._project(x, columns[0])
        return factored_branch(y, x, self.up, self.down, projection=projection, columns=columns, scale=self.scale)

    def _dropping(self, x: Tensor) -> Tensor:
        self._refuse_magnitudes("adapter dropout")
        y: Tensor = self.base(x)
        dtype = torch.promote_types(x.dtype, self.up.dtype)
        with without_autocast(x.device):
            wide = x.to(dtype)
            branch = self.scale * functional.dropout(wide, self.dropout) @ self.down.T @ self.up.T
            if self.total_rank:
                branch = branch + wide @ self.past_down.T @ (self.past_up * self.past_scale).T
            return (y + branch).to(y.dtype)

    def _project(self, x: Tensor, down: Tensor) -> Tensor:
        return project(x, down) if self.group is None else self.group.project(x, down)

    def _branches(self, by: Magnitudes) -> Branches:
        return Branches(self.up, self.down, by.coefficients(self.down, self.up), self._frozen(by))


class LowRankConv2d(LowRankLayer):
    """A convolution with low-rank branches in PEFT's form: see `LowRankLayer` for all options.

    The kernels are written as rows: the weight `(O, I / g, k1, k2)` is the matrix `(O, (I / g) * k1 * k2)` on patches,
    `down (g * rank, (I / g) * k1 * k2)` holds `rank` kernels for each of the `g` groups, and `up (O, rank)` mixes, for
    each output channel, those of its group. Stride, padding, dilation and padding mode are the base's for every branch,
    so that a branch is also a convolution with `down` followed by one of size 1 with `up`: that is the factored form.
    The folded form is one convolution with the working weight; its gradients to the factors are thin products of the
    gradient of that weight.

    Parameters of a block: `rank * (I * k1 * k2 + O)` for any number of groups.

    Source: section 3.1 of the reference on convolutional networks.
    """

    kind = nn.Conv2d
    base: nn.Conv2d

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the patches of `x (n, channels, height, width)` as rows, in the order of `weight.flatten(1)`.

        Raises:
            UnsupportedError: the convolution has several groups, which read different patches.
        """
        return unfold_patches(x, self.base).reshape(-1, self.in_features)

    def as_kernels(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Give factors the shapes of two convolutions, as PEFT stores them.

        Args:
            down: `(g * rank, (I / g) * k1 * k2)`.
            up: `(O, rank)`.

        Returns:
            Views `(g * rank, I / g, k1, k2)` and `(O, rank, 1, 1)`.
        """
        return down.reshape(len(down), *self.base.weight.shape[1:]), up[:, :, None, None]

    def as_rows(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `as_kernels`.

        Raises:
            ShapeError: the kernels are not those of such a layer.
        """
        kernel = tuple(self.base.weight.shape[1:])
        fits = down.ndim == 4 and tuple(down.shape[1:]) == kernel and up.ndim == 4
        if not fits or tuple(up.shape) != (self.out_features, down.shape[0] // self.groups, 1, 1):
            raise ShapeError(
                f"expected kernels (rank, {', '.join(map(str, kernel))}) and ({self.out_features}, rank, 1, 1), got "
                f"{tuple(down.shape)} and {tuple(up.shape)}"
            )
        return down.flatten(1), up.flatten(1)

    def require_peft(self) -> None:
        """Check that plain PEFT computes the same from these factors.

        Raises:
            UnsupportedError: the convolution has groups, dilation or a padding mode, which PEFT's branch drops.
        """
        conv, lost = self.base, []
        lost += [f"groups={conv.groups}"] if conv.groups != 1 else []
        lost += [f"dilation={conv.dilation}"] if tuple(conv.dilation) != (1, 1) else []
        lost += [f"padding_mode={conv.padding_mode!r}"] if conv.padding_mode != "zeros" else []
        if lost:
            raise UnsupportedError(
                f"a convolution with {', '.join(lost)} cannot be written for PEFT, whose branch leaves that out; "
                "export it merged"
            )

    def _folded(self, x: Tensor) -> Tensor:
        weight = self._refresh()
        if torch.is_grad_enabled() and self._trains():
            by = self._magnitudes
            magnitudes = None if by is None else (by.coefficients(self.down, self.up), self._frozen(by))
            weight = trained_kernel(
                self.up, self.down, weight=weight, groups=self.groups, scale=self.scale, magnitudes=magnitudes
            )
        y: Tensor = self.base._conv_forward(x, weight, self.base.bias)
        if y.requires_grad:
            self._guard(y)
        return y

    def _guard(self, y: Tensor) -> None:
        """Refuse a backward pass after the working weight was rebuilt, before anything is computed from it."""
        working, generation = self._working, self._working.generation

        def check(gradient: Tensor) -> None:
            working.require(generation, changed="factors or magnitudes")

        y.register_hook(check)  # type: ignore[no-untyped-call]

    def _factored(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.rank + self.total_rank == 0:
            return y
        dtype = torch.promote_types(x.dtype, self.up.dtype)
        with without_autocast(x.device):
            first, second = self.as_kernels(*(factor.to(dtype) for factor in self._columns()))
            # The base's own method, so that padding by mode or by name is done as the base does it.
            thin = self.base._conv_forward(x.to(dtype), first, None)
            branch = functional.conv2d(thin, second, groups=self.groups)
            return (branch + y).to(y.dtype)


AdaptedLayer = LowRankLinear | LowRankConv2d
