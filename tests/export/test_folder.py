"""What an export writes, leaves alone and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from everlora.backbones import load_backbone
from everlora.backbones.base import Backbone
from everlora.errors import ModelError, NumericError, ShapeError, StoreError, UnsupportedError
from everlora.export import ExportHead, export_merged, export_peft
from everlora.export import huggingface as writing
from tests.export.builders import (
    CARD,
    IMAGES,
    LABELS,
    make_head,
    raw_rows,
    readme_code,
    teach,
)
from tests.tiny_models import IMAGE_KINDS, save_tiny


def test_export_without_adapters_is_the_base_and_its_head(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    head = make_head(backbone)
    assert export_merged(backbone, {}, head, tmp_path / "out", card={}).max_difference < 1e-5
    with pytest.raises(UnsupportedError, match=r"no layer has any: .* export merged instead"):
        export_peft(backbone, {}, head, tmp_path / "peft", card={})
    assert not (tmp_path / "peft").exists()


def test_the_learner_is_left_as_it_was(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("bert", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    export_merged(backbone, layers, head, tmp_path / "merged", card=CARD)
    assert torch.equal(torch.rand(3), expected)
    export_peft(backbone, layers, head, tmp_path / "peft", card=CARD)
    after = backbone.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert backbone.training and all(module.training for module in backbone.modules())
    assert all(layer is backbone.model.get_submodule(name) for name, layer in layers.items())


@pytest.mark.slow
@pytest.mark.parametrize("write", [export_merged, export_peft])
@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_readme_runs_alone_without_warnings_or_everlora(write: Any, kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny(kind, tmp_path / "base"))
    write(backbone, teach(backbone), make_head(backbone), tmp_path / "out", card=CARD)
    check = "import sys; assert not any(name.startswith('everlora') for name in sys.modules)"
    program = "\n".join([*readme_code(tmp_path / "out"), check])
    # peft itself reads an attribute that transformers calls deprecated.
    strict = ["-W", "error"] if write is export_merged else ["-W", "error", "-W", "ignore::FutureWarning"]
    done = subprocess.run(
        [sys.executable, *strict, "-c", program],
        cwd=tmp_path / "out",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert any(label.split("\n")[0] in done.stdout for label in LABELS)


def test_the_readme_is_a_card(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    export_merged(backbone, teach(backbone), make_head(backbone), tmp_path / "out", card=CARD)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    major = transformers.__version__.split(".")[0]
    for part in (
        "library_name: transformers",
        "inflora",
        "owner/name",
        "ab" * 32,
        f"transformers {major}",
        "everlora 0.",
    ):
        assert part in text
    assert "| 1 | january \\| first | 1 |" in text and "| 2 | february | 2 |" in text
    labels = re.search(r"```text\n(.*?)\n```", text, flags=re.DOTALL)
    assert labels is not None and [json.loads(line) for line in labels[1].split("\n")] == list(LABELS)
    info = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (info["kind"], info["model_class"], info["has_classifier"]) == ("merged", "ViTForImageClassification", True)
    assert 0 <= info["max_logit_difference"] < 1e-5


def test_labels_of_the_base_do_not_leak_into_the_export(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base", num_labels=9), pooling="mean")
    export_merged(backbone, {}, make_head(backbone), tmp_path / "out", card={})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    head = make_head(backbone)
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    for target in (used, used / "mine.txt"):
        with pytest.raises(StoreError, match="expected a new or empty folder"):
            export_merged(backbone, {}, head, target, card={})
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_merged(backbone, {}, head, tmp_path / "empty", card={})
    export_merged(backbone, {}, head, tmp_path / "deep" / "er", card={})
    for folder in (tmp_path / "empty", tmp_path / "deep" / "er"):
        assert (folder / "model.safetensors").is_file()
        assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "deep", "empty", "used"]


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def test_an_export_with_other_logits_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    layers, head = teach(backbone), make_head(backbone)
    real = writing.build_classifier

    def spoiled(*args: Any) -> Any:
        model = real(*args)
        model.classifier.bias.data += 0.1
        return model

    monkeypatch.setattr(writing, "build_classifier", spoiled)
    with pytest.raises(ModelError, match=r"found a difference of 0\.1"):
        export_merged(backbone, layers, head, tmp_path / "out", card={})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    backbone = load_backbone(save_tiny("vit", tmp_path / "base"))
    wide = ExportHead(np.zeros((2, 5), np.float32), np.zeros(2, np.float32), ("a", "b"))
    with pytest.raises(ShapeError, match="a head for 16 features, found one for 5"):
        export_merged(backbone, {}, wide, tmp_path / "out", card={})
    other = load_backbone(tmp_path / "base")
    with pytest.raises(ModelError, match="found it detached"):
        export_merged(backbone, teach(other), make_head(backbone), tmp_path / "out", card={})
    with pytest.raises(ShapeError, match="one weight row, one bias and one label"):
        ExportHead(np.zeros((2, 5), np.float32), np.zeros(2, np.float32), ("a",))
    with pytest.raises(ShapeError, match="the 7 random features of the head, found width 5"):
        ExportHead(wide.weight, wide.bias, wide.labels, projection=np.zeros((7, 16), np.float32))
    with pytest.raises(NumericError, match="finite head weights"):
        ExportHead(np.full((1, 5), np.nan, np.float32), np.zeros(1, np.float32), ("a",))


def test_a_network_of_another_kind_is_declined(tmp_path: Path) -> None:
    known = load_backbone(save_tiny("vit", tmp_path / "base"))
    names = {"source": "mine", "folder": tmp_path, "architecture": "mine", "feature_dim": 16, "pooling": "cls"}
    other = _Other(known.model, known.inputs, **names)
    with pytest.raises(UnsupportedError, match="and mine is neither; predict with the learner itself"):
        export_merged(other, {}, make_head(known), tmp_path / "out", card={})


class _Other(Backbone):
    default_targets = ("query",)

    def features(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


def test_every_image_kind_has_a_processor_that_plain_transformers_reads(tmp_path: Path) -> None:
    for kind in IMAGE_KINDS:
        backbone = load_backbone(save_tiny(kind, tmp_path / kind))
        export_merged(backbone, {}, make_head(backbone), tmp_path / f"{kind}-out", card={})
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / f"{kind}-out")
        pixels = processor(images=raw_rows(backbone), return_tensors="pt")["pixel_values"]
        expected = backbone.collate(backbone.encode(IMAGES), np.arange(5))["pixel_values"]
        torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)
