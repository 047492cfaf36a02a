"""The doctor reads what prepares rows anew, as opening the learner does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from everlora import Learner
from everlora.backbones import fingerprint_of_inputs
from everlora.doctor import examine
from everlora.errors import ModelError
from tests.export.language_builders import load_language_model, save_language_model
from tests.tiny_models import save_processor
from tests.toy import tiny_model, toy_learner, toy_texts


@pytest.mark.parametrize("template", ["auto", "Q: {instruction}\nA: "])
def test_another_tokenizer_is_found(template: str, tmp_path: Path) -> None:
    model, folder = save_language_model("llama", tmp_path / "base"), tmp_path / "learner"
    backbone = load_language_model(model, template=template)
    assert fingerprint_of_inputs(model, template=template) == backbone.inputs_fingerprint
    options = {"template": template, "max_length": 64, "rank": 2}
    Learner.create(folder, model=model, method="sequential", scenario="language", **options)
    assert examine(folder) == []
    tokenizer = model / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["card"], words["parcel"] = words["parcel"], words["card"]
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    [found] = examine(folder)
    assert found.severity == "broken" and "another tokenizer, template, image processor" in found.what
    with pytest.raises(ModelError, match="the tokenizer or the template"):
        Learner.open(folder)
    tokenizer.write_text("{", encoding="utf-8")
    [found] = examine(folder)
    assert found.severity == "broken" and "cannot be read" in found.what and "\n" not in str(found)


def test_another_vocabulary_of_a_text_encoder_is_found(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("bert", tmp_path / "made"), tmp_path / "base")
    learner = toy_learner(tmp_path / "learner", model, "ncm")
    learner.learn(toy_texts(["a", "b"]))
    assert examine(tmp_path / "learner") == [] and Learner.open(tmp_path / "learner").digest == learner.digest
    tokenizer = model / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words["card"], words["parcel"] = words["parcel"], words["card"]
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    [found] = examine(tmp_path / "learner")
    assert found.severity == "broken" and "another tokenizer" in found.what
    with pytest.raises(ModelError, match="the tokenizer, its length or the pooling at"):
        Learner.open(tmp_path / "learner")


def test_another_image_processor_is_found(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("vit", tmp_path / "made"), tmp_path / "base")
    toy_learner(tmp_path / "learner", model, "ncm")
    assert examine(tmp_path / "learner") == []
    save_processor(model)
    file = model / "preprocessor_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "image_mean": [0.1, 0.2, 0.3]}), encoding="utf-8")
    [found] = examine(tmp_path / "learner")
    assert found.severity == "broken" and "image processor" in found.what
    with pytest.raises(ModelError, match="the image processor or the pooling at"):
        Learner.open(tmp_path / "learner")


def test_a_learner_that_knows_no_such_fingerprint_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert", tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr("everlora.backbones.base.Backbone.inputs_fingerprint", None)
        toy_learner(tmp_path / "learner", model, "ncm")
    assert examine(tmp_path / "learner") == [] and not Learner.open(tmp_path / "learner").tasks
