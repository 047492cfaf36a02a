"""Networks side by side, each of which reads those before it: what a progressive network is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlora.isolation.parts import find_blocks

__all__ = ["Lateral", "Sites", "block_sites", "channel_dim", "draw_anew"]

_SITES_AMONG_BLOCKS = 3
_EMBEDDING_STD = 0.02
_LARGEST_SCALE = 0.1


class Lateral(nn.Module):
    """What a column reads of the older ones at one place: `U relu(V concat_j(alpha_j h_j))`.

    `U` starts at zero, so that a new column starts as the network it was made from. Linear maps work on the channels:
    for maps `(n, channels, height, width)` they are convolutions of size 1.

    Args:
        num_columns: number of older columns.
        width: channels that each of them has here.
        out_width: channels of the result.
        generator: draws `alpha` in [0, 0.1] and `V` as torch draws a linear layer.

    Source: section 6 of the reference on convolutional networks.
    """

    def __init__(
        self, num_columns: int, width: int, out_width: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        joined = num_columns * width
        bound = 1 / math.sqrt(joined)
        self.alpha = nn.Parameter(torch.empty(num_columns).uniform_(0, _LARGEST_SCALE, generator=generator))
        self.reduce = nn.Parameter(torch.empty(width, joined).uniform_(-bound, bound, generator=generator))
        self.project = nn.Parameter(torch.zeros(out_width, width))

    def forward(self, older: Sequence[Tensor]) -> Tensor:
        """Map one tensor of each older column, channels last but for maps, to what is added in the new one."""
        scaled = [alpha * h for alpha, h in zip(self.alpha, older, strict=True)]
        joined = torch.cat(scaled, dim=channel_dim(older[0]))
        return _mix(functional.relu(_mix(joined, self.reduce)), self.project)


class Sites:
    """The places where columns are joined: notes what enters there, and adds what the newest column reads of others.

    Columns run one after the other, each inside `column`. Every column's own modules stand at the same names. A module
    may be called several times in a pass; the calls of different columns belong together in their order.

    Args:
        names: qualified names of the modules whose inputs are joined.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._older: list[dict[str, list[Tensor]]] = []
        self._entered: dict[str, list[Tensor]] | None = None
        self._laterals: Mapping[str, Lateral] = {}

    def watch(self, network: nn.Module) -> None:
        """Listen at a new column, which stands in its network already; outside of `column` nothing happens there."""
        for name in self.names:
            self._listen(name, network.get_submodule(name))

    def clear(self) -> None:
        """Forget the columns that ran."""
        self._older = []

    @contextmanager
    def column(self, laterals: Mapping[str, Lateral]) -> Iterator[dict[str, list[Tensor]]]:
        """Run one column inside; the columns after it, up to `clear`, read it.

        Args:
            laterals: by name of the site; empty for a column that reads no other.

        Yields:
            What enters at each site, call by call, what the laterals added included; filled as the column runs.
        """
        self._entered, self._laterals = {name: [] for name in self.names}, laterals
        try:
            yield self._entered
            self._older.append(self._entered)
        finally:
            self._entered, self._laterals = None, {}

    def _listen(self, name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._entered is None:
                return None
            if args:
                return (self._join(name, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: self._join(name, kwargs[first])}

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _join(self, name: str, x: Tensor) -> Tensor:
        assert self._entered is not None
        calls = self._entered[name]
        if name in self._laterals:
            older = [column[name][len(calls)] for column in self._older]
            x = x + self._laterals[name](older).to(x.dtype)
        calls.append(x.detach())
        return x


def channel_dim(x: Tensor) -> int:
    """Where the channels of a tensor are: behind the rows for maps `(n, channels, height, width)`, else last."""
    return 1 if x.ndim == 4 else -1


def block_sites(model: nn.Module) -> tuple[str, ...]:
    """Find the places to join columns at: between the blocks of a network.

    Where blocks stand in several stages, as in residual networks, these are the inputs of all stages but the first;
    where they stand in one list, as in transformers, the inputs of up to three of them, evenly spaced. Empty when
    there is neither.
    """
    blocks = find_blocks(model)
    stages = list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
    if len(stages) > 1:
        return tuple(stages[1:])
    parts = _SITES_AMONG_BLOCKS + 1
    numbers = {len(blocks) * part // parts for part in range(1, parts)} - {0}
    return tuple(blocks[number] for number in sorted(numbers))


def draw_anew(modules: Mapping[str, nn.Module], generator: torch.Generator) -> None:
    """Give modules random weights in place of trained ones.

    Layers draw them as torch does. What has no rule of its own, such as class tokens, position embeddings and layer
    scales, becomes normal with deviation 0.02; its vectors become 1, or 0 where they are biases.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for top in modules.values():
            for module in top.modules():
                reset = getattr(module, "reset_parameters", None)  # torch's own convention, declared on no base class
                if callable(reset):
                    reset()
                    continue
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 1:
                        parameter.normal_(std=_EMBEDDING_STD)
                    else:
                        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear map `(out, in)` to the channels."""
    wide = x.to(weight.dtype)
    return functional.conv2d(wide, weight[:, :, None, None]) if x.ndim == 4 else functional.linear(wide, weight)
