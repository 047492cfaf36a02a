"""The doctor reads the tokenizer of a language model anew, as opening the learner does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everlora import Learner
from everlora.backbones import fingerprint_of_inputs
from everlora.doctor import examine
from everlora.errors import ModelError
from tests.export.language_builders import load_language_model, save_language_model


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
    assert found.severity == "broken" and "another tokenizer or template than the one at" in found.what
    with pytest.raises(ModelError, match="the tokenizer or the template"):
        Learner.open(folder)
    tokenizer.write_text("{", encoding="utf-8")
    [found] = examine(folder)
    assert found.severity == "broken" and "cannot be read" in found.what and "\n" not in str(found)
