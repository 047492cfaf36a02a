"""SD-LoRA in a learner directory: exports, going back, and models of earlier tasks after reopening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everlora import Learner
from everlora.errors import OptionError, TargetError
from everlora.methods.sd_lora import SDLoRA
from tests.methods.sd_lora_builders import distance, weights
from tests.toy import tiny_model, toy_learner, toy_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


def _method(learner: Learner) -> SDLoRA:
    assert isinstance(learner.method, SDLoRA)
    return learner.method


def _learn(learner: Learner, count: int) -> None:
    for index, task in list(enumerate(toy_tasks("image", count)))[len(learner.tasks) :]:
        learner.learn(task, name=f"task {index}")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kd": True, "kd_tau": 0.999999},
        {"preset": "official", "kd": True, "kd_tau": 10.0},
        {"max_rank": 4, "max_compress_error": 1.0, "scope": "module"},
    ],
    ids=str,
)
def test_a_learner_is_exported_reopened_rolled_back_and_looked_back_at(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    learner = toy_learner(tmp_path / "learner", model, "sd_lora", **options)
    then = []
    for count in (1, 2, 3):
        _learn(learner, count)
        then.append(weights(_method(learner)))
    again = Learner.open(tmp_path / "learner")
    assert distance(weights(_method(again)), then[2]) < 1e-6
    for task in range(_method(again).past.earliest_exact, 3):
        with _method(again).model_at(task):
            assert distance(weights(_method(again)), then[task]) < 1e-6
    for layout in ("merged", "peft"):
        assert again.export(tmp_path / layout, layout).max_difference < 1e-5
    record = again.card()["tasks"][2]
    assert record["panels"]["magnitude"] and record["cost"]["trainable_parameters"] > 0
    digest = again.digest
    again.rollback(2)
    assert distance(weights(_method(again)), then[1]) < 1e-6
    _learn(again, 3)
    assert again.digest == digest


def test_only_queries_and_values_are_adapted_and_some_layers_may_have_nothing_left(model: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", model, "sd_lora_kd", kd_tau=0.999999)
    _learn(learner, 3)
    layers = learner.method.layers()
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"q_proj", "v_proj"}
    ranks = torch.tensor([layer.past_ranks.tolist() for layer in layers.values()])
    assert bool((ranks[:, 0] == 2).all()) and bool((ranks[:, 1:] == 0).any()), "some directions were absorbed"


def test_a_truncated_adapter_through_the_learner(model: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", model, "sd_lora")
    _learn(learner, 2)
    report = learner.export(tmp_path / "small", "peft", max_rank=1)
    assert report.truncation.keys() == learner.method.layers().keys()
    assert all(0 < error < 1 for error in report.truncation.values())
    with pytest.raises(OptionError, match="max_rank is for format='peft'"):
        learner.export(tmp_path / "merged", max_rank=1)


def test_a_network_without_attention_says_what_to_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="matches no layer"):
        toy_learner(tmp_path / "learner", model, "sd_lora", targets=["nothing"])
    learner = toy_learner(tmp_path / "keys", model, "sd_lora", targets=["k_proj"])
    assert {name.rsplit(".", 1)[-1] for name in learner.method.layers()} == {"k_proj"}
