"""SD-LoRA on convolutions, read as linear layers on patches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everlora import Learner
from everlora.errors import UnsupportedError
from everlora.lowrank import LowRankConv2d
from everlora.methods import method_spec
from everlora.methods.base import TaskInfo
from everlora.methods.sd_lora import SDLoRA
from tests.methods.conv_builders import ConvEncoder, images, save_resnet
from tests.methods.sd_lora_builders import collect, distance, weights
from tests.toy import FAST, toy_tasks


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet(tmp_path_factory.mktemp("resnet"))


def _make(name: str = "sd_lora", *, groups: int = 1, **options: Any) -> tuple[SDLoRA, ConvEncoder]:
    encoder = ConvEncoder(groups=groups)
    method = SDLoRA(method_spec(name).options({"rank": 2, **options}), encoder, seed=7)
    method.heads.double()
    return method, encoder


def _begin(method: SDLoRA, task: int) -> TaskInfo:
    info = TaskInfo(task, f"task {task}", (2 * task, 2 * task + 1), 16)
    method.begin_task(info, collect)
    method.heads.double()
    return info


def _learn(method: SDLoRA, *tasks: int, steps: int = 5) -> None:
    for task in tasks:
        info, data = _begin(method, task), images(task)
        parameters = [p for group in method.parameters().values() for p in group]
        optimizer = torch.optim.SGD(parameters, lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            method.loss(data).value.backward()
            optimizer.step()
        method.end_task(info, collect)


def _features(encoder: ConvEncoder) -> Tensor:
    with torch.no_grad():
        return encoder.features(images(5).inputs)


@pytest.mark.parametrize("options", [{}, {"scope": "module"}, {"current": "normalised"}, {"forward_mode": "factored"}])
def test_the_end_of_a_task_and_the_start_of_the_next_keep_the_function(options: dict[str, Any]) -> None:
    method, encoder = _make(**options)
    for task in range(3):
        before = _features(encoder)
        info, data = _begin(method, task), images(task)
        torch.testing.assert_close(_features(encoder), before, rtol=1e-12, atol=1e-12)
        parameters = [p for group in method.parameters().values() for p in group]
        optimizer = torch.optim.SGD(parameters, lr=0.3)
        for _ in range(4):
            optimizer.zero_grad()
            method.loss(data).value.backward()
            optimizer.step()
        trained = _features(encoder)
        assert float((trained - before).abs().max()) > 1e-6
        method.end_task(info, collect)
        torch.testing.assert_close(_features(encoder), trained, rtol=1e-12, atol=1e-12)


def test_old_magnitudes_are_trained_through_the_convolution() -> None:
    method, _ = _make()
    _learn(method, 0)
    _begin(method, 1)
    method.loss(images(1)).value.backward()
    magnitudes = method.parameters()["magnitudes"][0]
    assert magnitudes.grad is not None and float(magnitudes.grad[0].abs()) > 0.0


def test_presets_with_smaller_ranks_and_absorption() -> None:
    method, _ = _make("sd_lora_rr", rank_schedule={0: 3, 1: 2, 2: 1})
    _learn(method, 0, 1, 2)
    assert {tuple(layer.past_ranks.tolist()) for layer in method.layers().values()} == {(3, 2, 1)}
    method, encoder = _make("sd_lora_kd", kd_tau=10.0)
    _learn(method, 0)
    kept = {name: layer.total_rank for name, layer in method.layers().items()}
    _learn(method, 1)
    assert {name: layer.total_rank for name, layer in method.layers().items()} == kept, "all was absorbed"
    before = _features(encoder)
    _begin(method, 2)
    torch.testing.assert_close(_features(encoder), before, rtol=1e-12, atol=1e-12)


def test_merging_state_and_models_of_earlier_tasks() -> None:
    method, encoder = _make(max_rank=4, keep_last=1, max_compress_error=1.0)
    _learn(method, 0, 1, 2)
    assert {layer.total_rank for layer in method.layers().values()} == {4}
    other_encoder = ConvEncoder()
    other = SDLoRA(copy.deepcopy(method.options), other_encoder, seed=7)
    other.load_state(copy.deepcopy(method.state()))
    assert distance(weights(other), weights(method)) < 1e-12
    torch.testing.assert_close(_features(other_encoder), _features(encoder), rtol=1e-12, atol=1e-12)
    with other.model_at(2):
        torch.testing.assert_close(_features(other_encoder), _features(encoder), rtol=1e-12, atol=1e-12)


def test_convolutions_in_groups_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'second' is a convolution with 2 groups"):
        _make(groups=2)


@pytest.mark.parametrize("name", ["sd_lora", "sd_lora_rr", "sd_lora_kd"])
def test_a_learner_on_a_residual_network(name: str, resnet: Path, tmp_path: Path) -> None:
    ranks: dict[str, Any] = {"rank_schedule": {0: 3, 1: 2}} if name == "sd_lora_rr" else {"rank": 2}
    learner = Learner.create(tmp_path / "learner", model=resnet, method=name, **FAST, **ranks)
    tasks = toy_tasks("image", 2)
    for index, task in enumerate(tasks):
        learner.learn(task, name=f"task {index}")
    assert all(isinstance(layer, LowRankConv2d) for layer in learner.method.layers().values())
    pictures = list(tasks[0].inputs[:3])
    wanted = [prediction.scores for prediction in learner.predict(pictures)]
    again = Learner.open(tmp_path / "learner")
    assert [prediction.scores for prediction in again.predict(pictures)] == wanted
