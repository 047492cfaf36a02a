"""Pixels: resizing as image processors do it, normalisation, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from everlora.backbones import load_backbone
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.errors import DataError
from tests.tiny_models import save_processor, save_tiny

CPU = torch.device("cpu")


def images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (8, 8), (50, 40), (20, 33)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resample": 3},
        {"do_normalize": False},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "crop_size": 16},
    ],
    ids=["bilinear", "bicubic", "unnormalised", "crop"],
)
def test_pixels_equal_those_of_the_image_processor(shape: tuple[int, int], changes: dict, tmp_path: Path) -> None:
    folder = save_tiny("vit", tmp_path)
    save_processor(folder, **changes)
    rows = images(3, *shape)
    backbone = load_backbone(folder)
    found = backbone.collate(backbone.encode(rows), [0, 1, 2])["pixel_values"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(images=[Image.fromarray(row) for row in rows], return_tensors="pt")["pixel_values"]
    # Resampling rounds to whole grey levels; a tie may go the other way.
    level = 1 / 255 / (0.2 if changes.get("do_normalize", True) else 1.0)
    assert found.shape == expected.shape == (3, 3, 16, 16)
    assert (found - expected).abs().max() <= 1.01 * level
    assert ((found - expected).abs() > 1e-5).float().mean() < 0.06


def test_the_written_processor_does_the_same_steps(tmp_path: Path) -> None:
    for changes in ({}, {"size": {"shortest_edge": 20}, "crop_size": 16, "image_processor_type": "CLIPImageProcessor"}):
        folder = save_tiny("vit", tmp_path)
        save_processor(folder, **changes)
        for options in ({}, {"normalize": "unit"}, {"image_size": 24}):
            transform = load_backbone(folder, **options).inputs.transform
            save_processor(folder, **{"do_center_crop": False, **transform.processor_config()})
            assert load_backbone(folder).inputs.transform == transform
            save_processor(folder, **changes)


def test_unit_normalisation_leaves_pixels_in_zero_to_one(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path), normalize="unit")
    rows = images(2, 16, 16)
    pixels = backbone.collate(backbone.encode(rows), [1, 0])["pixel_values"]
    torch.testing.assert_close(pixels, torch.from_numpy(rows[[1, 0]]).permute(0, 3, 1, 2) / 255)


def test_another_size_keeps_the_ratio_of_crop_to_short_side() -> None:
    transform = ImageTransform(size=224, short_side=256).with_size(112)
    assert (transform.size, transform.short_side) == (112, 128)
    assert ImageTransform(size=224).with_size(32) == ImageTransform(size=32)


def test_a_rescale_factor_is_folded_into_mean_and_deviation() -> None:
    processor = transformers.ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3)
    transform = ImageTransform.from_processor(processor, None)
    white = transform.normalise(torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(white, torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(transform.normalise(torch.zeros(1, 3, 2, 2)), -torch.ones(1, 3, 2, 2))


def test_augmentation_sees_native_pixels_and_ids() -> None:
    inputs = ImageInputs(ImageTransform(size=16, mean=(0.5,) * 3, std=(0.5,) * 3))
    rows = images(4, 8, 8)
    seen = {}

    def augment(pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen["pixels"], seen["ids"] = pixels, ids
        return pixels.flip(-1) + 0.5  # past white: clipped before it is normalised

    encoded = inputs.encode(rows, ids=[40, 30, 20, 10])
    pixels = inputs.collate(encoded, torch.tensor([2, 0]), device=CPU, augment=augment)["pixel_values"]
    assert seen["ids"].tolist() == [20, 40] and seen["ids"].dtype == torch.int64
    torch.testing.assert_close(seen["pixels"], torch.from_numpy(rows[[2, 0]]).permute(0, 3, 1, 2) / 255)
    assert pixels.shape == (2, 3, 16, 16) and pixels.max() == 1.0


def test_an_augmentation_that_does_nothing_changes_nothing_at_native_size() -> None:
    inputs = ImageInputs(ImageTransform(size=8))
    encoded = inputs.encode(images(3, 8, 8))
    plain = inputs.collate(encoded, [0, 1, 2], device=CPU, augment=None)["pixel_values"]
    same = inputs.collate(encoded, [0, 1, 2], device=CPU, augment=lambda pixels, ids: pixels)["pixel_values"]
    assert torch.equal(plain, same)


def test_an_augmentation_that_crops_to_the_final_size_is_not_resized_again() -> None:
    inputs = ImageInputs(ImageTransform(size=8, short_side=10))
    encoded = inputs.encode(images(2, 12, 12))
    cropped = inputs.collate(encoded, [0, 1], device=CPU, augment=lambda pixels, ids: pixels[..., 2:10, 2:10])
    assert torch.equal(
        cropped["pixel_values"], torch.from_numpy(encoded.images[:, 2:10, 2:10]).permute(0, 3, 1, 2) / 255
    )


def test_memory_maps_are_read_row_by_row(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", images(6, 8, 8))
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    inputs = ImageInputs(ImageTransform(size=None))
    encoded = inputs.encode(rows)
    assert encoded.images is rows and len(encoded) == 6 and encoded.num_truncated == 0
    part = encoded.select([5, 1])
    assert part.ids.tolist() == [5, 1]
    direct = inputs.collate(encoded, [5], device=CPU, augment=None)["pixel_values"]
    assert torch.equal(inputs.collate(part, [0], device=CPU, augment=None)["pixel_values"], direct)


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_other_arrays_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"uint8 array of shape \(n, height, width, 3\)"):
        ImageInputs(ImageTransform(size=8)).encode(rows)


def test_ids_must_fit() -> None:
    with pytest.raises(DataError, match="expected 2 row ids"):
        ImageInputs(ImageTransform(size=8)).encode(images(2, 8, 8), ids=[1, 2, 3])
