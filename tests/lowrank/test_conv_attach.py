"""Adapted convolutions inside a model: which ones are found, refused, grouped and given back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from everlora.errors import OptionError, TargetError, UnsupportedError
from everlora.lowrank import (
    LowRankConv2d,
    LowRankLinear,
    attach,
    capped_ranks,
    detach,
    find_targets,
    input_groups,
)
from everlora.lowrank.attach import require_one_group
from tests.lowrank.builders import rand


class Net(nn.Module):
    """Two convolutions that read one tensor, with a shortcut of another stride, a depthwise one and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.depthwise(self.left(x) * torch.tanh(self.right(x)) + self.shortcut(x))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


ALL = ["depthwise", "head", "left", "right", "shortcut", "stem"]


def test_convolutions_and_linear_layers_are_adapted_alike(model):
    x = rand(2, 3, 6, 6)
    before, names = model(x), find_targets(model, ".*")
    assert names == ALL
    layers = attach(model, ".*", 1)
    assert list(layers) == names and torch.equal(model(x), before)
    kinds = {name: type(layer) for name, layer in layers.items()}
    assert kinds == {name: LowRankLinear if name == "head" else LowRankConv2d for name in ALL}
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.up.add_(0.1)
    assert not torch.equal(model(x), before) and torch.equal(clone(x), before)
    with pytest.raises(TargetError, match="adapted already"):
        find_targets(model, "stem")
    detach(model)
    assert torch.equal(model(x), before) and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LowRankConv2d) for m in model.modules())


def test_ranks_are_capped_and_layers_left_out_with_one_line_in_the_log(model, caplog):
    with caplog.at_level(logging.INFO, logger="everlora.lowrank"):
        ranks = capped_ranks(model, find_targets(model, ".*"), 6)
    # 40 / 13, 576 / 80, 64 / 16, 216 / 35 and nothing for the depthwise one
    assert ranks == {"head": 3, "left": 6, "right": 6, "shortcut": 4, "stem": 6}
    assert [r.getMessage() for r in caplog.records] == [
        "rank 6 is more than 3 layers can use: depthwise (left out), head (3), shortcut (4)"
    ]
    layers = attach(model, ".*", ranks)
    assert {name: layer.rank for name, layer in layers.items()} == ranks
    assert isinstance(model.depthwise, nn.Conv2d)
    with pytest.raises(OptionError, match="names the layer 'nowhere'"):
        attach(Net(), "stem", {"nowhere": 1})


def test_a_rank_too_large_changes_nothing(model):
    with pytest.raises(OptionError, match=r"'depthwise' has 9 inputs in each of 8 groups.*from 0 to 1"):
        attach(model, ".*", 2)
    assert not any(isinstance(m, LowRankConv2d) for m in model.modules())


class Upside(nn.Conv2d):
    def forward(self, x):
        return -super().forward(x)


REFUSED = {
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), "'net.0' is a ConvTranspose2d"),
    "one axis": (lambda: nn.Conv1d(3, 3, 3), "'net.0' is a Conv1d"),
    "three axes": (lambda: nn.Conv3d(3, 3, 3), "'net.0' is a Conv3d"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), "'net.0' computes its weight"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)), "'net.0' computes its weight"),
    "linear": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "'net.0' computes its weight"),
    "lazy": (lambda: nn.LazyConv2d(3, 3), "'net.0' has no weight yet"),
    "subclass": (lambda: Upside(3, 3, 3), "'net.0' is a Upside, which computes otherwise"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("target", ["0", r"net\.\d"])
def test_layers_that_no_branch_fits_are_refused_by_name(kind, target):
    make, words = REFUSED[kind]
    layer = make()
    model = nn.ModuleDict({"net": nn.Sequential(layer)})
    for find in (find_targets, lambda *arguments: attach(*arguments, 1)):
        with pytest.raises(TargetError, match=words):
            find(model, target)
    assert model["net"][0] is layer
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
        assert list(attach(model, target, 1)) == ["net.0"]


def test_one_convolution_under_two_names_is_adapted_once_and_two_with_one_weight_are_refused():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    layers = attach(model, ["0", "2"], 2)
    assert list(layers) == ["0"] and model[0] is model[2] is layers["0"]
    other = nn.Conv2d(4, 4, 3)
    twin = nn.Conv2d(4, 4, 3)
    twin.weight = other.weight
    with pytest.raises(TargetError, match="'0' and '1' are two convolutions with one weight"):
        attach(nn.Sequential(other, twin), ["0", "1"], 2)


def test_only_convolutions_that_cut_the_same_patches_are_one_input_group(model):
    layers = attach(model, ["left", "right", "shortcut", "stem"], 1)
    groups = input_groups(model, layers, lambda: model(rand(2, 3, 6, 6)))
    assert groups == {"left": ["left", "right"], "shortcut": ["shortcut"], "stem": ["stem"]}


def test_groups_are_refused_where_their_inputs_must_have_one_space(model):
    layers = attach(model, ".*", 1)
    require_one_group({name: layer for name, layer in layers.items() if name != "depthwise"}, "this")
    with pytest.raises(UnsupportedError, match="'depthwise' is a convolution with 8 groups, for which this"):
        require_one_group(layers, "this")
