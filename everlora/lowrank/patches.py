"""Convolutions read as linear layers: the patches they multiply, one row for each output position."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from everlora.errors import UnsupportedError

__all__ = ["patch_geometry", "unfold_patches"]


def unfold_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Cut the patches a convolution reads, so that it becomes a linear layer on rows.

    Args:
        x: `(n, channels, height, width)`, the convolution's input.
        conv: gives kernel, stride, padding, its mode and dilation; one group only.

    Returns:
        `(n, positions, channels * kernel_height * kernel_width)`: one token per output position, padding included,
        entries in the order of `conv.weight.flatten(1)`.

    Raises:
        UnsupportedError: several groups.
    """
    if conv.groups != 1:
        raise UnsupportedError(
            f"patches of a convolution with groups={conv.groups} are not defined, since each group reads other "
            "channels; only one group is"
        )
    padding = conv.padding
    if isinstance(padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    patches = functional.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)
    return patches.transpose(1, 2)


def patch_geometry(module: nn.Module) -> tuple[object, ...]:
    """Return what decides which patches a convolution cuts from its input; nothing for other modules."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode, module.groups
