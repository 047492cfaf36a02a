"""SenaCNN: the first part of the network learns the first task and is frozen; each later task owns the last part.

Source: Zacarias and Alexandre, "SeNA-CNN: Overcoming Catastrophic Forgetting in Convolutional Neural Networks by
Selective Network Augmentation", 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from everlora.errors import OptionError, UnsupportedError, nearest
from everlora.isolation import NOT_SHARED, find_blocks, parts_of, train_by_mode
from everlora.methods.base import Encoder
from everlora.methods.isolated import IsolatedMethod
from everlora.methods.registry import register

__all__ = ["SenaCNN", "SenaCNNOptions"]


@dataclass(frozen=True)
class SenaCNNOptions:
    """Options of SenaCNN.

    Attributes:
        cut: where the part begins that each task owns: `half` leaves the first half of the residual blocks or
            transformer layers shared, `last_block` all but the last; or the name of a module, such as `layer3`.
        tail_init: a later task's part starts as the first task left its own (`task0`), as `pretrained`, or `random`.
        norm: what a task owns of the normalisation layers in its part: `per_task` all of it, `affine_only` (scale and
            shift), `adabn` (statistics) or `frozen_eval` (nothing).
        select: how the task is recognised when it is not given, by features of the shared part (`prototype`,
            `mahalanobis`) or by the logits of all tasks.
        head_init: a new head's rows: `uniform` (as torch draws them) or `zeros`.
    """

    cut: str = "half"
    tail_init: Literal["task0", "pretrained", "random"] = "task0"
    norm: Annotated[Literal["per_task", "affine_only", "adabn", "frozen_eval"], NOT_SHARED] = "per_task"
    select: Literal["max_softmax", "entropy", "energy", "prototype", "mahalanobis", "concat"] = "prototype"
    head_init: Literal["uniform", "zeros"] = "uniform"


@register("senacnn")
class SenaCNN(IsolatedMethod):
    """The first task trains everything; later ones a copy of its last part, on the frozen first part.

    Source: section 5 of the reference on convolutional networks.
    """

    options_type: ClassVar[type] = SenaCNNOptions
    replaces_base = True

    def __init__(self, options: SenaCNNOptions, encoder: Encoder, *, seed: int) -> None:
        super().__init__(options, encoder, seed=seed)
        self.options = options
        self.trunk, self.tail = _divide(encoder.model, options.cut, self.unread)
        self._blocks = [path for path in self.tail if path in find_blocks(encoder.model)]
        self._reference: dict[str, nn.Module] = {}

    def build(self, index: int, generator: torch.Generator) -> Mapping[str, nn.Module]:
        """Copy the network for the first task, its last part for later ones."""
        original = self.task_modules.original
        if index == 0:
            return self._own({path: original(path) for path in [*self.trunk, *self.tail]})
        first = self.task_modules.version(0)
        source = original if self.options.tail_init == "pretrained" else first.__getitem__
        tail = self._own({path: source(path) for path in self.tail})
        if self.options.tail_init == "random":
            _draw(tail.values(), generator)
        return {**first, **tail}

    def train_mode(self) -> None:
        """Let the task's own statistics move; what it shares stays as in evaluation."""
        super().train_mode()
        active = self.task_modules.active
        for path in self.trunk if active else ():
            self.task_modules.version(0)[path].eval()

    def activate_reference(self) -> None:
        """Put the shared part in place, without the blocks after it: its pooled output tells tasks apart."""
        if not self._reference:
            first = self.task_modules.version(0)
            listed = {p: isinstance(self._parent(p), nn.ModuleList) for p in self._blocks}
            self._reference = first | {p: _Skip(first[p] if listed[p] else None) for p in self._blocks}
        self.task_modules.put(self._reference)

    def _own(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        copies = copy.deepcopy(dict(modules))  # at once, for tied weights
        return {path: train_by_mode(module, self.options.norm) for path, module in copies.items()}

    def _parent(self, path: str) -> nn.Module:
        return self.encoder.model.get_submodule(path.rpartition(".")[0])


class _Skip(nn.Module):
    """Stands in the place of a block and hands its input on.

    Args:
        block: a transformer layer, some of which return more than their output; it is run until that is known. None
            where the output alone is returned, as in a sequence.
    """

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self._block = [] if block is None else [block]  # in a list, so that its tensors stay the task's

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._block:
            return hidden
        result = self._block[0](hidden, *args, **kwargs)
        if isinstance(result, tuple):
            return (hidden, *result[1:])
        self._block.clear()
        return hidden


def _divide(model: nn.Module, cut: str, unread: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names of the parts before and after the cut.

    Raises:
        UnsupportedError: the network has too few blocks to share half of them.
        OptionError: the cut names no block or module that the network could be divided at.
    """
    blocks = find_blocks(model)
    if cut in ("half", "last_block"):
        shared = len(blocks) // 2 if cut == "half" else len(blocks) - 1
        if shared < 1:
            raise UnsupportedError(
                f"senacnn shares the first blocks of a network, and {type(model).__name__} has {len(blocks)} that "
                "could be told apart; name the module at which the tasks' own part begins with cut"
            )
        cut = blocks[shared]
    names = {name for name, _ in model.named_modules()} - {""}
    if cut not in names:
        raise OptionError(f"cut='{cut}' is no module of the network; {nearest(cut, ['half', 'last_block', *blocks])}")
    inside = any(cut == block or block.startswith(f"{cut}.") for block in blocks)
    points = blocks if inside else [cut]
    parts = parts_of(model, points, without=unread)
    start = next((i for i, path in enumerate(parts) if path == cut or path.startswith(f"{cut}.")), 0)
    if start == 0:
        raise OptionError(
            f"nothing that is trained comes before cut='{cut}', so no part would be shared; name a later module, such "
            f"as {blocks[-1] if blocks else parts[-1]}"
        )
    return parts[:start], parts[start:]


def _draw(modules: Any, generator: torch.Generator) -> None:
    """Draw the parameters of all layers that know how to start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        for module in modules:
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
