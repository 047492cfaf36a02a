"""What every adapted layer has in common: a frozen base, its blocks, and what they count with."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, ShapeError, TargetError, UnsupportedError, nearest
from everlora.lowrank.block_store import BlockStore
from everlora.lowrank.grouped import add_product, join_rows
from everlora.lowrank.magnitudes import Magnitudes
from everlora.lowrank.precision import full_precision, normal_mode
from everlora.lowrank.ranks import layer_size
from everlora.lowrank.scaled_products import known_form
from everlora.lowrank.sharing import InputGroup
from everlora.lowrank.working import Block, ConcatenatedFactors, PastFactors, WorkingWeight

__all__ = ["FORWARD_MODES", "LowRankLayer", "base_of"]

FORWARD_MODES = ("auto", "folded", "factored")

Layer = TypeVar("Layer", bound="LowRankLayer")


class LowRankLayer(BlockStore):
    """A layer with the weight `W0 + sum_s scale_s up_s down_s + scale * up down`, with `W0` frozen and never written.

    The sum over s is the past: frozen blocks. `up` and `down` are the current block. `LowRankLinear` and
    `LowRankConv2d` say what the layer does with its weight.

    `forward_mode` says how it is computed. `"folded"`: one product with a working weight, rebuilt when a factor
    changes; costs the same whatever the past. `"factored"`: the base product plus thin float32 products over all
    factors, for bases whose dtype would round the update away. `"auto"`: folded for a float32 or float64 base, factored
    otherwise.

    `set_magnitudes` puts trained coefficients in the place of `past_scale` and before the current block.

    A write to a factor through `tensor.data` cannot be seen; call `invalidate` after it. `torch.compile` runs the
    layer outside the graph.

    Args:
        base: the layer to adapt; its parameters are frozen.
        rank: of the first block, 0 for none.
        forward_mode: see above.
        train_down: whether `down` of a block is trained; if not, what only its gradient needs is not kept.
        generator: draws the first `down`; the global generator by default.
        gradient_form: how the folded form of a linear layer with magnitudes computes gradients of the factors and
            coefficients: `"thin"` products over all columns, `"dense"` from one product of the size of the base, or
            the cheaper of the two (`"auto"`). An attribute, to be changed at any time.
        scale: what the current block counts with, `alpha / rank` for instance; no part of the state.
        dropout: share of the current block's inputs that are dropped while training. An attribute.

    Raises:
        OptionError: `rank`, `forward_mode`, `gradient_form` or `scale` is out of range.
        TargetError: the base is of another kind.
        UnsupportedError: folding was asked for a quantised base.
    """

    kind: ClassVar[type[nn.Module]]
    base: nn.Linear | nn.Conv2d

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        rank: int,
        *,
        forward_mode: str = "auto",
        train_down: bool = True,
        generator: torch.Generator | None = None,
        gradient_form: str = "auto",
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        if not isinstance(base, self.kind):
            raise TargetError(f"expected a {self.kind.__name__} to adapt, found a {type(base).__name__}")
        if forward_mode not in FORWARD_MODES:
            raise OptionError(f"forward_mode={forward_mode!r} is not known; {nearest(forward_mode, FORWARD_MODES)}")
        size = layer_size(base)
        # Quantised weights are packed: several to a number, or in few bits with their scales elsewhere.
        is_packed = base.weight.numel() != size.outputs * size.inputs or not base.weight.is_floating_point()
        if forward_mode == "folded" and is_packed:
            raise UnsupportedError(
                f"a quantised base weight ({base.weight.dtype}) cannot be folded; use forward_mode='factored' or 'auto'"
            )
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=dtype, device=base.weight.device)
        super().__init__(size, like, train_down=train_down)
        self._is_packed = is_packed
        self._base_flags = [parameter.requires_grad for parameter in base.parameters()]
        self.base = base.requires_grad_(False)
        self.forward_mode = forward_mode
        self.gradient_form = known_form(gradient_form)
        self.group: InputGroup | None = None
        self._working, self._joined = WorkingWeight(self.groups), ConcatenatedFactors()
        self._magnitudes: Magnitudes | None = None
        self.scale, self.dropout = scale, dropout
        self.start_block(rank, generator=generator)
        if self.resolved_mode == "folded":
            self._refresh()  # the buffers exist from now on, so later tasks need no more memory than the first

    @property
    def scale(self) -> float:
        """What the current block counts with, apart from magnitudes; stays when a new block is started.

        Raises:
            OptionError: on setting, the number is not finite, or magnitudes are set.
        """
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if not math.isfinite(value):
            raise OptionError(f"the scale of the current block must be finite, got {value!r}")
        self._refuse_magnitudes("another scale")
        self._scale = float(value)
        self.invalidate()

    @property
    def resolved_mode(self) -> str:
        """`"folded"` or `"factored"`: what `forward_mode` means for the base's present dtype."""
        if self.forward_mode != "auto":
            return self.forward_mode
        is_wide = self.base.weight.dtype in (torch.float32, torch.float64)
        return "folded" if is_wide and not self._is_packed else "factored"

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight, for code that looks up a dtype or device; `effective_weight` has the branches."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """Return the rows `(n, in_features)` that the weight multiplies when the layer reads `x`."""

    def forward(self, x: Tensor) -> Tensor:
        """Do what the base does, with the branches added."""
        if torch.compiler.is_compiling():
            # Imported here because it loads the compiler, seconds that only those who compile should spend.
            from everlora.lowrank.uncompiled import forward_uncompiled

            return forward_uncompiled(self, x)
        return self.forward_eager(x)

    def forward_eager(self, x: Tensor) -> Tensor:
        """Do what `forward` does; never traced."""
        if self.dropout and self.training and self.rank:
            return self._dropping(x)
        return self._folded(x) if self.resolved_mode == "folded" else self._factored(x)

    @abstractmethod
    def _folded(self, x: Tensor) -> Tensor:
        """Use the working weight."""

    @abstractmethod
    def _factored(self, x: Tensor) -> Tensor:
        """Add the branches to what the base gives."""

    def _dropping(self, x: Tensor) -> Tensor:
        """Drop some of the inputs that the current block reads."""
        raise UnsupportedError(f"a {type(self).__name__} has no adapter dropout; set it to 0")

    def _trains(self) -> bool:
        by = self._magnitudes
        factors = self.rank > 0 and (self.up.requires_grad or self.down.requires_grad)
        return factors or (by is not None and by.values.requires_grad)

    def _past(self) -> Block:
        return Block(self.past_down, self.past_up, self.past_scale)

    def _frozen(self, by: Magnitudes) -> PastFactors:
        return PastFactors(self.past_down, self.past_up, by.columns(self.past_ranks))

    def _columns(self) -> tuple[Tensor, Tensor]:
        """All `down` and all scaled `up` side by side, current ones last, differentiable."""
        by = self._magnitudes
        scales: Tensor = self.past_scale
        current: Tensor | float = self.scale
        if by is not None:
            coefficients = by.coefficients(self.down, self.up)
            scales, current = coefficients[by.columns(self.past_ranks)], coefficients[-1]
        up_all = torch.cat([self.past_up * scales, self.up * current], dim=1)
        return join_rows([self.past_down, self.down], self.groups), up_all

    def _refresh(self) -> Tensor:
        by = self._magnitudes
        if by is not None:
            return self._working.refresh_scaled(self.base.weight, self._frozen(by), self.down, self.up, by)
        return self._working.refresh(self.base.weight, self._past(), self.down, self.up, scale=self.scale)

    def invalidate(self) -> None:
        """Rebuild the working weight at the next forward pass, after a change that left no trace."""
        self._working.invalidate()
        self._joined.invalidate()
        if self._magnitudes is not None:
            self._magnitudes.forget()

    def set_magnitudes(
        self,
        values: nn.Parameter,
        gain: Tensor,
        offset: Tensor,
        *,
        row: int | None = None,
        current: Literal["raw", "normalised"] = "raw",
        norm: Literal["fro", "factors"] = "fro",
        soft_eps: float = 1.0,
    ) -> None:
        """Let past block k count with `values[k] * gain[k] + offset[k]` from now on, instead of its `past_scale`.

        The current block counts with `values[-1]`, or with `values[-1] / sqrt(n^2 + soft_eps^2)`, n being the norm of
        its product. Start the block first. `settle_magnitudes` ends this state; until then the blocks cannot change.

        Args:
            values: `(blocks + 1,)`, or `(rows, blocks + 1)` with `row`; blocks of rank 0 have an entry, too. The caller
                owns, trains and saves it and may give it to several layers; it is no parameter of this one.
            gain: `(blocks,)`, copied; holds the division by the norm of each block.
            offset: `(blocks,)`, copied; likewise.
            row: the row of `values` for this layer.
            current: `"raw"` or `"normalised"`.
            norm: for `"normalised"`: `"fro"` or `"factors"`, as in `direction_norm`.
            soft_eps: see above; 0 is for blocks that are not zero.

        Raises:
            OptionError: an option is unknown or out of range, or the layer has a scale of its own.
            ShapeError: a tensor does not fit the past.
            UnsupportedError: norms are asked of a convolution in groups.
        """
        if self.scale != 1.0:
            raise OptionError(f"magnitudes take the place of scale, which is {self.scale}; set scale to 1 first")
        if current == "normalised" and self.groups != 1:
            raise UnsupportedError(f"the norm of a block in {self.groups} groups is not defined; use current='raw'")
        blocks = self.past_ranks.shape[0]
        if tuple(gain.shape) != (blocks,):
            raise ShapeError(f"expected one gain for each of {blocks} past blocks, got shape {tuple(gain.shape)}")
        with normal_mode():
            like = self.past_scale
            gain, offset = (t.detach().to(like.device, like.dtype, copy=True) for t in (gain, offset))
        self._magnitudes = Magnitudes(values, gain, offset, row=row, current=current, norm=norm, soft_eps=soft_eps)
        self.invalidate()

    def coefficients(self) -> Tensor:
        """Return what each block counts with now, `(blocks + 1,)` float64, detached, the current block last.

        Without magnitudes that is `past_scale`, with 1 for blocks of rank 0, and `scale` for the current block.

        Raises:
            UnsupportedError: the columns of one block have different scales.
            NumericError: a zero block is normalised with `soft_eps=0`.
        """
        if self._magnitudes is not None:
            return self._magnitudes.exact(self.down, self.up)
        scales = []
        for index, block in enumerate(self.blocks()):
            if block.scale.numel() and bool((block.scale != block.scale[0]).any()):
                raise UnsupportedError(
                    f"the columns of past block {index} have different scales, so it has no single coefficient; "
                    "read blocks()"
                )
            scales.append(float(block.scale[0]) if block.scale.numel() else 1.0)
        return torch.tensor([*scales, self.scale], dtype=torch.float64)

    def settle_magnitudes(self) -> float:
        """Write the coefficients in force into `past_scale` and remove the magnitudes.

        Returns:
            The coefficient of the current block, which counts with 1 from now on: `fold_block(scale=...)` with it
            keeps the function, to rounding in the dtype of the factors.

        Raises:
            OptionError: no magnitudes are set.
            NumericError: a zero block is normalised with `soft_eps=0`.
        """
        by = self._magnitudes
        if by is None:
            raise OptionError("the layer has no magnitudes to settle; call set_magnitudes first")
        coefficients = self.coefficients()
        with normal_mode():
            self.past_scale = coefficients[:-1].to(self.past_scale)[by.columns(self.past_ranks)]
        self._magnitudes = None
        self.invalidate()
        return float(coefficients[-1])

    def _refuse_magnitudes(self, action: str) -> None:
        if self._magnitudes is not None:
            raise OptionError(f"{action} would change the blocks under their magnitudes; call settle_magnitudes first")

    def _scales(self) -> Tensor:
        by = self._magnitudes
        return self.past_scale if by is None else by.exact_past().to(self.past_scale)[by.columns(self.past_ranks)]

    def _current_scale(self) -> float:
        return self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return past and current block as one pair of copies, `down (groups * R, in)` and `up (out, R)`, scaled."""
        with normal_mode(), full_precision(self.up.device):
            return self._columns()

    def effective_weight(self) -> Tensor:
        """Return base, past and current block summed, shape of the base, a new tensor in float32 (or float64).

        Raises:
            UnsupportedError: the base is quantised.
        """
        if self._is_packed:
            raise UnsupportedError(
                f"a quantised base weight ({self.base.weight.dtype}) has no dense sum; load the base unquantised"
            )
        with normal_mode(), full_precision(self.base.weight.device):
            dtype = torch.promote_types(self.base.weight.dtype, self.up.dtype)
            total = self.base.weight.to(dtype, copy=True).contiguous()
            down, up = self.factors()
            add_product(total.flatten(1), up.to(dtype), down.to(dtype), groups=self.groups)
            return total

    def release(self) -> nn.Linear | nn.Conv2d:
        """Return the base with the `requires_grad` it came with; this layer is not to be used any more."""
        for parameter, flag in zip(self.base.parameters(), self._base_flags, strict=True):
            parameter.requires_grad_(flag)
        self._magnitudes = None
        return self.base

    def extra_repr(self) -> str:
        """Say sizes and mode where the module is printed."""
        trained = "" if self._magnitudes is None else ", with magnitudes"
        return f"rank={self.rank}, past={self.past_ranks.tolist()}, {self.resolved_mode}{trained}"

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """Move or convert the layer and what its blocks count with."""
        super()._apply(fn, recurse)
        if self._magnitudes is not None:
            self._magnitudes.apply(fn)
        self.invalidate()
        return self


def base_of(module: nn.Module) -> nn.Module:
    """Return the plain layer inside an adapted one, and any other module itself."""
    return module.base if isinstance(module, LowRankLayer) else module
