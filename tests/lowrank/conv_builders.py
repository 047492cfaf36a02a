"""Convolutions of every kind, adapted, and the formula they are compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from everlora.lowrank import LowRankConv2d
from tests.lowrank.builders import rand

KINDS = {
    "plain": (4, 6, 3, {"padding": 1}),
    "stride": (4, 6, 3, {"stride": 2, "padding": 1, "bias": False}),
    "one": (4, 6, 1, {}),
    "dilation": (4, 6, 3, {"dilation": 2, "padding": 2}),
    "reflect": (4, 6, 3, {"padding": 1, "padding_mode": "reflect"}),
    "replicate": (4, 6, 3, {"padding": (2, 1), "padding_mode": "replicate", "bias": False}),
    "circular": (4, 6, 3, {"padding": 1, "padding_mode": "circular", "stride": (1, 2)}),
    "same": (4, 6, (2, 3), {"padding": "same"}),
    "same_reflect": (4, 6, 3, {"padding": "same", "padding_mode": "reflect", "dilation": 2}),
    "valid": (4, 6, 3, {"padding": "valid"}),
    "rectangle": (4, 6, (3, 5), {"padding": (1, 2)}),
    "groups_2": (4, 6, 3, {"groups": 2, "padding": 1}),
    "groups_4": (8, 8, 3, {"groups": 4, "padding": 1, "stride": 2}),
    "depthwise": (4, 8, 3, {"groups": 4, "padding": 1}),
    "grouped_circular": (4, 6, 3, {"groups": 2, "padding": 1, "padding_mode": "circular"}),
}
PLAIN = [name for name, (_, _, _, options) in KINDS.items() if "groups" not in options]


def convolution(kind="plain", dtype=torch.float64):
    torch.manual_seed(0)
    channels, outputs, kernel, options = KINDS[kind]
    return nn.Conv2d(channels, outputs, kernel, **options).to(dtype)


def images(kind="plain", dtype=torch.float64, count=2):
    return rand(count, KINDS[kind][0], 7, 8, seed=5, dtype=dtype)


def make(kind="plain", mode="folded", *, dtype=torch.float64, rank=2, past=(1, 0, 2), scale=0.5, **options):
    """A convolution with scaled past blocks and a current block away from its start."""
    layer = LowRankConv2d(convolution(kind, dtype), 0, forward_mode=mode, scale=scale, **options)
    groups, inputs, outputs = layer.groups, layer.in_features, layer.out_features
    limit = layer.size.full_rank
    rank, past = min(rank, limit), tuple(min(r, limit) for r in past)
    layer.load_past(
        [0.3 * rand(groups * r, inputs, seed=10 + i) for i, r in enumerate(past)],
        [rand(outputs, r, seed=20 + i) for i, r in enumerate(past)],
        [0.5 + i for i in range(len(past))],
    )
    layer.start_block(rank, down=0.3 * rand(groups * rank, inputs, seed=30))
    with torch.no_grad():
        layer.up.copy_(rand(outputs, rank, seed=31))
    return layer


def kernel(layer, up, down):
    """The change of the weight by one block, entry by entry as the reference writes it."""
    outputs, groups, rank = layer.out_features, layer.groups, up.shape[1]
    rows = []
    for o in range(outputs):
        j = o // (outputs // groups)
        row = sum((up[o, q] * down[j * rank + q] for q in range(rank)), torch.zeros_like(down[:1].sum(0)))
        rows.append(row)
    return torch.stack(rows).reshape(layer.base.weight.shape)


def explicit(layer, x, up=None, down=None):
    """The formula by plain autograd: one convolution with the summed weight."""
    up, down = layer.up if up is None else up, layer.down if down is None else down
    weight = layer.base.weight + layer.scale * kernel(layer, up, down)
    for block in layer.blocks():
        if len(block.scale):
            weight = weight + block.scale[0] * kernel(layer, block.up, block.down)
    conv = layer.base
    if conv.padding_mode == "zeros":
        return functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    sides = conv.padding if isinstance(conv.padding, tuple) else tuple(d * (k - 1) // 2 for d, k in _spans(conv))
    padded = functional.pad(x, (sides[1], sides[1], sides[0], sides[0]), mode=conv.padding_mode)
    return functional.conv2d(padded, weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def _spans(conv):
    return zip(conv.dilation, conv.kernel_size, strict=True)
