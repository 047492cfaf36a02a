"""The small residual networks for 32x32 images of He et al. (2016), section 4.2: 6 m + 2 layers, 64 features.

Needs torch and nothing else: exports carry a copy of this file.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WIDTHS", "CifarResNet"]

WIDTHS = (16, 32, 64)


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
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks_per_stage, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks_per_stage, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks_per_stage, stride=2)
        self.linear = nn.Linear(WIDTHS[2], num_classes)

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
