"""Fused projections: slices are like layers of their own, and the fused layer comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from everlora.errors import OptionError, ShapeError, TargetError
from everlora.lowrank import FusedProjection, attach, detach, input_groups, join_factors, split_factors
from everlora.lowrank.fused import slice_names
from tests.lowrank.builders import rand

WIDTH = 6
QV = ["blocks.0.attention.{}.query", "blocks.0.attention.{}.value"]
KINDS = pytest.mark.parametrize("kind", ["qkv", "c_attn"])


class Attention(nn.Module):
    """Attention whose projections come from one layer, or from three with the same rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "apart":
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        else:
            self.add_module(kind, nn.Linear(WIDTH, 3 * WIDTH) if kind == "qkv" else Conv1D(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "apart":
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = self.get_submodule(self.kind)(x).split(WIDTH, dim=-1)
        return torch.softmax(q @ k.mT, dim=-1) @ torch.tanh(v)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module() for _ in range(2)])
        for block in self.blocks:
            block.attention = Attention(kind)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.attention(x)
        return x


def pair(kind: str) -> tuple[Model, Model]:
    """The same network in float64, its projections fused and apart."""
    torch.manual_seed(0)
    fused, apart = Model(kind).double().eval(), Model("apart").double().eval()
    for whole, parts in zip(fused.blocks, apart.blocks, strict=True):
        layer = whole.attention.get_submodule(kind)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        matrix = layer.weight if kind == "qkv" else layer.weight.T
        for index, name in enumerate("qkv"):
            rows = slice(index * WIDTH, (index + 1) * WIDTH)
            parts.attention.get_submodule(name).weight.data = matrix[rows].detach().clone()
            parts.attention.get_submodule(name).bias.data = layer.bias[rows].detach().clone()
    return fused, apart


def fill(layers: dict) -> None:
    """The same factors for the n-th layer of either model: two past blocks and a current one."""
    for number, layer in enumerate(layers.values()):
        for rank in (2, 1, 2):
            layer.fold_block(-0.5) if layer.rank else None
            layer.start_block(rank, down=rand(rank, WIDTH, seed=10 * number + rank))
            layer.up.data = rand(WIDTH, rank, seed=number, dtype=layer.up.dtype)
        layer.invalidate()


@KINDS
@pytest.mark.parametrize("mode", ["folded", "factored"])
def test_slices_are_separate_layers_with_the_same_factors(kind: str, mode: str) -> None:
    fused, apart = pair(kind)
    before = copy.deepcopy(fused.state_dict())
    one = attach(fused, ["query", "value"], rank=0, forward_mode=mode)
    two = attach(apart, ["q", "v"], rank=0, forward_mode=mode)
    assert list(one) == [f"blocks.{i}.attention.{kind}.{part}" for i in (0, 1) for part in ("query", "value")]
    fill(one)
    fill(two)
    x = rand(2, 4, WIDTH, seed=99, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(rows) for model, rows in zip((fused, apart), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    for mine, other in zip(one.values(), two.values(), strict=True):
        for factor in ("down", "up"):
            found, expected = getattr(mine, factor).grad, getattr(other, factor).grad
            assert bool(expected.any())
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    frozen = [p for name, p in fused.named_parameters() if not name.endswith((".up", ".down"))]
    assert len(frozen) == 12 and all(p.grad is None and not p.requires_grad for p in frozen)
    detach(fused)
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@KINDS
def test_the_effective_weight_leaves_other_rows_alone_and_is_what_the_layer_computes(kind: str) -> None:
    fused, _ = pair(kind)
    original = fused.blocks[0].attention.get_submodule(kind)
    fill(attach(fused, [name.format(kind) for name in QV], rank=0))
    split = fused.blocks[0].attention.get_submodule(kind)
    assert isinstance(split, FusedProjection) and fused.blocks[1].attention.get_submodule(kind) is not split
    assert not isinstance(fused.blocks[1].attention.get_submodule(kind), FusedProjection)
    weight, old = split.effective_weight(), original.weight.detach()
    assert weight.shape == old.shape and split.weight is original.weight
    matrix, old = (weight, old) if kind == "qkv" else (weight.T, old.T)
    assert torch.equal(matrix[WIDTH : 2 * WIDTH], old[WIDTH : 2 * WIDTH])
    for part in ("query", "value"):
        rows = split.rows(part)
        assert not torch.isclose(matrix[rows], old[rows]).all()
    x = rand(3, WIDTH, seed=4, dtype=torch.float64)
    torch.testing.assert_close(split(x), x @ matrix.T + original.bias, rtol=1e-12, atol=1e-12)


@KINDS
def test_detaching_gives_the_same_module_with_its_flags(kind: str) -> None:
    fused, _ = pair(kind)
    layer = fused.blocks[0].attention.get_submodule(kind)
    layer.bias.requires_grad_(False)
    state = torch.get_rng_state()
    attach(fused, ["key"], rank=1, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state), "taking a layer apart draws nothing"
    detach(fused)
    assert fused.blocks[0].attention.get_submodule(kind) is layer
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)


@KINDS
def test_slices_stay_views_through_conversion_copy_and_loading(kind: str) -> None:
    fused, _ = pair(kind)
    fill(attach(fused, ["value"], rank=0))
    x = rand(2, WIDTH, seed=5)
    expected = fused(x.double())
    other = copy.deepcopy(fused)
    state = fused.state_dict()
    for model in (fused, other):
        model.float()
        split = model.blocks[1].attention.get_submodule(kind)
        assert split.weight.dtype == torch.float32
        spans = [split.query.weight, split.key.weight, split.value.base.weight]
        assert {t.untyped_storage().data_ptr() for t in spans} == {split.weight.untyped_storage().data_ptr()}
        torch.testing.assert_close(model(x), expected.float(), rtol=1e-4, atol=1e-4)
    originals = {model.blocks[1].attention.get_submodule(kind).original for model in (fused, other)}
    assert len(originals) == 2
    name = f"blocks.1.attention.{kind}.key.weight"
    other.load_state_dict({**state, name: torch.zeros_like(state[name])})
    detach(other)
    matrix = other.blocks[1].attention.get_submodule(kind).weight
    matrix = matrix if kind == "qkv" else matrix.T
    assert not bool(matrix[WIDTH : 2 * WIDTH].any()), "what is loaded into a slice is loaded into the fused layer"


@KINDS
def test_factors_of_slices_are_those_of_the_fused_layer_and_back(kind: str) -> None:
    fused, _ = pair(kind)
    layers = attach(fused, ["query", "value"], rank=2)
    factors = {name: (rand(n + 1, WIDTH, seed=n), rand(WIDTH, n + 1, seed=n + 9)) for n, name in enumerate(layers)}
    plain = {"other": (rand(1, 3), rand(2, 1))}
    joined = join_factors(fused, factors)
    assert list(joined) == [f"blocks.{i}.attention.{kind}" for i in (0, 1)]
    down, up = joined[f"blocks.1.attention.{kind}"]
    assert (down.shape, up.shape) == ((7, WIDTH), (3 * WIDTH, 7))
    query, value = (factors[f"blocks.1.attention.{kind}.{part}"] for part in ("query", "value"))
    expected = torch.cat([query[1] @ query[0], torch.zeros(WIDTH, WIDTH), value[1] @ value[0]])
    torch.testing.assert_close(up @ down, expected)
    assert not bool(up[WIDTH : 2 * WIDTH].any())
    again = split_factors(fused, {**joined, **plain})
    assert again.keys() == {*factors, "other"}
    for name, (down, up) in factors.items():
        assert torch.equal(again[name][0], down) and torch.equal(again[name][1], up)
    with pytest.raises(ShapeError, match="has 6 inputs and 18 outputs"):
        split_factors(fused, {f"blocks.0.attention.{kind}": (rand(1, WIDTH), rand(WIDTH, 1))})


def test_slices_read_one_input() -> None:
    fused, _ = pair("qkv")
    layers = attach(fused, ["key", "value"], rank=1)
    groups = input_groups(fused, layers, lambda: fused(rand(2, WIDTH, dtype=torch.float64)))
    assert [len(members) for members in groups.values()] == [2, 2]


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Linear(4, 12), True),
        (nn.Linear(4, 8), False),
        (nn.Linear(4, 12).half(), True),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(4, 12), False),
        (nn.Conv1d(4, 12, 1), False),
    ],
    ids=["thirds", "fewer keys", "half", "subclass", "convolution"],
)
def test_only_known_layouts_are_taken_apart(layer: nn.Module, known: bool) -> None:
    model = nn.ModuleDict({"qkv": layer, "query_key_value": nn.Linear(4, 12), "c_attn": nn.Linear(4, 12)})
    assert slice_names(model) == (["qkv.query", "qkv.key", "qkv.value"] if known else [])
    mixed = nn.ModuleList([model, nn.ModuleDict({"qkv": nn.Linear(4, 16)})])
    assert slice_names(mixed) == [], "not the slices of some layers only"


def test_what_cannot_be_chosen_says_so_and_changes_nothing() -> None:
    fused, _ = pair("c_attn")
    before = list(fused.state_dict())
    with pytest.raises(TargetError, match=r"is a Conv1D.*slices such as 'blocks.0.attention.c_attn.query'"):
        attach(fused, "c_attn", rank=1)
    with pytest.raises(OptionError, match="integer from 0 to 6"):
        attach(fused, "query", rank=7)
    with pytest.raises(TargetError, match=r"matches no layer; did you mean.*query"):
        attach(fused, "querry", rank=1)
    assert list(fused.state_dict()) == before
    linear, _ = pair("qkv")
    with pytest.raises(TargetError, match="as a whole and in slices"):
        attach(linear, ["qkv", "qkv.query"], rank=1)
    attach(linear, "qkv", rank=1)
    assert slice_names(linear) == []
    with pytest.raises(TargetError, match="matches no layer"):
        attach(linear, "query", rank=1)


def test_slices_one_after_the_other_and_by_expression() -> None:
    fused, _ = pair("qkv")
    attach(fused, r"blocks\.0\..*\.query", rank=1)
    names = slice_names(fused)
    assert len(names) == 6 and set(attach(fused, "key", rank=1)) == {f"blocks.{i}.attention.qkv.key" for i in (0, 1)}
    with pytest.raises(TargetError, match=r"'blocks.0.attention.qkv.key' is adapted already"):
        attach(fused, "qkv.key", rank=1)
    detach(fused)
    assert slice_names(fused) == names and type(fused.blocks[0].attention.qkv) is nn.Linear
