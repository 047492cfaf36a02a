"""Norm modes, and the cuts through a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from everlora.backbones import load_backbone
from everlora.backbones.cifar_resnet import CifarResNet
from everlora.errors import ModelError
from everlora.isolation import (
    find_blocks,
    has_batch_norm,
    norm_copies,
    norm_layers,
    parts_of,
    set_statistics_moving,
    unread_children,
)
from tests.tiny_models import save_tiny


def test_norm_modes_own_what_they_say() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)).requires_grad_(
        False
    )
    layers = norm_layers(model)
    assert list(layers) == ["1", "2", "3"] and has_batch_norm(model)
    for mode, names, trained in (
        ("per_task", ["1", "2", "3"], True),
        ("affine_only", ["1", "2", "3"], True),
        ("adabn", ["1"], False),
        ("frozen_eval", [], False),
    ):
        copies = norm_copies(layers, mode)
        assert list(copies) == names
        for name, made in copies.items():
            assert made is not layers[name] and all(p.requires_grad == trained for p in made.parameters())
            before = layers[name].state_dict()
            assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert norm_layers(nn.Sequential(model), without=["0"]) == {}


def test_statistics_move_only_where_said() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())).eval()
    set_statistics_moving([model[1]])
    assert not model[0].training and model[1][0].training and not model[1].training and not model[1][1].training


def test_the_classifier_that_features_do_not_pass_is_found() -> None:
    model = CifarResNet(1)
    everything = sum(p.numel() for p in model.parameters())
    assert unread_children(model, everything - 650) == ("linear",)
    assert unread_children(model, everything) == ()
    with pytest.raises(ModelError, match="no cut between children explains"):
        unread_children(model, everything - 600)


def test_blocks_and_parts_of_a_residual_network() -> None:
    model = CifarResNet(2)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert find_blocks(model) == blocks
    assert parts_of(model, blocks) == ["conv1", "bn1", *blocks, "linear"]
    assert parts_of(model, (), without=["linear"]) == ["conv1", "bn1", "layer1", "layer2", "layer3"]
    parts = parts_of(model, ["layer2.1.bn2"], without=["linear"])
    inner = ["layer2.0", "layer2.1.conv1", "layer2.1.bn1", "layer2.1.conv2", "layer2.1.bn2"]
    assert parts == ["conv1", "bn1", "layer1", *inner, "layer3"]


@pytest.mark.parametrize(("kind", "expected"), [("vit", 2), ("bert", 2), ("t5", 2), ("albert", 1)])
def test_blocks_of_transformers_are_their_layers(kind: str, expected: int, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path))
    blocks = find_blocks(backbone.model)
    assert len(blocks) == expected
    parts = parts_of(backbone.model, blocks)
    assert [path for path in parts if path in blocks] == blocks
    inside = sum(p.numel() for path in parts for p in backbone.model.get_submodule(path).parameters())
    assert inside >= backbone.num_parameters
