"""How large the branch of a layer may be: its sizes, its full rank, and the rank at which a branch costs as much."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from everlora.errors import TargetError

__all__ = ["LayerSize", "layer_size"]


class LayerSize(NamedTuple):
    """What the factors of a layer must fit.

    `inputs`: columns of `down`; for a convolution the numbers in a patch of one group, `(I / g) * k1 * k2`.
    `outputs`: rows of `up`. `groups`: the layer is that many layers side by side, each with factors of the rank.
    """

    inputs: int
    outputs: int
    groups: int = 1

    @property
    def full_rank(self) -> int:
        """Largest rank that is of any use."""
        return min(self.outputs // self.groups, self.inputs)

    @property
    def break_even(self) -> int:
        """Largest rank at which the factors are not larger than the layer.

        Source: section 3.3 of the reference on convolutional networks.
        """
        return self.outputs * self.inputs // (self.groups * self.inputs + self.outputs)

    def describe(self) -> str:
        """Say it in words, for messages."""
        each = "" if self.groups == 1 else f" in each of {self.groups} groups"
        return f"{self.inputs} inputs{each} and {self.outputs} outputs"


def layer_size(module: nn.Module) -> LayerSize:
    """Return the sizes of a linear layer or of a convolution read as a linear layer on patches.

    Raises:
        TargetError: the module is neither.
    """
    if isinstance(module, nn.Linear):
        return LayerSize(module.in_features, module.out_features)
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        patch = module.in_channels // module.groups * height * width
        return LayerSize(patch, module.out_channels, module.groups)
    raise TargetError(f"expected a Linear or a Conv2d, found a {type(module).__name__}; it has no low-rank form here")
