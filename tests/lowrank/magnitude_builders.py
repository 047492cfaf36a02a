"""Layers with magnitudes, and the published form they are compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from everlora.lowrank import LowRankLinear
from tests.lowrank.builders import rand

IN, OUT = 6, 5
WAYS = (("folded", "thin"), ("folded", "dense"), ("factored", "auto"))
CURRENT = ({}, {"current": "normalised"}, {"current": "normalised", "norm": "factors", "soft_eps": 0.03})


def make(mode="folded", form="auto", *, dtype=torch.float64, rank=3, past=(2, 0, 1), seed=0, values=None, **options):
    """A layer with magnitudes over past blocks, and a current block away from its start."""
    torch.manual_seed(1)
    layer = LowRankLinear(nn.Linear(IN, OUT).to(dtype), 0, forward_mode=mode, gradient_form=form)
    layer.load_past(
        [rand(r, IN, seed=10 + seed + i) for i, r in enumerate(past)],
        [rand(OUT, r, seed=20 + seed + i) for i, r in enumerate(past)],
    )
    layer.start_block(rank, down=rand(rank, IN, seed=30 + seed))
    with torch.no_grad():
        layer.up.copy_(rand(OUT, rank, seed=31 + seed))
    blocks = len(past)
    if values is None:
        values = nn.Parameter(rand(blocks + 1, seed=40, dtype=dtype))
    layer.set_magnitudes(values, rand(blocks, seed=41 + seed).abs(), 0.3 * rand(blocks, seed=42 + seed), **options)
    layer.base.bias.requires_grad_()
    return layer, values


def loop(layer, x, values, *, seed=0, row=None, current="raw", norm="fro", soft_eps=1.0):
    """The published form, block by block, by plain autograd."""
    row_values = values if row is None else values[row]
    blocks = len(layer.past_ranks)
    gain, offset = rand(blocks, seed=41 + seed).abs().to(x), (0.3 * rand(blocks, seed=42 + seed)).to(x)
    y = functional.linear(x, layer.base.weight, layer.base.bias)
    start = 0
    for k, rank in enumerate(layer.past_ranks.tolist()):
        down, up = layer.past_down[start : start + rank], layer.past_up[:, start : start + rank]
        y = y + (row_values[k] * gain[k] + offset[k]) * (x @ down.T @ up.T)
        start += rank
    scale = row_values[-1]
    if current == "normalised":
        size = torch.linalg.norm(layer.up @ layer.down) if norm == "fro" else layer.up.norm() * layer.down.norm()
        scale = scale / torch.sqrt(size**2 + soft_eps**2)
    return y + scale * (x @ layer.down.T @ layer.up.T)


def parameters(layer, values):
    return values, layer.up, layer.down, layer.base.bias


def close(got, wanted, tolerance):
    return (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1.0)
