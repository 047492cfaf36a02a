"""Adapted layers: a frozen base, the frozen past as factors, and the block that is being trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlora.errors import OptionError, ShapeError, UnsupportedError, nearest
from everlora.lowrank.magnitudes import Magnitudes
from everlora.lowrank.precision import autocast_dtype, full_precision, normal_mode
from everlora.lowrank.products import factored_branch, folded_linear
from everlora.lowrank.scaled_products import Branches, factored_scaled, folded_scaled, known_form
from everlora.lowrank.sharing import InputGroup, project
from everlora.lowrank.working import Block, ConcatenatedFactors, PastFactors, WorkingWeight

__all__ = ["FORWARD_MODES", "LowRankLinear"]

FORWARD_MODES = ("auto", "folded", "factored")
_FACTORS = ("down", "up", "past_down", "past_up", "past_scale")
_HALF = (torch.float16, torch.bfloat16)


class LowRankLinear(nn.Module):
    """`y = x (W0 + sum_s scale_s up_s down_s + up down)^T + bias`, with `W0` frozen and never written.

    The sum over s is the past: frozen blocks, buffers `past_down (total, in)`, `past_up (out, total)` and
    `past_scale (total,)`. `up` and `down` are the current block. All factors stay in float32 (float64 in a float64
    module) whatever the dtype of the base.

    `forward_mode` says how it is computed. `"folded"`: one product with a working weight, rebuilt when a factor
    changes; costs the same whatever the past. `"factored"`: the base product plus two thin float32 products over
    all factors, for bases whose dtype would round the update away. `"auto"`: folded for a float32 or float64 base,
    factored otherwise. Both give gradients to the current factors by thin products only.

    `set_magnitudes` puts trained coefficients in the place of `past_scale` and before the current block.

    A write to a factor through `tensor.data` cannot be seen; call `invalidate` after it. `torch.compile` runs the
    layer outside the graph.

    Args:
        base: the layer to adapt; its parameters are frozen.
        rank: of the first block, 0 for none.
        forward_mode: see above.
        train_down: whether `down` of a block is trained; if not, the input is not kept for the backward pass.
        generator: draws the first `down`; the global generator by default.
        gradient_form: how the folded form with magnitudes computes gradients of the factors and coefficients:
            `"thin"` products over all columns, `"dense"` from one product of the size of the base, or the cheaper
            of the two (`"auto"`). An attribute, to be changed at any time.

    Raises:
        OptionError: `rank`, `forward_mode` or `gradient_form` is out of range.
        UnsupportedError: folding was asked for a quantised base.
    """

    down: nn.Parameter
    up: nn.Parameter
    past_down: Tensor
    past_up: Tensor
    past_scale: Tensor
    past_ranks: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        *,
        forward_mode: str = "auto",
        train_down: bool = True,
        generator: torch.Generator | None = None,
        gradient_form: str = "auto",
    ) -> None:
        super().__init__()
        if forward_mode not in FORWARD_MODES:
            raise OptionError(f"forward_mode={forward_mode!r} is not known; {nearest(forward_mode, FORWARD_MODES)}")
        if forward_mode == "folded" and not base.weight.is_floating_point():
            raise UnsupportedError(
                f"a base weight of {base.weight.dtype} cannot be folded; use forward_mode='factored' or 'auto'"
            )
        self._base_flags = [parameter.requires_grad for parameter in base.parameters()]
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.forward_mode, self.train_down = forward_mode, train_down
        self.gradient_form = known_form(gradient_form)
        self.group: InputGroup | None = None
        self._working, self._joined = WorkingWeight(), ConcatenatedFactors()
        self._magnitudes: Magnitudes | None = None
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        with normal_mode():
            empty = torch.zeros(0, dtype=dtype, device=base.weight.device)
            self.register_buffer("past_down", empty.new_zeros(0, self.in_features))
            self.register_buffer("past_up", empty.new_zeros(self.out_features, 0))
            self.register_buffer("past_scale", empty)
            self.register_buffer("past_ranks", torch.zeros(0, dtype=torch.int64, device=empty.device))
        self.start_block(rank, generator=generator)
        if self.resolved_mode == "folded":
            self._refresh()  # the buffers exist from now on, so later tasks need no more memory than the first

    @property
    def rank(self) -> int:
        """Rank of the current block."""
        return self.down.shape[0]

    @property
    def total_rank(self) -> int:
        """Rank of all past blocks together."""
        return self.past_scale.shape[0]

    @property
    def resolved_mode(self) -> str:
        """`"folded"` or `"factored"`: what `forward_mode` means for the base's present dtype."""
        if self.forward_mode != "auto":
            return self.forward_mode
        return "folded" if self.base.weight.dtype in (torch.float32, torch.float64) else "factored"

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight, for code that looks up a dtype or device; `effective_weight` has the branches."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        if torch.compiler.is_compiling():
            # Imported here because it loads the compiler, seconds that only those who compile should spend.
            from everlora.lowrank.uncompiled import forward_uncompiled

            return forward_uncompiled(self, x)
        return self.forward_eager(x)

    def forward_eager(self, x: Tensor) -> Tensor:
        """Do what `forward` does; never traced."""
        return self._folded(x) if self.resolved_mode == "folded" else self._factored(x)

    def _folded(self, x: Tensor) -> Tensor:
        weight, bias = self._refresh(), self.base.bias
        dtype = autocast_dtype(x)
        trains = self.rank > 0 and (self.up.requires_grad or self.down.requires_grad)
        by = self._magnitudes
        flows = trains or x.requires_grad or (bias is not None and bias.requires_grad)
        flows = flows or (by is not None and by.values.requires_grad)
        if not (torch.is_grad_enabled() and flows):
            weight = weight if dtype is None else self._working.weight_as(dtype)
            return functional.linear(x, weight, bias)
        wide = x if dtype is None else x.to(dtype)
        if by is not None:
            return folded_scaled(wide, bias, self._branches(by), self._working, known_form(self.gradient_form))
        projection = self._project(x, self.down) if trains else None
        return folded_linear(wide, self.up, self.down, bias, projection=projection, working=self._working)

    def _factored(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.rank + self.total_rank == 0:
            return y
        if self._magnitudes is not None:
            return factored_scaled(y, x, self._branches(self._magnitudes))
        down_all, up_all = self._joined.refresh(self._past(), self.down, self.up, self.group)
        projection = self._project(x, down_all)
        return factored_branch(y, x, self.up, self.down, projection=projection, up_all=up_all, down_all=down_all)

    def _project(self, x: Tensor, down: Tensor) -> Tensor:
        return project(x, down) if self.group is None else self.group.project(x, down)

    def _past(self) -> Block:
        return Block(self.past_down, self.past_up, self.past_scale)

    def _frozen(self, by: Magnitudes) -> PastFactors:
        return PastFactors(self.past_down, self.past_up, by.columns(self.past_ranks))

    def _branches(self, by: Magnitudes) -> Branches:
        return Branches(self.up, self.down, by.coefficients(self.down, self.up), self._frozen(by))

    def _refresh(self) -> Tensor:
        by = self._magnitudes
        if by is not None:
            return self._working.refresh_scaled(self.base.weight, self._frozen(by), self.down, self.up, by)
        return self._working.refresh(self.base.weight, self._past(), self.down, self.up)

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
            OptionError: an option is unknown or out of range.
            ShapeError: a tensor does not fit the past.
        """
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

        Without magnitudes that is `past_scale`, with 1 for blocks of rank 0 and for the current block.

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
        return torch.tensor([*scales, 1.0], dtype=torch.float64)

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

    def effective_weight(self) -> Tensor:
        """Return base, past and current block summed, `(out, in)`, a new tensor in float32 (or float64).

        Raises:
            UnsupportedError: the base is quantised.
        """
        if not self.base.weight.is_floating_point():
            raise UnsupportedError(
                f"a base weight of {self.base.weight.dtype} has no dense sum; load the base unquantised"
            )
        with normal_mode(), full_precision(self.base.weight.device):
            total = self.base.weight.to(torch.promote_types(self.base.weight.dtype, self.up.dtype), copy=True)
            scale: Tensor = self.past_scale
            up: Tensor = self.up
            if self._magnitudes is not None:
                coefficients = self._magnitudes.coefficients(self.down, up)
                scale, up = coefficients[self._magnitudes.columns(self.past_ranks)], up * coefficients[-1]
            total.addmm_((self.past_up * scale).to(total.dtype), self.past_down.to(total.dtype))
            return total.addmm_(up.to(total.dtype), self.down.to(total.dtype))

    def start_block(self, rank: int, down: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Begin a new current block with `up` zero; the one before is dropped unless `fold_block` kept it.

        Args:
            rank: from 0 (no branch) to the smaller side of the layer.
            down: `(rank, in)`, copied; an `nn.Parameter` that fits is taken as it is, so that layers can share it.
                By default drawn as LoRA does, uniform with variance `1 / (3 in)`.
            generator: for that draw.

        Raises:
            OptionError: `rank` is out of range, or magnitudes are set.
            ShapeError: `down` has another shape.
        """
        self._refuse_magnitudes("start_block")
        limit = min(self.in_features, self.out_features)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= limit:
            raise OptionError(
                f"rank must be an integer from 0 to {limit} for a layer of {self.in_features} inputs and "
                f"{self.out_features} outputs, got {rank!r}"
            )
        if down is not None and tuple(down.shape) != (rank, self.in_features):
            raise ShapeError(f"expected down of shape ({rank}, {self.in_features}), got {tuple(down.shape)}")
        trained = self.train_down and rank > 0
        with normal_mode():
            like = self.past_down
            if isinstance(down, nn.Parameter) and down.dtype == like.dtype and down.device == like.device:
                self.down = down
                self.down.requires_grad_(trained)
            else:
                start = self._draw(rank, generator) if down is None else down.detach()
                self.down = nn.Parameter(start.to(like.device, like.dtype, copy=True), requires_grad=trained)
            self.up = nn.Parameter(like.new_zeros(self.out_features, rank), requires_grad=rank > 0)

    def _draw(self, rank: int, generator: torch.Generator | None) -> Tensor:
        # Drawn on the generator's device (the CPU by default), so that a seed means the same rows on every device.
        place = torch.device("cpu") if generator is None else generator.device
        bound = 1.0 / math.sqrt(self.in_features)
        return torch.empty(rank, self.in_features, device=place).uniform_(-bound, bound, generator=generator)

    def fold_block(self, scale: float = 1.0) -> None:
        """Append the current block to the past, bit for bit, and leave an empty one of rank 0.

        Args:
            scale: finite factor with which the block counts from now on.

        Raises:
            OptionError: `scale` is not finite, or magnitudes are set.
        """
        self._refuse_magnitudes("fold_block")
        if not math.isfinite(scale):
            raise OptionError(f"the scale of a block must be finite, got {scale!r}")
        with normal_mode():
            rank = self.past_ranks.new_tensor([self.rank])
            self.past_scale = torch.cat([self.past_scale, self.past_scale.new_full((self.rank,), scale)])
            self.past_down = torch.cat([self.past_down, self.down.detach()])
            self.past_up = torch.cat([self.past_up, self.up.detach()], dim=1)
            self.past_ranks = torch.cat([self.past_ranks, rank])
        self.start_block(0)

    def load_past(
        self, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float | Tensor] | None = None
    ) -> None:
        """Replace the past by the given blocks, bit for bit where the dtype is that of the factors.

        Args:
            downs: one `(rank_s, in)` a block.
            ups: one `(out, rank_s)` a block.
            scales: one number or `(rank_s,)` a block; 1 by default.

        Raises:
            ShapeError: the lists differ in length, or a factor has the wrong shape.
            OptionError: magnitudes are set.
        """
        self._refuse_magnitudes("load_past")
        factors = [1.0] * len(downs) if scales is None else list(scales)
        if not len(downs) == len(ups) == len(factors):
            raise ShapeError(f"expected as many downs as ups and scales, got {len(downs)}, {len(ups)}, {len(factors)}")
        ranks = [int(down.shape[0]) for down in downs]
        for index, (rank, down, up) in enumerate(zip(ranks, downs, ups, strict=True)):
            if tuple(down.shape) != (rank, self.in_features) or tuple(up.shape) != (self.out_features, rank):
                raise ShapeError(
                    f"block {index} does not fit a layer of {self.in_features} inputs and {self.out_features} outputs: "
                    f"down {tuple(down.shape)}, up {tuple(up.shape)}"
                )
        with normal_mode():
            like = self.past_scale
            rows = [torch.as_tensor(f).to(like).expand(r) for f, r in zip(factors, ranks, strict=True)]
            self.past_down = torch.cat([like.new_zeros(0, self.in_features), *(d.detach().to(like) for d in downs)])
            self.past_up = torch.cat([like.new_zeros(self.out_features, 0), *(u.detach().to(like) for u in ups)], dim=1)
            self.past_scale = torch.cat([like.new_zeros(0), *rows])
            self.past_ranks = torch.tensor(ranks, dtype=torch.int64, device=like.device)

    def release(self) -> nn.Linear:
        """Return the base with the `requires_grad` it came with; this layer is not to be used any more."""
        for parameter, flag in zip(self.base.parameters(), self._base_flags, strict=True):
            parameter.requires_grad_(flag)
        self._magnitudes = None
        return self.base

    def blocks(self) -> list[Block]:
        """Return the past block by block, oldest first, as copies; blocks of rank 0 are among them."""
        scales, by = self.past_scale, self._magnitudes
        if by is not None:
            scales = by.exact_past().to(scales)[by.columns(self.past_ranks)]
        blocks, start = [], 0
        for rank in self.past_ranks.tolist():
            rows = slice(start, start + rank)
            blocks.append(Block(self.past_down[rows].clone(), self.past_up[:, rows].clone(), scales[rows].clone()))
            start += rank
        return blocks

    def extra_repr(self) -> str:
        """Say sizes and mode where the module is printed."""
        trained = "" if self._magnitudes is None else ", with magnitudes"
        return f"rank={self.rank}, past={self.past_ranks.tolist()}, {self.resolved_mode}{trained}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        """Move or convert the layer; the factors do not follow the base to a half-precision dtype."""
        masters = {name: getattr(self, name).data for name in _FACTORS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, master in masters.items():
            moved = getattr(self, name)
            if moved.dtype in _HALF:
                moved.data = master.to(moved.device)
        if self._magnitudes is not None:
            self._magnitudes.apply(fn)
        self.invalidate()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the ranks of the saved state before the values are copied in."""
        for name in (*_FACTORS, "past_ranks"):
            saved, mine = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != mine.shape and self._only_rank_differs(name, saved.shape):
                mine.data = mine.data.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        trained = self.rank > 0
        self.up.requires_grad_(trained)
        self.down.requires_grad_(trained and self.train_down)
        self.invalidate()

    def _only_rank_differs(self, name: str, shape: torch.Size) -> bool:
        fixed = {"down": (1, self.in_features), "past_down": (1, self.in_features)}
        fixed |= {"up": (0, self.out_features), "past_up": (0, self.out_features)}
        if name not in fixed:
            return len(shape) == 1
        axis, size = fixed[name]
        return len(shape) == 2 and shape[axis] == size
