from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from everlora.errors import OptionError, ShapeError
from everlora.streams.augment import AUGMENTATIONS, Draw, Interpolation, _crop_boxes, augment, resample, resize


def batch(count: int = 12, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("size", [None, 24])
def test_contract(name: str, size: int | None) -> None:
    images, ids = batch(), torch.arange(100, 112)
    kept = images.clone()
    result = augment(name, images, ids, seed=1, epoch=0, size=size)
    side = size or 16
    assert result.shape == (12, 3, side, side)
    assert result.dtype == images.dtype
    assert 0.0 <= float(result.min()) <= float(result.max()) <= 1.0
    assert torch.equal(images, kept), "the input is not modified"
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = augment(name, images[order], ids[order], seed=1, epoch=0, size=size)
    # Matrix products of other batch shapes may round otherwise in the last bit.
    torch.testing.assert_close(shuffled, result[order], rtol=0, atol=1e-6)
    alone = torch.cat([augment(name, images[i : i + 1], ids[i : i + 1], seed=1, epoch=0, size=size) for i in range(12)])
    torch.testing.assert_close(alone, result, rtol=0, atol=1e-6)
    if name != "none":
        for seed, epoch in ((1, 1), (2, 0)):
            other = augment(name, images, ids, seed=seed, epoch=epoch, size=size)
            assert not torch.allclose(other, result, atol=1e-3)
    assert augment(name, images.half(), ids, seed=1, epoch=0, size=size).dtype == torch.float16


def test_none_returns_the_input() -> None:
    images = batch()
    assert augment("none", images, torch.arange(12), seed=0, epoch=0) is images
    assert augment("none", images, torch.arange(12), seed=0, epoch=0, size=16) is images


def test_flip_mirrors_half() -> None:
    images = batch(400, 4, 4)
    result = augment("flip", images, torch.arange(400), seed=0, epoch=0)
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    assert ((result == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_crop_flip_shifts_by_whole_pixels_over_black() -> None:
    images = batch(200, 32, 32) * 0.9 + 0.1
    result = augment("crop-flip", images, torch.arange(200), seed=0, epoch=0)
    padded = functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for index in range(200):
        candidates = {}
        for top in range(9):
            for left in range(9):
                crop = padded[index, :, top : top + 32, left : left + 32]
                candidates[(top, left, False)] = crop
                candidates[(top, left, True)] = crop.flip(-1)
        found = [key for key, crop in candidates.items() if torch.equal(crop, result[index])]
        assert len(found) == 1
        seen.add(found[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [9, 16, 40])
def test_resample_is_crop_then_antialiased_resize(interpolation: Interpolation, size: int) -> None:
    images = batch(4, 24, 20)
    boxes = torch.tensor([[0, 0, 24, 20], [3, 5, 7, 11], [10, 2, 14, 18], [1, 1, 1, 1]], dtype=torch.float32)
    flip = torch.tensor([False, True, False, True])
    result = resample(images, boxes, size, interpolation=interpolation, flip=flip)
    for index, (top, left, height, width) in enumerate(boxes.int().tolist()):
        crop = images[index : index + 1, :, top : top + height, left : left + width]
        expected = functional.interpolate(crop, size=(size, size), mode=interpolation, antialias=True).clamp(0, 1)
        expected = expected.flip(-1) if flip[index] else expected
        torch.testing.assert_close(result[index : index + 1], expected, rtol=0, atol=2e-6)


def test_resize_takes_the_middle_square() -> None:
    images = batch(2, 10, 16)
    expected = functional.interpolate(images[..., 3:13], size=(5, 5), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(resize(images, 5), expected, rtol=0, atol=2e-6)


def test_crop_boxes_lie_inside_with_the_declared_areas_and_ratios() -> None:
    boxes = _crop_boxes(Draw(torch.arange(5000), 0, 0), 32, 32)
    top, left, height, width = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert ((top + height) <= 32).all()
    assert ((left + width) <= 32).all()
    area = height * width / 1024
    # Sides are rounded to whole pixels, so the bounds hold up to half a pixel on each side.
    assert 0.06 < float(area.min()) < 0.09
    assert float(area.max()) == 1.0 or float(area.max()) > 0.97
    assert 0.65 < float((width / height).min()) < 0.85
    assert 1.2 < float((width / height).max()) < 1.55
    # A uniform area has mean 0.54; boxes that do not fit are drawn again, which favours small ones a little.
    assert 0.46 < float(area.mean()) < 0.54


def test_a_long_image_falls_back_to_its_middle() -> None:
    boxes = _crop_boxes(Draw(torch.arange(300), 0, 0), 4, 400)
    assert (boxes[:, 2] <= 4).all()
    fallback = boxes[(boxes[:, 2] == 4) & (boxes[:, 3] == 5)]
    assert len(fallback) > 0
    assert (fallback[:, 1] == 197).any()


def test_refused() -> None:
    images, ids = batch(2), torch.arange(2)
    with pytest.raises(OptionError, match="did you mean 'crop_flip'"):
        augment("crop_flips", images, ids, seed=0, epoch=0)
    with pytest.raises(OptionError, match="at least 1"):
        augment("flip", images, ids, seed=0, epoch=0, size=0)
    with pytest.raises(ShapeError, match="one id each"):
        augment("flip", images, ids[:1], seed=0, epoch=0)
    with pytest.raises(ShapeError, match="floats"):
        augment("flip", images.to(torch.uint8), ids, seed=0, epoch=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_the_same_on_an_accelerator(name: str) -> None:
    images, ids = batch(64, 32, 32), torch.arange(64)
    expected = augment(name, images, ids, seed=0, epoch=0, size=48)
    result = augment(name, images.cuda(), ids, seed=0, epoch=0, size=48)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-5)
