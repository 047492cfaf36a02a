from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everlora.errors import StoreError
from everlora.store import files


def test_json_is_canonical_and_round_trips(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é": "ü"}}
    data = files.dump_json(value, "x.json")
    assert data == files.dump_json(dict(reversed(value.items())), "x.json")
    assert data.isascii() and data.index(b'"a"') < data.index(b'"b"')
    assert files.load_json(data, tmp_path / "x.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32(1.0), {1, 2}, b"bytes"])
def test_json_refuses_what_it_cannot_hold(value: object) -> None:
    with pytest.raises(StoreError, match=r"x\.json can hold plain JSON values only"):
        files.dump_json({"key": value}, "x.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not allowed"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),  # deeper than the parser's stack
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),  # an integer that would take quadratic time
        (b"[1]", "JSON list where an object is expected"),
    ],
)
def test_damaged_json_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        files.load_json(data, tmp_path / "task.json")
    assert "task.json" in str(caught.value)


def test_large_json_is_refused_in_both_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    with pytest.raises(StoreError, match="above the limit of 100"):
        files.dump_json({"a": "x" * 200}, "x.json")
    (tmp_path / "big.json").write_bytes(b" " * 101)
    with pytest.raises(StoreError, match=r"big\.json has 101 bytes, above the limit of 100"):
        files.read_bytes(tmp_path / "big.json", limit=100)
    assert files.read_bytes(tmp_path / "big.json", limit=101) == b" " * 101


def test_arrays_round_trip_and_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(3.0),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 5), dtype=np.int64),
    }
    data = files.dump_arrays(arrays, "x.safetensors")
    assert data == files.dump_arrays(dict(reversed(arrays.items())), "x.safetensors")
    loaded = files.load_arrays(data, tmp_path / "x.safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array)


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([object()]), [1.0, 2.0], np.array([1j])])
def test_arrays_of_other_things_are_refused(value: object) -> None:
    with pytest.raises(StoreError, match=r"array 'weight' of x\.safetensors is"):
        files.dump_arrays({"weight": value}, "x.safetensors")  # type: ignore[dict-item]


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"\xff" * 64])
def test_damaged_arrays_are_named(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.safetensors is not a whole safetensors file"):
        files.load_arrays(data, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".hidden", "a\\b", "a\0b", "x\n"])
def test_paths_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="leaves the folder"):
        files.inside(tmp_path, name)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="link that leaves the folder"):
        files.inside(root, "link/file.json")
    assert files.inside(root, "stable/file.json") == root / "stable" / "file.json"


def test_move_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_dir()


def test_replace_syncs_the_bytes_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(files.os, name)
        monkeypatch.setattr(
            files.os, name, lambda *args, _name=name, _real=real: (steps.append(_name), _real(*args))[1]
        )
    files.replace_file(tmp_path / "x.json", b"new")
    assert steps == ["fsync", "replace", "fsync"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
