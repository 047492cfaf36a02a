"""The small residual networks for 32x32 images as a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from everlora.backbones.base import Backbone
from everlora.backbones.cifar_network import WIDTHS, CifarResNet
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.errors import ModelError

__all__ = ["CifarResNet", "CifarResNetBackbone", "is_cifar_resnet", "load_cifar_resnet"]

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_WEIGHTS = "model.safetensors"


class CifarResNetBackbone(Backbone):
    """A CIFAR residual network as 64 pooled features."""

    model: CifarResNet

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The 3x3 convolutions of the blocks, the stem left alone."""
        return (r"layer\d+\.\d+\.conv[12]",)

    def _count_parameters(self) -> int:
        """Leave out the linear layer for the original classes."""
        return super()._count_parameters() - sum(parameter.numel() for parameter in self.model.linear.parameters())

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
        feature_dim=WIDTHS[-1],
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
