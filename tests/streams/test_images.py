from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everlora.errors import DataError
from everlora.streams import images
from everlora.streams.images import decode_images


def encoded(size: tuple[int, int] = (5, 4), *, mode: str = "RGB", colour: Any = (9, 8, 7), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT_BYTES", 100)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (9, 8, 7), (9, 8, 7)),
        ("L", 40, (40, 40, 40)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("LA", (40, 255), (40, 40, 40)),
        ("I;16", 257 * 30, (30, 30, 30)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(mode: str, colour: Any, expected: tuple[int, int, int]) -> None:
    pixels = decode_images([encoded(mode=mode, colour=colour)], "x")
    assert pixels.shape == (1, 4, 5, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "JPEG"])
def test_formats(kind: str) -> None:
    assert np.abs(decode_images([encoded(kind=kind)], "x").astype(int) - [9, 8, 7]).max() <= 4


def test_camera_orientation_is_applied() -> None:
    image, buffer = Image.new("RGB", (6, 4)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(buffer, "JPEG", exif=exif)
    assert decode_images([buffer.getvalue()], "x").shape == (1, 6, 4, 3)


def test_arrays_and_pictures() -> None:
    grey = np.array([[0.0, 1.0], [0.5, 0.25]])
    assert decode_images([grey], "x")[0, :, :, 1].tolist() == [[0, 255], [128, 64]]
    assert decode_images([Image.new("L", (2, 2), 3)], "x").tolist() == np.full((1, 2, 2, 3), 3).tolist()
    assert decode_images([], "x").shape[0] == 0


def test_sizes() -> None:
    same = [encoded((8, 6))] * 3
    assert decode_images(same, "x").shape == (3, 6, 8, 3), "one native size is kept"
    assert decode_images(same, "x", image_size=32).shape == (3, 6, 8, 3), "and not blown up"
    assert decode_images(same, "x", image_size=4).shape == (3, 4, 4, 3)
    mixed = [encoded((8, 6)), encoded((4, 10)), encoded((5, 5))]
    assert decode_images(mixed, "x", image_size=7).shape == (3, 7, 7, 3)
    with pytest.raises(DataError, match="row 2 is 4x10 pixels while the first is 8x6; give image_size"):
        decode_images(mixed, "x")
    with pytest.raises(DataError, match="at least 1 pixel"):
        decode_images(same, "x", image_size=0)


def test_resizing_keeps_the_middle() -> None:
    striped = np.zeros((4, 12, 3), np.uint8)
    striped[:, 4:8] = 200
    result = decode_images([striped, striped[:2]], "x", image_size=4)
    assert (result[0] == 200).all()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"not an image", "row 2 cannot be decoded"),
        (encoded()[:40], "row 2 cannot be decoded"),
        (encoded(kind="JPEG")[:-200], "row 2 cannot be decoded"),
        (None, "row 2 is missing"),
        ({"bytes": None, "path": None}, "row 2 is missing"),
        (np.full((4, 5), np.nan), "NaN"),
        (np.full((4, 5), 3.0), r"outside \[0, 1\]"),
        (np.zeros((4, 5), np.int64), "int64"),
        (np.zeros((4, 5, 4), np.uint8), "shape"),
        ("nowhere.png", "nowhere.png does not exist"),
        (".", "is a folder; name its images one by one"),
    ],
)
def test_undecodable_images_are_named(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_images([encoded(), record], "the set")


def test_an_undecodable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(encoded()[:50])
    with pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
        decode_images(["bad.png"], "the set", folder=tmp_path)


def test_small_sets_stay_in_memory(tmp_path: Path) -> None:
    decode_images([encoded()] * 3, "x", cache=tmp_path)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.usefixtures("small_limit")
def test_large_sets_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [encoded(colour=(index, 0, 0)) for index in range(10)]
    first = decode_images(records, "x", cache=tmp_path)
    assert isinstance(first, np.memmap)
    assert first[:, 0, 0, 0].tolist() == list(range(10))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".npy"]
    monkeypatch.setattr(images, "_decode_all", None)
    again = decode_images(records, "x", cache=tmp_path)
    assert (np.asarray(again) == np.asarray(first)).all()
    torch.from_numpy(again[:2])  # a read-only array would warn here
    again[:] = 0
    assert decode_images(records, "x", cache=tmp_path)[9, 0, 0, 0] == 9, "writing does not reach the file"


@pytest.mark.usefixtures("small_limit")
def test_the_cache_knows_content_and_size(tmp_path: Path) -> None:
    records = [encoded((20, 20), colour=(index, 0, 0)) for index in range(10)]
    decode_images(records, "x", cache=tmp_path)
    assert decode_images(records[::-1], "x", cache=tmp_path)[0, 0, 0, 0] == 9
    assert decode_images(records, "x", image_size=6, cache=tmp_path).shape == (10, 6, 6, 3)
    assert len(list(tmp_path.rglob("*.npy"))) == 3


@pytest.mark.usefixtures("small_limit")
def test_a_changed_file_is_decoded_anew(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(10)]
    for path in paths:
        path.write_bytes(encoded())
    decode_images(paths, "x", cache=tmp_path / "cache")
    paths[3].write_bytes(encoded(colour=(200, 100, 50)))
    assert decode_images(paths, "x", cache=tmp_path / "cache")[3, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_cache_file_is_written_anew(tmp_path: Path, damage: bytes | None) -> None:
    records = [encoded()] * 10
    decode_images(records, "x", cache=tmp_path)
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    assert (decode_images(records, "x", cache=tmp_path) == (9, 8, 7)).all()


@pytest.mark.usefixtures("small_limit")
def test_two_writers_at_once(tmp_path: Path) -> None:
    records = [encoded(colour=(index, 0, 0)) for index in range(60)]
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(decode_images(records, "x", cache=tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result[:, 0, 0, 0].tolist() == list(range(60)) for result in results)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npy"]


@pytest.mark.usefixtures("small_limit")
def test_a_failure_leaves_no_half_file(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        decode_images([encoded()] * 9 + [b"broken"], "x", cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("small_limit")
def test_an_unusable_cache_folder_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert decode_images([encoded()] * 10, "x", cache=tmp_path / "file").shape[0] == 10
    assert "keeping them in memory" in caplog.text


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    decode_images([encoded()] * 300, "x", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 300), (300, 300)]


@pytest.mark.usefixtures("small_limit")
def test_a_full_disk_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10))
    assert (decode_images([encoded()] * 10, "x", cache=tmp_path) == (9, 8, 7)).all()
    assert "keeping them in memory" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
