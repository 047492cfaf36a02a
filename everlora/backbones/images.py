"""From uint8 images to the pixel values a model expects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from everlora.backbones.inputs import Encoded, EncodedImages, Rows, as_rows
from everlora.errors import DataError, OptionError

__all__ = ["Augment", "ImageInputs", "ImageTransform", "check_image_size"]

logger = logging.getLogger("everlora.backbones")

Augment = Callable[[Tensor, Tensor], Tensor]

BILINEAR, BICUBIC, LANCZOS = 2, 3, 1  # the numbers Pillow and image processors use


@dataclass(frozen=True)
class ImageTransform:
    """How an image is resized and normalised before the model sees it.

    Attributes:
        size: height and width of the result, in pixels; `None` keeps the native size.
        short_side: when set, the short side is resized to it and the centre is cropped to `size`; otherwise the image
            is resized straight to `size x size`, whatever its aspect ratio.
        resample: `"bilinear"` or `"bicubic"`, antialiased.
        mean: three channel means for pixels in [0, 1]; `None` leaves pixels in [0, 1].
        std: three channel deviations, with `mean`.
    """

    size: int | None
    short_side: int | None = None
    resample: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def from_processor(cls, processor: Any, default_size: int | None) -> ImageTransform:
        """Read the steps of a Hugging Face image processor.

        Args:
            processor: any image processor with the usual attributes (`size`, `crop_size`, `image_mean`, ...).
            default_size: size to use when the processor does not resize.
        """
        steps: dict[str, Any] = processor.to_dict()
        sizes = dict(steps.get("size") or {})
        crop = dict(steps.get("crop_size") or {}) if steps.get("do_center_crop") else {}
        short_side = sizes.get("shortest_edge") if steps.get("do_resize", True) else None
        size = crop.get("height") or sizes.get("height") or short_side or default_size
        # A processor may rescale by another factor than 1/255; folding it into mean and deviation keeps one formula.
        scale = 255.0 * float(steps.get("rescale_factor") or 1 / 255) if steps.get("do_rescale", True) else 255.0
        normalise = bool(steps.get("do_normalize", True)) and steps.get("image_mean") is not None
        mean = tuple(steps["image_mean"]) if normalise else (0.0, 0.0, 0.0)
        std = tuple(steps["image_std"]) if normalise else (1.0, 1.0, 1.0)
        plain = not normalise and abs(scale - 1.0) < 1e-9
        return cls(
            size=size,
            short_side=short_side,
            resample="bicubic" if steps.get("resample") in (BICUBIC, LANCZOS) else "bilinear",
            mean=None if plain else tuple(value / scale for value in mean),
            std=None if plain else tuple(value / scale for value in std),
        )

    def with_size(self, size: int) -> ImageTransform:
        """Return the same steps for another size, keeping the ratio of short side to crop."""
        if self.short_side is None or self.size is None:
            return replace(self, size=size)
        return replace(self, size=size, short_side=round(size * self.short_side / self.size))

    def without_normalisation(self) -> ImageTransform:
        """Return the same steps with pixels left in [0, 1]."""
        return replace(self, mean=None, std=None)

    def processor_config(self) -> dict[str, Any]:
        """Return the same steps as the content of a `preprocessor_config.json` that plain transformers reads."""
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor" if self.short_side is None else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": self.mean is not None,
            "do_resize": self.size is not None,
            "resample": BICUBIC if self.resample == "bicubic" else BILINEAR,
        }
        if self.mean is not None and self.std is not None:
            config |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        if self.short_side is not None:
            crop = {"height": self.size, "width": self.size}
            config |= {"size": {"shortest_edge": self.short_side}, "do_center_crop": True, "crop_size": crop}
        elif self.size is not None:
            config |= {"size": {"height": self.size, "width": self.size}}
        return config

    def resize(self, images: Tensor) -> Tensor:
        """Resize and crop a batch.

        Args:
            images: `(n, 3, height, width)`, uint8 (any size) or float in [0, 1].

        Returns:
            `(n, 3, size, size)` of the same dtype; at native size when `size` is `None`.
        """
        height, width = images.shape[-2:]
        if self.size is None:
            return images
        target = (self.size, self.size)
        if self.short_side is not None:
            short = min(height, width)
            target = (int(self.short_side * height / short), int(self.short_side * width / short))
        if (height, width) != target:
            images = F.interpolate(images, size=target, mode=self.resample, antialias=True, align_corners=False)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return images[..., top : top + self.size, left : left + self.size]

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the channel means and divide by the deviations; `images` are floats in [0, 1]."""
        if self.mean is None or self.std is None:
            return images
        mean = images.new_tensor(self.mean).view(3, 1, 1)
        std = images.new_tensor(self.std).view(3, 1, 1)
        return (images - mean) / std


class ImageInputs:
    """Encodes and collates images for one transform."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def encode(self, inputs: Any, ids: Any = None) -> EncodedImages:
        """Check the images and keep them as they are.

        Args:
            inputs: `(n, height, width, 3)` uint8 array, possibly a memory map.
            ids: `(n,)` stable ids of the rows; row numbers when omitted.

        Raises:
            DataError: the array has another shape or dtype.
        """
        images = inputs if isinstance(inputs, np.ndarray) else np.asarray(inputs)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"expected images as a uint8 array of shape (n, height, width, 3), found {images.dtype} of shape "
                f"{images.shape}; convert them to RGB of one size first"
            )
        return EncodedImages(images=images, ids=_row_ids(ids, len(images)))

    def collate(
        self, encoded: Encoded, rows: Rows, *, device: torch.device, augment: Augment | None
    ) -> dict[str, Tensor]:
        """Return `{"pixel_values": (m, 3, size, size) float32}` for the given rows, on `device`.

        Without augmentation the images are resized as uint8, which is how image processors do it, so that an
        exported model sees the same pixels; with augmentation everything runs in float on the device.
        """
        if not isinstance(encoded, EncodedImages):
            raise DataError("expected encoded images, found encoded texts; use data of the modality of the model")
        index = as_rows(rows)
        pixels = torch.from_numpy(np.ascontiguousarray(encoded.images[index])).permute(0, 3, 1, 2)
        if augment is None:
            images = self.transform.resize(pixels).to(device).float().div(255)
            return {"pixel_values": self.transform.normalise(images)}
        native = pixels.to(device).float().div(255)
        images = augment(native, torch.from_numpy(encoded.ids[index]))
        # An augmentation that crops to the final size has done the resizing.
        is_final = images.shape != native.shape and images.shape[-2:] == (self.transform.size, self.transform.size)
        images = images if is_final else self.transform.resize(images)
        return {"pixel_values": self.transform.normalise(images.clamp(0.0, 1.0))}


def _row_ids(ids: Sequence[int] | np.ndarray[Any, Any] | None, count: int) -> np.ndarray[Any, Any]:
    if ids is None:
        return np.arange(count, dtype=np.int64)
    values = np.asarray(ids, dtype=np.int64)
    if values.shape != (count,):
        raise DataError(f"expected {count} row ids, found shape {values.shape}; pass one id for each input")
    return values


def check_image_size(size: int) -> int:
    """Return `size` when it is a usable image size.

    Raises:
        OptionError: it is not a positive whole number.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(f"expected image_size as a positive whole number of pixels, found {size!r}")
    return size
