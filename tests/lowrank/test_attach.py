from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everlora.errors import OptionError, TargetError
from everlora.lowrank import LowRankLinear, attach, detach, input_groups, share_down
from tests.lowrank.builders import CountProducts, rand


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.o_proj(self.dropout(torch.tanh(self.q_proj(x) + self.k_proj(x)) * self.v_proj(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.up = Attention(), nn.LayerNorm(6), nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.up(self.norm(x + self.attention(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


KV = [f"blocks.{i}.attention.{name}" for i in (0, 1) for name in ("k_proj", "v_proj")]


@pytest.mark.parametrize(
    "targets",
    [
        ["v_proj", "k_proj"],
        ["attention.k_proj", "attention.v_proj"],
        r"re:blocks\.\d+\.attention\.[kv]_proj",
        r".*[kv]_proj",
        ["k_proj", ".*v_proj", "k_proj"],
    ],
)
def test_names_and_expressions_find_the_same_layers(model, targets):
    x = rand(2, 3, 6)
    before = model(x)
    layers = attach(model, targets, 2)
    assert list(layers) == KV
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert torch.equal(model(x), before)
    assert not any(layer.training for layer in layers.values())


def test_a_name_matches_at_a_dot_only(model):
    assert list(attach(model, "up", 1)) == ["blocks.0.up", "blocks.1.up"]
    with pytest.raises(TargetError, match="did you mean"):
        attach(model, "_proj", 1)


def test_only_adapted_bases_are_frozen_and_detach_gives_everything_back(model):
    model.blocks[0].attention.k_proj.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    layers = attach(model, ["k_proj"], 2)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("k_proj.base" not in name)
    with torch.no_grad():
        layers[KV[0]].up.add_(1.0)
    detach(model)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_mistakes_in_targets_are_answered_and_change_nothing(model):
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TargetError, match=r"'k_porj'.*'k_proj'"):
        attach(model, "k_porj", 2)
    with pytest.raises(TargetError, match=r"blocks\.0\.norm.*LayerNorm"):
        attach(model, ["k_proj", "norm"], 2)
    with pytest.raises(TargetError, match="Attention"):
        attach(model, "attention", 2)
    with pytest.raises(OptionError, match=r"blocks\.0\.attention\.k_proj"):
        attach(model, "k_proj", 7)
    for targets in ([], "", "re:", "re:("):
        with pytest.raises(OptionError):
            attach(model, targets, 2)
    with pytest.raises(OptionError, match="forward_mode"):
        attach(model, "k_proj", 2, forward_mode="merged")
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        attach(nn.Sequential(nn.ReLU()), "k_proj", 2)
    assert [name for name, _ in model.named_modules()] == names
    attach(model, "k_proj", 2)
    with pytest.raises(TargetError, match="already"):
        attach(model, "k_proj", 2)
    with pytest.raises(TargetError):
        attach(model, "base", 2)


def test_a_layer_that_is_never_called_is_refused():
    with pytest.raises(TargetError, match="cannot be adapted"):
        attach(nn.Sequential(nn.MultiheadAttention(4, 2)), "out_proj", 1)


def test_a_layer_under_two_names_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    layers = attach(model, ["a", "b"], 1)
    assert list(layers) == ["a"] and model["a"] is model["b"] is layers["a"]
    detach(model)
    assert model["a"] is model["b"] is shared


def test_the_generator_decides_the_start(model):
    other = copy.deepcopy(model)
    first = attach(model, "k_proj", 2, generator=torch.Generator().manual_seed(5))
    second = attach(other, "k_proj", 2, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(first[name].down, second[name].down) for name in first)


def test_input_groups_follow_tensor_identity_and_leave_no_trace(model):
    model.train()
    model.blocks[1].eval()
    layers = attach(model, ["q_proj", "k_proj", "v_proj", "o_proj", "up", "unused"], 2)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    groups = input_groups(model, layers, lambda: model(rand(1, 2, 6)))
    assert torch.equal(torch.get_rng_state(), state)
    for i in (0, 1):
        assert groups[f"blocks.{i}.attention.k_proj"] == [f"blocks.{i}.attention.{n}_proj" for n in "kqv"]
        for name in ("attention.o_proj", "up", "unused"):
            assert groups[f"blocks.{i}.{name}"] == [f"blocks.{i}.{name}"]
    assert len(groups) == 8 and sum(map(len, groups.values())) == len(layers)
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert input_groups(model, list(layers), lambda: model(rand(1, 2, 6))) == groups


def test_a_tensor_changed_in_place_is_another_input():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleList([first, second])

    def run():
        x = torch.ones(1, 3)
        first(x)
        second(x.add_(1.0))

    assert len(input_groups(model, {"a": first, "b": second}, run)) == 2


@pytest.mark.parametrize("mode", ["folded", "factored"])
def test_members_of_a_group_compute_the_shared_product_once(mode):
    torch.manual_seed(0)
    layers = [LowRankLinear(nn.Linear(6, 6), 0, forward_mode=mode, train_down=False) for _ in range(2)]
    x, results = rand(7, 6), {}
    for shared in (False, True):
        for layer in layers:
            layer.start_block(2, down=rand(2, 6))
            with torch.no_grad():
                layer.up.copy_(rand(6, 2, seed=9))
        if shared:
            share_down(layers)
            assert layers[0].down is layers[1].down
        for layer in layers:
            layer(rand(1, 6))
        with CountProducts() as count:
            y = sum(layer(x) for layer in layers)
        y.sum().backward()
        results[shared] = y, [layer.up.grad for layer in layers]
        products = [s for s in count.shapes if s == ((7, 6), (6, 2))]
        assert len(products) == (1 if shared else 2)
        for layer in layers:
            layer.up.grad = None
    assert torch.equal(results[True][0], results[False][0])
    assert all(torch.equal(a, b) for a, b in zip(results[True][1], results[False][1], strict=True))


def test_sharing_sees_changes_of_the_input_and_of_down():
    layers = [LowRankLinear(nn.Linear(6, 6), 2, forward_mode="factored", train_down=False) for _ in range(2)]
    share_down(layers)
    with torch.no_grad():
        for layer in layers:
            layer.up.add_(1.0)
    x = rand(3, 6)

    def expected(layer):
        return layer.base(x) + x @ layer.down.T @ layer.up.T

    layers[0](x)
    x.mul_(2.0)
    assert torch.allclose(layers[1](x), expected(layers[1]), atol=1e-5)
    with torch.no_grad():
        layers[0].down.mul_(3.0)
    for layer in layers:
        assert torch.allclose(layer(x), expected(layer), atol=1e-5)
    with torch.inference_mode():
        y = rand(3, 6)
        layers[0](y)
        y.mul_(2.0)
        assert torch.allclose(layers[1](y), layers[1].base(y) + y @ layers[1].down.T @ layers[1].up.T, atol=1e-5)


def test_sharing_survives_a_copy_and_a_reload(model):
    layers = attach(model, ["k_proj", "v_proj"], 2, train_down=False)
    pair = [layers[KV[0]], layers[KV[1]]]
    share_down(pair)
    twin = copy.deepcopy(model)
    first, second = twin.get_submodule(KV[0]), twin.get_submodule(KV[1])
    assert first.down is second.down and first.down is not pair[0].down
    assert first.group is second.group and first.group is not pair[0].group
    pair[0].start_block(3)
    pair[1].start_block(3)
    share_down(pair)
    twin.load_state_dict(model.state_dict())
    assert first.down is second.down and torch.equal(first.down, pair[0].down)
    x = rand(2, 6)
    assert torch.equal(twin(x), model(x))


def test_sharing_that_would_change_the_model_is_refused():
    layers = [LowRankLinear(nn.Linear(6, 6), 2) for _ in range(2)]
    with torch.no_grad():
        layers[1].up.add_(1.0)
    with pytest.raises(TargetError, match="cannot share"):
        share_down(layers)
    share_down([])
