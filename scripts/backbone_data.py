"""Images of a parquet set as tensors, and the augmentation of whole batches."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


def read_images(folder: Path, split: str, label_column: str, cache: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Decode one split of a parquet image set once, and keep the pixels as `.npy` in `cache`.

    Args:
        folder: holds `{split}-*.parquet` with columns `image` (bytes) and `label_column`.
        split: the first word of the files' names.
        label_column: an integer column whose names stand in the file's own metadata.
        cache: folder for the decoded pixels.

    Returns:
        pixels `(n, 3, 32, 32)` uint8, labels `(n,)` int64, and the class names.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    tables = [parquet.read_table(file) for file in files]
    labels = np.concatenate([np.asarray(table[label_column]) for table in tables])
    metadata = json.loads(tables[0].schema.metadata[b"huggingface"])
    names: list[str] = metadata["info"]["features"][label_column]["names"]
    cached = cache / f"{folder.name}-{split}.npy"
    if not cached.exists():
        cells = (cell["bytes"].as_py() for table in tables for cell in table["image"])
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")) for cell in cells])
        cache.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, decoded.transpose(0, 3, 1, 2))
        partial.replace(cached)
    return torch.from_numpy(np.load(cached)), torch.from_numpy(labels.astype(np.int64)), names


def normalise(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to [-1, 1], as the image processor does with mean and deviation 0.5."""
    return pixels.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, options: argparse.Namespace) -> Tensor:
    """Flip, shift by up to `options.shift` pixels, zoom and erase: one draw per image, the whole batch at once.

    Args:
        images: `(n, 3, 32, 32)` float in [-1, 1].
        options: `shift`, `min_scale` (area kept by the zoom; 1 is no zoom), `erase` (probability).

    Returns:
        `(n, 3, 32, 32)`.
    """
    count, _, _, size = images.shape
    device = images.device
    if options.min_scale < 1.0:
        side = (torch.rand(count, 1, device=device) * (1 - options.min_scale) + options.min_scale).sqrt()
        side = side * torch.exp((torch.rand(count, 2, device=device) - 0.5) * 0.5)
        side = side.clamp(max=1.0)
        offset = (torch.rand(count, 2, device=device) * 2 - 1) * (1 - side)
        theta = torch.zeros(count, 2, 3, device=device)
        theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side[:, 0], side[:, 1], offset
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if options.shift:
        padded = functional.pad(images, (options.shift,) * 4, mode="reflect")
        start = torch.randint(0, 2 * options.shift + 1, (2, count, 1), device=device)
        line = torch.arange(size, device=device)
        rows, columns = start[0] + line, start[1] + line
        # An index per image and pixel: one gather, where a loop over the batch would take as long as the network.
        index = rows[:, None, :, None], columns[:, None, None, :]
        first = torch.arange(count, device=device)[:, None, None, None]
        images = padded[first, torch.arange(3, device=device)[:, None, None], *index]
    flip = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(flip, images.flip(3), images)
    if options.erase > 0:
        box = torch.randint(4, 17, (2, count, 1), device=device)
        corner = (torch.rand(2, count, 1, device=device) * (size + 1 - box)).long()
        line = torch.arange(size, device=device)
        inside = (line >= corner) & (line < corner + box)
        hit = torch.rand(count, 1, 1, device=device) < options.erase
        images = images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :] & hit)[:, None], 0.0)
    return images
