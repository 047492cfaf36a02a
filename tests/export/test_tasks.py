"""Exports of single tasks that have networks of their own, for models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.errors import OptionError, UnsupportedError
from everlora.methods.base import Batch
from tests.export.builders import IMAGES, TEXTS
from tests.tiny_models import save_tiny
from tests.toy import FAST, toy_tasks

METHODS: dict[str, dict[str, Any]] = {
    "convlora": {"rank_linear": 3, "alpha_linear": 6.0},
    "independent": {"train": "adapter", "rank": 2, "alpha": 3.0},
    "senacnn": {},
    "packnet": {},
}


def taught(folder: Path, kind: str, method: str, **options: Any) -> Learner:
    model = save_tiny(kind, folder / "base")
    learner = Learner.create(folder / "learner", model=model, method=method, **{**FAST, **options})
    for index, rows in enumerate(toy_tasks("image" if kind == "vit" else "text", 2)):
        learner.learn(rows, name=f"task {index}")
    return learner


def inputs_of(learner: Learner) -> dict[str, Tensor]:
    rows = IMAGES if learner.backbone.modality == "image" else TEXTS
    return learner.backbone.collate(learner.backbone.encode(rows), np.arange(5))


def own_logits(learner: Learner, task: int) -> Tensor:
    with torch.no_grad():
        logits = learner.method.logits(Batch(inputs_of(learner), torch.zeros(5, dtype=torch.long)), task)
    return logits[:, 2 * task : 2 * task + 2]


@pytest.mark.parametrize("method", METHODS)
def test_the_task_that_was_named_is_written(method: str, tmp_path: Path) -> None:
    learner = taught(tmp_path, "vit", method, **METHODS[method])
    expected = [own_logits(learner, task) for task in (0, 1)]
    learner.method.activate(1)
    for task in (0, 1):
        out = tmp_path / f"out-{task}"
        assert learner.export(out, task=task).model_class == "ViTForImageClassification"
        with quiet_transformers(), torch.no_grad():
            model = transformers.ViTForImageClassification.from_pretrained(out)
            found = model(pixel_values=inputs_of(learner)["pixel_values"]).logits
        torch.testing.assert_close(found, expected[task], rtol=1e-5, atol=1e-5)
        assert list(model.config.id2label.values()) == learner.classes[2 * task : 2 * task + 2]
        assert learner.method.task_modules.active == 1
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert all(torch.equal(own_logits(learner, task), expected[task]) for task in (0, 1))


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("method", ["convlora", "independent"])
def test_norms_of_a_task_travel_with_its_adapter(kind: str, method: str, tmp_path: Path) -> None:
    learner = taught(tmp_path, kind, method, **METHODS[method])
    expected = own_logits(learner, 0)
    learner.export(tmp_path / "out", "peft", task="task 0")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scale = METHODS[method].get("alpha_linear", METHODS[method].get("alpha")) / config["r"]
    assert config["lora_alpha"] / config["r"] == scale > 1
    assert any("orm" in name for name in config["modules_to_save"])
    with quiet_transformers(), torch.no_grad():
        base = transformers.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
        plain = load_backbone(tmp_path / "base")  # pools what the plain model gives
        plain.model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        features = plain.features(inputs_of(learner))
    head = load_file(tmp_path / "out" / "head.safetensors")
    torch.testing.assert_close(features @ head["weight"].T + head["bias"], expected, rtol=1e-5, atol=1e-5)


def test_which_task_must_and_may_be_named(tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "own", save_tiny("vit", tmp_path / "base"), "senacnn", **FAST)
    first, second = toy_tasks("image", 2)
    learner.learn(first, name="first")
    learner.export(tmp_path / "only")  # one task needs no name
    with pytest.raises(UnsupportedError, match="a PEFT adapter needs low-rank factors, and no layer has any"):
        learner.export(tmp_path / "peft", "peft")
    learner.learn(second, name="second")
    with pytest.raises(OptionError, match=r"has a network of its own; .* one of: first, second"):
        learner.export(tmp_path / "both")
    assert not (tmp_path / "both").exists()
    shared = Learner.create(tmp_path / "shared", tmp_path / "base", "probe", **FAST)
    shared.learn(first, name="first")
    with pytest.raises(OptionError, match="one network knows all tasks of this learner"):
        shared.export(tmp_path / "both", task="first")
