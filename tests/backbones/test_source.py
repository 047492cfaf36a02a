"""Names of models, and the hash of their folders."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from everlora.backbones import fingerprint as fingerprint_module
from everlora.backbones import load_backbone, model_fingerprint, resolve_source
from everlora.backbones import source as source_module
from everlora.errors import ModelError
from everlora.places import cache_folder
from tests.tiny_models import save_tiny


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(tmp_path) == resolve_source(str(tmp_path)) == tmp_path


def test_a_package_is_searched_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "holds_a_model"
    save_tiny("vit", package / "inner")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_backbone("package:holds_a_model/inner").source == "package:holds_a_model/inner"
    assert "holds_a_model" not in sys.modules
    for name, message in (
        ("package:holds_a_model/outer", "expected the folder outer in package holds_a_model"),
        ("package:holds_a_model", "name both parts"),
        ("package:holds_a_model/../..", "name both parts"),
        ("package:not_here_at_all/inner", "expected the installed package not_here_at_all"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_source(name)


def test_shared_models_lie_below_a_folder_that_a_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "place" / "models" / "net"
    save_tiny("vit", folder)
    monkeypatch.setenv("EVERLORA_SHARED", str(tmp_path / "place"))
    assert resolve_source("shared:net") == folder
    assert load_backbone("shared:net").source == "shared:net"
    for name in ("shared:", "shared:../models/net", "shared:/net"):
        with pytest.raises(ModelError, match="name a folder of shared models"):
            resolve_source(name)
    with pytest.raises(ModelError, match=r"models/other below \$EVERLORA_SHARED"):
        resolve_source("shared:other")
    monkeypatch.delenv("EVERLORA_SHARED")
    monkeypatch.chdir(tmp_path / "place" / "models")
    with pytest.raises(ModelError, match="models/net"):
        resolve_source("shared:net")


def test_the_packaged_model_loads_and_sees_32_pixels() -> None:
    backbone = load_backbone("packaged")
    assert (backbone.architecture, backbone.modality, backbone.image_size) == ("vit", "image", 32)


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing", "~/no such folder", "a/b/c", " "])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelError, match="found nothing at"):
        resolve_source(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="found the file"):
        resolve_source(tmp_path / "model.safetensors")


def test_a_hub_id_asks_the_hub_for_weights_in_safetensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns[-1]))
        return str(tmp_path)

    monkeypatch.setattr(source_module, "snapshot_download", download)
    assert resolve_source("owner/name") == tmp_path
    assert asked == [("owner/name", "model*.safetensors")]


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(source_module, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"neither for 'owner/name' \(no route\); check the name and the network"):
        resolve_source("owner/name")


def test_a_name_that_cannot_be_a_hub_id_is_refused() -> None:
    with pytest.raises(ModelError, match="which is neither"):
        resolve_source("two words")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVERLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    (folder / "README.md").write_text("first")
    return folder


def test_the_hash_follows_config_and_weights_only(weights: Path) -> None:
    first = model_fingerprint(weights)
    assert len(first) == 64 and model_fingerprint(weights) == first
    (weights / "README.md").write_text("second")
    (weights / "classifier.safetensors").write_bytes(b"not loaded")
    assert model_fingerprint(weights) == first
    moved = weights.rename(weights.with_name("elsewhere"))
    assert model_fingerprint(moved) == first
    (moved / "config.json").write_text("{ }")
    changed = model_fingerprint(moved)
    assert changed != first
    (moved / "model-00002-of-00002.safetensors").write_bytes(b"two")
    assert model_fingerprint(moved) != changed


def test_a_file_is_read_again_only_when_it_changed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights / "model.safetensors"
    first = model_fingerprint(weights)
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))  # same size, same time: the cache cannot see it
    assert model_fingerprint(weights) == first
    assert model_fingerprint(weights, use_cache=False) != first
    assert model_fingerprint(weights) != first  # what was read anew is remembered
    os.utime(path, ns=(stamp + 1, stamp + 1))
    path.write_bytes(b"one")
    assert model_fingerprint(weights) == first


def test_a_broken_or_closed_cache_only_costs_time(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_fingerprint(weights)
    cache = cache_folder() / "fingerprints.json"
    assert len(json.loads(cache.read_text())) == 2
    for content in ("{", "[]", json.dumps({str(weights / "config.json"): "nonsense"})):
        cache.write_text(content)
        assert model_fingerprint(weights) == first

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(fingerprint_module.tempfile, "mkstemp", refuse)
    cache.write_text("{}")
    assert model_fingerprint(weights) == first and cache.read_text() == "{}"


def test_a_folder_without_weights_is_refused(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected model weights"):
        model_fingerprint(weights)
