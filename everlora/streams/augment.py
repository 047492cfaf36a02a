"""Augmentation of whole image batches on their device, keyed by seed, epoch and sample id.

Crops and resizes are products with small resampling matrices, one per sample: exact (antialiased) resampling of a
crop box of any size, without a loop over samples and without atomic additions, so the result is reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from everlora.errors import OptionError, ShapeError, nearest
from everlora.streams.keyed import keyed_uniform

__all__ = ["AUGMENTATIONS", "Draw", "Interpolation", "augment", "resample", "resize"]

Interpolation = Literal["bilinear", "bicubic"]

# RandomResizedCrop draws up to ten boxes and takes the first that fits into the image.
_CROP_TRIES = 10
_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3.0 / 4.0, 4.0 / 3.0)


@dataclass(frozen=True)
class Draw:
    """Where an augmentation gets its random numbers.

    Attributes:
        ids: `(n,)` int64 on the device of the images.
        seed: seed of the run.
        epoch: epoch, counted over the whole run of a task.
    """

    ids: Tensor
    seed: int
    epoch: int

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """Return `(n, columns)` float32 in [0, 1), independent for every purpose."""
        return keyed_uniform(self.ids, columns, "augment", purpose, self.seed, self.epoch)


Augmentation = Callable[[Tensor, Draw, int | None], Tensor]


def augment(name: str, images: Tensor, ids: Tensor, *, seed: int, epoch: int, size: int | None = None) -> Tensor:
    """Augment a batch of images.

    Args:
        name: a key of `AUGMENTATIONS`.
        images: `(n, channels, H, W)`, floats in [0, 1]. Not modified.
        ids: `(n,)` int64, the samples' ids, on any device.
        seed: seed of the run.
        epoch: epoch of the draw; another epoch gives other parameters.
        size: side of the square result; None keeps the size of `images`.

    Returns:
        `(n, channels, size, size)`, dtype and device of `images`, in [0, 1].

    Raises:
        OptionError: no augmentation of this name, or a size below one.
        ShapeError: `images` are no batch of floats, or there is not one id per image.

    Cost: `O(n * channels * size * H * (W + size))` multiplications where pixels are resampled, else one copy.
    """
    key = name.replace("-", "_")
    if key not in AUGMENTATIONS:
        raise OptionError(f"there is no augmentation '{name}'; {nearest(key, AUGMENTATIONS)}")
    if size is not None and size < 1:
        raise OptionError(f"the size of augmented images must be at least 1, not {size}")
    if images.ndim != 4 or not images.is_floating_point():
        raise ShapeError(f"images must be floats (n, channels, H, W), not {images.dtype} {tuple(images.shape)}")
    if ids.shape != images.shape[:1]:
        raise ShapeError(f"{len(images)} images need one id each, not ids of shape {tuple(ids.shape)}")
    draw = Draw(ids.to(images.device), seed, epoch)
    return AUGMENTATIONS[key](images, draw, size)


def resize(images: Tensor, size: int, *, interpolation: Interpolation = "bicubic") -> Tensor:
    """Bring images to a square: the short side to `size`, then the middle square; antialiased.

    Args:
        images: `(n, channels, H, W)`, floats in [0, 1].
        size: side of the result.
        interpolation: kernel.

    Returns:
        `(n, channels, size, size)`; `images` itself where nothing is to be done.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    side = min(height, width)
    corner = torch.tensor([[(height - side) / 2.0, (width - side) / 2.0, side, side]], device=images.device)
    return resample(images, corner.expand(len(images), 4), size, interpolation=interpolation)


def resample(
    images: Tensor, boxes: Tensor, size: int, *, interpolation: Interpolation = "bilinear", flip: Tensor | None = None
) -> Tensor:
    """Cut a box out of every image and resample it to a square, as cropping and antialiased resizing would.

    Args:
        images: `(n, channels, H, W)`, floats in [0, 1].
        boxes: `(n, 4)` float32 rows (top, left, height, width) in pixels, inside the image.
        size: side of the result.
        interpolation: kernel: bilinear, or bicubic with a = -1/2.
        flip: `(n,)` bool, which results to mirror left to right; None mirrors none.

    Returns:
        `(n, channels, size, size)`, dtype of `images`, clamped to [0, 1].
    """
    top, left, height, width = boxes.unbind(dim=1)
    rows = _resampling(top, height, images.shape[-2], size=size, interpolation=interpolation)
    columns = _resampling(left, width, images.shape[-1], size=size, interpolation=interpolation)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    result = rows[:, None] @ images.float() @ columns[:, None].transpose(-1, -2)
    return result.clamp_(0.0, 1.0).to(images.dtype)


def _resampling(start: Tensor, length: Tensor, source: int, *, size: int, interpolation: Interpolation) -> Tensor:
    """Return `(n, size, source)` matrices whose rows average the source pixels of one box; rows sum to 1."""
    device = start.device
    step = (length / size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(size, device=device)[None, :, None] + 0.5) * step
    pixels = torch.arange(source, device=device)[None, None, :] + 0.5
    # The kernel widens where the box shrinks: that is the antialiasing.
    distance = ((pixels - centres) / step.clamp(min=1.0)).abs()
    weights = (1.0 - distance).clamp(min=0.0) if interpolation == "bilinear" else _cubic(distance)
    inside = (pixels > start[:, None, None]) & (pixels < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    """The cubic convolution kernel (Keys, 1981) with a = -1/2."""
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return torch.where(distance <= 1.0, near, torch.where(distance < 2.0, far, torch.zeros_like(distance)))


def _none(images: Tensor, draw: Draw, size: int | None) -> Tensor:
    return images if size is None else resize(images, size)


def _flip(images: Tensor, draw: Draw, size: int | None) -> Tensor:
    mirrored = torch.where(_flips(draw)[:, None, None, None], images.flip(-1), images)
    return _none(mirrored, draw, size)


def _crop_flip(images: Tensor, draw: Draw, size: int | None) -> Tensor:
    """Shift by up to an eighth of the side (4 of 32 pixels), black outside, and mirror half of the images."""
    height, width = images.shape[-2:]
    pad = max(1, round(min(height, width) / 8))
    shifts = (draw.uniform("shift", 2) * (2 * pad + 1)).long()
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    columns = torch.arange(width, device=images.device) + shifts[:, 1:]
    columns = torch.where(_flips(draw)[:, None], columns.flip(1), columns)
    padded = functional.pad(images, (pad, pad, pad, pad))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing around the channel axis puts it last.
    shifted = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return _none(shifted, draw, size)


def _resized_crop_flip(images: Tensor, draw: Draw, size: int | None) -> Tensor:
    """Cut boxes of 8 to 100 % of the area and ratio 3/4 to 4/3, bilinear, and mirror half of the images."""
    side = size if size is not None else min(images.shape[-2:])
    boxes = _crop_boxes(draw, images.shape[-2], images.shape[-1])
    return resample(images, boxes, side, flip=_flips(draw))


def _flips(draw: Draw) -> Tensor:
    return draw.uniform("flip", 1)[:, 0] < 0.5


def _crop_boxes(draw: Draw, height: int, width: int) -> Tensor:
    """Draw whole-pixel boxes as RandomResizedCrop does: area uniform, ratio log-uniform, first of ten that fits."""
    numbers = draw.uniform("crop", 2 * _CROP_TRIES + 2)
    area = height * width * (_CROP_AREA[0] + (_CROP_AREA[1] - _CROP_AREA[0]) * numbers[:, :_CROP_TRIES])
    low, high = (torch.tensor(ratio, device=numbers.device).log() for ratio in _CROP_RATIO)
    ratio = (low + (high - low) * numbers[:, _CROP_TRIES : 2 * _CROP_TRIES]).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    # No try fitted (rare; long images): the largest middle box with an allowed ratio.
    found = fits.any(dim=1)
    whole_width = min(width, round(height * _CROP_RATIO[1]))
    whole_height = min(height, round(width / _CROP_RATIO[0]))
    box_width = torch.where(found, wide.gather(1, first)[:, 0], torch.full_like(wide[:, 0], whole_width))
    box_height = torch.where(found, tall.gather(1, first)[:, 0], torch.full_like(tall[:, 0], whole_height))
    room_top, room_left = height - box_height, width - box_width
    top = torch.where(found, (numbers[:, -2] * (room_top + 1)).floor(), (room_top / 2).floor())
    left = torch.where(found, (numbers[:, -1] * (room_left + 1)).floor(), (room_left / 2).floor())
    return torch.stack([top, left, box_height, box_width], dim=1)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": _none,
    "flip": _flip,
    "crop_flip": _crop_flip,
    "resized_crop_flip": _resized_crop_flip,
}
