"""Decoding images once, into one uint8 array, memory-mapped from a cache file when it is large."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from everlora.errors import DataError
from everlora.places import cache_folder

__all__ = ["IMAGE_SUFFIXES", "MEMORY_LIMIT_BYTES", "Progress", "decode_images"]

Progress = Callable[[int, int], None]
# Decoding this much takes about two seconds; smaller sets are decoded anew each time.
MEMORY_LIMIT_BYTES = 16 * 2**20
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})

_LOGGER = logging.getLogger("everlora.streams")
_CACHE_FORMAT = "1"
_REPORT_EVERY = 256


@dataclass(frozen=True)
class _Batch:
    """The undecoded images and how messages name them."""

    records: Sequence[Any]
    origin: str
    folder: Path | None

    def where(self, index: int) -> str:
        path = self.path(index)
        return f"image {path}" if path is not None else f"{self.origin}: the image in row {index + 1}"

    def path(self, index: int) -> Path | None:
        record = self.records[index]
        if isinstance(record, Mapping):
            if record["bytes"] is not None or record["path"] is None:
                return None
            record = record["path"]
        if not isinstance(record, str | os.PathLike):
            return None
        path = Path(record)
        return path if path.is_absolute() or self.folder is None else self.folder / path

    def content(self, index: int) -> bytes | None:
        record = self.records[index]
        content = record["bytes"] if isinstance(record, Mapping) else record
        return content if isinstance(content, bytes) else None


def decode_images(
    records: Sequence[Any],
    origin: str,
    *,
    folder: Path | None = None,
    image_size: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Decode images to RGB bytes of one size.

    Images of one native size keep it, unless their short side exceeds `image_size`; otherwise every image is resized
    (short side to `image_size`, bicubic) and cropped in its centre to a square.

    Args:
        records: per image, encoded bytes, a path, `{"bytes", "path"}`, a PIL image, or an array `(H, W)` or
            `(H, W, 3)`, uint8 or floats in [0, 1].
        origin: how error messages call the data set.
        folder: where relative paths start.
        image_size: pixels of the common side; needed where native sizes differ.
        cache: folder of cache files, None for everlora's own.
        progress: called with (images done, images in all) now and then.

    Returns:
        `(n, H, W, 3)` uint8. Beyond `MEMORY_LIMIT_BYTES` a copy-on-write map of a cache file (writing to it changes
        neither the file nor another process), else an array in memory.

    Raises:
        DataError: an image cannot be decoded, holds NaN, or sizes differ and `image_size` is None.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel, not {image_size}")
    batch = _Batch(records, origin, folder)
    if not len(records):
        return np.zeros((0, image_size or 1, image_size or 1, 3), dtype=np.uint8)
    first = _decode(batch, 0)
    fit = image_size if image_size is not None and min(first.size) > image_size else None
    width, height = (fit, fit) if fit is not None else first.size
    key = None
    if len(records) * height * width * 3 > MEMORY_LIMIT_BYTES:
        key = _cache_key(batch, image_size)
    if key is None:
        return _decode_all(batch, fit, image_size, progress, np.zeros)
    return _decode_cached(batch, fit, image_size, progress, (cache or cache_folder()) / "images" / f"{key}.npy")


Allocate = Callable[..., NDArray[np.uint8]]


def _decode_cached(
    batch: _Batch, fit: int | None, image_size: int | None, progress: Progress | None, target: Path
) -> NDArray[np.uint8]:
    cached = _open_cached(target, len(batch.records))
    if cached is not None:
        return cached
    # A name of its own per writer, then a rename: two processes may decode the same set at once, the last one wins,
    # and no reader ever sees half a file.
    unfinished = target.with_name(f"{target.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")

    def allocate(shape: tuple[int, ...], dtype: type) -> NDArray[np.uint8]:
        # A full disk must be an error here: met while writing through the map it would kill the process.
        if shutil.disk_usage(target.parent).free < math.prod(shape):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
        return np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=shape)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        images = _decode_all(batch, fit, image_size, progress, allocate)
        images.flush()  # type: ignore[attr-defined]
        del images
        os.replace(unfinished, target)
    except OSError as error:
        _LOGGER.warning("cannot cache decoded images at %s (%s); keeping them in memory", target, error)
        return _decode_all(batch, fit, image_size, progress, np.zeros)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    opened = _open_cached(target, len(batch.records))
    if opened is None:
        raise DataError(f"the cache file {target} changed while it was written; remove it and try again")
    return opened


def _open_cached(path: Path, count: int) -> NDArray[np.uint8] | None:
    try:
        images: NDArray[np.uint8] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    usable = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
    return images if usable else None


def _decode_all(
    batch: _Batch, fit: int | None, image_size: int | None, progress: Progress | None, allocate: Allocate
) -> NDArray[np.uint8]:
    total = len(batch.records)
    images: NDArray[np.uint8] | None = None
    for index, image in _decoded(batch, progress):
        pixels = np.asarray(_fitted(image, fit) if fit is not None else image)
        if images is None:
            images = allocate((total, *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            if image_size is None:
                (height, width), (first_height, first_width) = pixels.shape[:2], images.shape[1:3]
                raise DataError(
                    f"{batch.where(index)} is {width}x{height} pixels while the first is {first_width}x{first_height}; "
                    f"give image_size to bring all images to one size"
                )
            return _decode_all(batch, image_size, image_size, progress, allocate)
        images[index] = pixels
    assert images is not None
    return images


def _decoded(batch: _Batch, progress: Progress | None) -> Iterator[tuple[int, Image.Image]]:
    total = len(batch.records)
    for index in range(total):
        yield index, _decode(batch, index)
        if progress is not None and ((index + 1) % _REPORT_EVERY == 0 or index + 1 == total):
            progress(index + 1, total)


def _decode(batch: _Batch, index: int) -> Image.Image:
    record, content, path = batch.records[index], batch.content(index), batch.path(index)
    if isinstance(record, np.ndarray):
        return _from_array(record, batch.where(index))
    try:
        if isinstance(record, Image.Image):
            return _to_rgb(record)
        if content is None and path is None:
            raise DataError(f"{batch.where(index)} is missing; fill it or drop the row")
        if content is not None:
            with Image.open(io.BytesIO(content), formats=_formats(content)) as image:
                return _to_rgb(image)
        with Image.open(str(path)) as image:
            return _to_rgb(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{batch.where(index)} does not exist; correct its path or drop the row") from error
    except IsADirectoryError as error:
        raise DataError(
            f"{batch.where(index)} is a folder; name its images one by one, or give it as a data set (--input FOLDER)"
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) and path is None and content is None else "not a whole image"
        raise DataError(f"{batch.where(index)} cannot be decoded ({reason}); repair or remove it") from error


def _formats(content: bytes) -> tuple[str, ...] | None:
    """Name the format by its first bytes: Pillow's own search through all formats costs as much as decoding."""
    for start, name in ((b"RIFF", "WEBP"), (b"\x89PNG", "PNG"), (b"\xff\xd8\xff", "JPEG")):
        if content.startswith(start):
            return (name,)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA")
    if image.getexif():
        image = ImageOps.exif_transpose(image)
    return image.convert("RGB")


def _from_array(array: NDArray[Any], where: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"{where} has shape {array.shape}; expected (height, width) or (height, width, 3)")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise DataError(f"{where} holds NaN or infinity; repair it or drop the row")
        if array.min() < 0.0 or array.max() > 1.0:
            raise DataError(f"{where} holds floats outside [0, 1]; scale it or give bytes 0 to 255")
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"{where} holds {array.dtype} values; expected uint8, or floats in [0, 1]")
    return Image.fromarray(array).convert("RGB")


def _fitted(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if (width, height) == (size, size):
        return image
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.crop((left, top, left + size, top + size))


def _cache_key(batch: _Batch, image_size: int | None) -> str | None:
    """Hash what decides the decoded pixels: contents, or path, size and time of files; None for live images."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {image_size} {len(batch.records)}".encode())
    for index in range(len(batch.records)):
        content, path = batch.content(index), batch.path(index)
        if content is not None:
            digest.update(b"b%d " % len(content))
            digest.update(content)
        elif path is not None and path.is_file():
            status = path.stat()
            digest.update(f"p{status.st_size} {status.st_mtime_ns} ".encode() + os.fsencode(path.resolve()))
        else:
            return None
    return digest.hexdigest()
