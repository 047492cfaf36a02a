"""The small residual networks for 32x32 images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from everlora.backbones import cifar_network, load_backbone
from everlora.backbones.cifar_resnet import CifarResNet
from everlora.errors import ModelError, OptionError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def save_random(folder: Path, blocks: int, num_classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = CifarResNet(blocks, num_classes).state_dict()
    tensors = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            tensor.normal_()
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("blocks", [1, 3])
def test_depth_and_classes_are_read_off_the_tensors(blocks: int, tmp_path: Path) -> None:
    tensors = save_random(tmp_path, blocks, num_classes=7)
    backbone = load_backbone(tmp_path)
    assert (backbone.architecture, backbone.feature_dim, backbone.image_size) == ("cifar_resnet", 64, 32)
    loaded = backbone.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    batch = backbone.collate(backbone.encode(IMAGES), [0, 1])
    features = backbone.features(batch)
    assert features.shape == (2, 64) and features.dtype == torch.float32
    assert backbone.model(batch["pixel_values"]).shape == (2, 7)


def test_evaluation_uses_the_stored_statistics(tmp_path: Path) -> None:
    save_random(tmp_path, 1)
    backbone = load_backbone(tmp_path)
    encoded = backbone.encode(IMAGES)
    together = backbone.features(backbone.collate(encoded, [0, 1, 2]))
    alone = backbone.features(backbone.collate(encoded, [1]))
    # With batch statistics the other images would matter.
    torch.testing.assert_close(alone[0], together[1], rtol=1e-5, atol=1e-5)
    assert int(backbone.model.bn1.num_batches_tracked) == 0


def test_a_block_of_zero_branch_is_its_shortcut() -> None:
    network = CifarResNet(1).eval()
    block = network.layer2[0]
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        out = block(x)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])  # subsampled, zero channels on both sides
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_normalisation_is_that_of_training(tmp_path: Path) -> None:
    save_random(tmp_path, 1)
    black = np.zeros((1, 32, 32, 3), np.uint8)
    backbone = load_backbone(tmp_path)
    pixel = backbone.collate(backbone.encode(black), [0])["pixel_values"][0, :, 0, 0]
    torch.testing.assert_close(pixel, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    backbone = load_backbone(tmp_path, normalize="unit", dtype="bfloat16")
    batch = backbone.collate(backbone.encode(black), [0])
    assert not batch["pixel_values"].any()
    assert backbone.features(batch).dtype == torch.float32


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    tensors = save_random(tmp_path, 1)
    path = tmp_path / "model.safetensors"
    save_file({**tensors, "layer1.0.downsample.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"8-layer .* found 1 that are .* first layer1\.0\.downsample"):
        load_backbone(tmp_path)
    save_file({**tensors, "conv1.weight": torch.zeros(16, 1, 3, 3)}, path)
    with pytest.raises(ModelError, match=r"first conv1\.weight"):
        load_backbone(tmp_path)
    save_file({"something": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"expected a config.json beside"):
        load_backbone(tmp_path)
    path.write_bytes(b"no weights")
    with pytest.raises(ModelError, match="expected readable weights"):
        load_backbone(tmp_path)


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path, 1)
    for options in ({"max_length": 3}, {"image_size": 64}, {"pooling": "cls"}):
        with pytest.raises(OptionError, match="takes no max_length, image_size, pooling or feature_layers"):
            load_backbone(tmp_path, **options)


def test_the_file_of_the_network_stands_alone() -> None:
    names: dict[str, Any] = {"__name__": "copied"}
    source = Path(cifar_network.__file__).read_text(encoding="utf-8")
    exec(compile(source, "copied.py", "exec"), names)
    assert "everlora" not in source
    copied, network = names["CifarResNet"](1).eval(), CifarResNet(1).eval()
    copied.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(copied(x), network(x))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_networks_load_whole(depth: int, shared: Path) -> None:
    folder = shared / "models" / f"resnet{depth}-cifar10"
    backbone = load_backbone(folder)
    tensors = load_file(folder / "model.safetensors")
    loaded = backbone.model.state_dict()
    assert {k for k in loaded if not k.endswith("num_batches_tracked")} == set(tensors)
    convolutions = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    batch = backbone.collate(backbone.encode(IMAGES), [0, 1, 2])
    features = backbone.features(batch)
    assert torch.equal(features, backbone.features(batch))
    assert features.shape == (3, 64) and (features >= 0).all()
    # A trained network answers its own classes with confidence, even on noise.
    assert backbone.model(batch["pixel_values"]).std(dim=1).min() > 0.5
