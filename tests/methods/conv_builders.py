"""A small network of convolutions in float64, and tasks of images for it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from everlora.backbones.cifar_resnet import CifarResNet
from everlora.methods.base import Batch


class ConvNet(nn.Module):
    """Two convolutions, the second with stride, padding by mode or groups as asked."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).mean(dim=(2, 3))


class ConvEncoder:
    """Images `(n, 2, 6, 6)` to 8 features."""

    output_head = None

    feature_dim = 8
    default_targets = ("first", "second")

    def __init__(self, **options: object) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = ConvNet(**options).double().requires_grad_(False)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        raise AssertionError("there is no attention in this network")

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["x"])

    def token_mask(self, batch: dict[str, Tensor]) -> None:
        return None


def images(task: int, rows: int = 16) -> Batch:
    """Images of a task made of one pattern of its own, so that their patches span a small space."""
    generator = torch.Generator().manual_seed(100 + task)
    pattern = torch.randn(1, 2, 1, 1, generator=generator, dtype=torch.float64)
    slope = torch.linspace(-1, 1, 6, dtype=torch.float64).expand(6, 6)
    x = pattern * (slope if task % 2 else slope.T) * torch.rand(rows, 1, 1, 1, generator=generator).double()
    return Batch({"x": x}, (torch.arange(rows) % 2) + 2 * task)


def save_resnet(folder: Path) -> Path:
    """Save the shallowest residual network for small images, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(CifarResNet(1).state_dict(), folder / "model.safetensors")
    return folder
