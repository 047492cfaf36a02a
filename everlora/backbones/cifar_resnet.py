"""The small residual networks for 32x32 images of He et al. (2016), section 4.2: 6 m + 2 layers, 64 features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from everlora.backbones.base import Backbone
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.errors import ModelError

__all__ = ["CifarResNet", "CifarResNetBackbone", "is_cifar_resnet", "load_cifar_resnet"]

_WIDTHS = (16, 32, 64)
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_WEIGHTS = "model.safetensors"


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters: subsampled, missing channels zero."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, in, h, w)` to `(n, out, h / stride, w / stride)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        half = self.new_channels // 2
        result: Tensor = F.relu(out + F.pad(shortcut, (0, 0, 0, 0, half, self.new_channels - half)))
        return result


class CifarResNet(nn.Module):
    """Residual network with three stages of equal depth for 32x32 images.

    Args:
        blocks_per_stage: 3 for 20 layers, 5 for 32, 7 for 44, 9 for 56.
        num_classes: rows of the linear layer on top.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2, shortcut option A.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks_per_stage, stride=1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks_per_stage, stride=2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks_per_stage, stride=2)
        self.linear = nn.Linear(_WIDTHS[2], num_classes)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Map normalised images `(n, 3, 32, 32)` to pooled features `(n, 64)`."""
        out = F.relu(self.bn1(self.conv1(pixel_values)))
        out = self.layer3(self.layer2(self.layer1(out)))
        pooled: Tensor = out.mean(dim=(2, 3))
        return pooled

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map normalised images `(n, 3, 32, 32)` to the logits `(n, num_classes)` of the original classes."""
        logits: Tensor = self.linear(self.features(pixel_values))
        return logits


def _stage(in_channels: int, out_channels: int, depth: int, *, stride: int) -> nn.Sequential:
    blocks = [_Block(in_channels, out_channels, stride)]
    blocks += [_Block(out_channels, out_channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class CifarResNetBackbone(Backbone):
    """A CIFAR residual network as 64 pooled features."""

    model: CifarResNet

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The 3x3 convolutions of the blocks, the stem left alone."""
        return (r"layer\d+\.\d+\.conv[12]",)

    @property
    def num_parameters(self) -> int:
        """Number of parameters without the linear layer for the original classes."""
        head = sum(parameter.numel() for parameter in self.model.linear.parameters())
        return super().num_parameters - head

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute `(n, 64)` float32 features of `batch["pixel_values"]`."""
        pixels = batch["pixel_values"].to(self.model.linear.weight.dtype)
        return self.model.features(pixels).float()


def is_cifar_resnet(folder: Path) -> bool:
    """Whether a folder holds plain weights without a config, the layout of these networks."""
    return (folder / _WEIGHTS).is_file() and not (folder / "config.json").exists()


def load_cifar_resnet(folder: Path, *, source: str, dtype: torch.dtype, normalise: bool) -> CifarResNetBackbone:
    """Load a network; its depth is read off the names of the tensors.

    Args:
        folder: holds `model.safetensors` with the names `conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`.
        source: what the user named.
        dtype: dtype of the weights.
        normalise: subtract the channel means the networks were trained with; else pixels stay in [0, 1].

    Raises:
        ModelError: the file is unreadable, or its tensors are not exactly those of such a network.
    """
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"expected readable weights in {path}, found {error}; copy the file again") from error
    model = _build(tensors, path)
    transform = ImageTransform(size=32, mean=_MEAN if normalise else None, std=_STD if normalise else None)
    return CifarResNetBackbone(
        model.to(dtype),
        ImageInputs(transform),
        source=source,
        folder=folder,
        architecture="cifar_resnet",
        feature_dim=_WIDTHS[-1],
        pooling="mean",
    )


def _build(tensors: dict[str, Tensor], path: Path) -> CifarResNet:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("layer1.")}
    if not blocks or "linear.weight" not in tensors:
        raise ModelError(
            f"expected a config.json beside {path}, or the tensors of a CIFAR residual network in it, found neither; "
            "name a folder saved by transformers"
        )
    with torch.random.fork_rng(devices=[]):  # the starting values are all overwritten
        model = CifarResNet(len(blocks), num_classes=tensors["linear.weight"].shape[0])
    wanted: dict[str, Any] = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(wanted.keys() ^ given.keys())
    wrong += [name for name in sorted(wanted.keys() & given.keys()) if wanted[name].shape != given[name].shape]
    if wrong:
        raise ModelError(
            f"expected in {path} the tensors of a {6 * len(blocks) + 2}-layer CIFAR residual network, found "
            f"{len(wrong)} that are missing, extra or misshapen, first {wrong[0]}; name another folder"
        )
    model.load_state_dict(given, strict=False)
    return model
