"""O-LoRA: one adapter a task, added up, and the rows of the new one held away from those of the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from everlora import Learner
from everlora.errors import UnsupportedError
from everlora.methods import method_entry
from everlora.methods.base import TaskInfo
from everlora.methods.o_lora import OLoraOptions, overlap
from everlora.peft_folders import read_factors
from everlora.streams import concatenate
from tests.methods.language_builders import LanguageBench
from tests.methods.tuned_builders import Bench, assert_goes_on_after_reopening, save_models, tasks
from tests.toy import toy_learner


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def _weights(bench: Bench) -> dict[str, Tensor]:
    return {name: layer.effective_weight() for name, layer in bench.method.layers().items()}


def test_documented_defaults() -> None:
    options = OLoraOptions()
    assert (options.lambda_1, options.lambda_2, options.orth_norm) == (0.5, 0.0, "l1")
    assert (options.rank, options.alpha, options.lora_dropout) == (8, 32.0, None)
    assert method_entry("olora").name == "o_lora"


@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_the_overlap_by_hand(norm: str) -> None:
    torch.manual_seed(0)
    old, new = torch.randn(5, 7), torch.randn(2, 7)
    products = [float(old[i] @ new[j]) for i in range(5) for j in range(2)]
    by_hand = sum(map(abs, products)) if norm == "l1" else sum(p * p for p in products)
    assert float(overlap(old, new, norm)) == pytest.approx(by_hand, rel=1e-5)  # type: ignore[arg-type]
    basis = torch.linalg.qr(torch.randn(7, 7)).Q
    assert float(overlap(basis[:3], basis[3:5], norm)) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["l1", "fro2"])
def test_the_loss_is_the_formula(norm: str, models: dict[str, Path]) -> None:
    bench = Bench(models["vit"], "vit", "o_lora", rank=2, orth_norm=norm, lambda_1=0.3, lambda_2=0.2, lora_dropout=0.0)
    batch = bench.batch(0, [0, 13])
    bench.begin(0)
    layers = bench.method.layers().values()

    def norms() -> float:
        return sum(float(f.detach().norm()) for layer in layers for f in (layer.down, layer.up))

    head = bench.method.heads
    own = float(head.loss(bench.method.features(batch), batch.labels).detach())
    assert float(bench.method.loss(batch).value.detach()) == pytest.approx(own + 0.2 * norms(), rel=1e-5)
    bench.method.end_task(bench.infos[0], None)
    bench.begin(1)
    batch = bench.batch(1, [0, 13])
    own = float(head.loss(bench.method.features(batch), batch.labels).detach())
    shared = sum(float(overlap(layer.past_down, layer.down.detach(), norm)) for layer in layers)  # type: ignore[arg-type]
    loss = bench.method.loss(batch)
    assert float(loss.value.detach()) == pytest.approx(own + 0.3 * shared + 0.2 * norms(), rel=1e-5)
    assert loss.terms["overlap"] == pytest.approx(shared, rel=1e-5) and shared > 0


def test_adapters_add_up_and_old_ones_stay(models: dict[str, Path]) -> None:
    bench = Bench(models["bert"], "bert", "o_lora", 3, rank=2, alpha=6)
    base = {name: layer.base.weight.clone() for name, layer in bench.method.layers().items()}
    kept: list[dict[str, Tensor]] = []
    begin = bench.method.begin_task

    def watched(task: TaskInfo, collect: Any) -> None:
        before = _weights(bench)
        begin(task, collect)
        assert all(torch.equal(weight, before[name]) for name, weight in _weights(bench).items()), "starts at zero"

    bench.method.begin_task = watched
    for index in range(3):
        bench.learn(index)
        kept.append({k: v for k, v in bench.method.state().items() if k.startswith(f"tasks/{index:03d}/adapter/")})
    state = bench.method.state()
    for index, factors in enumerate(kept):
        assert factors and all(torch.equal(value, state[key]) for key, value in factors.items())
        assert set(state[f"tasks/{index:03d}/alphas"].values()) == {6.0}
    for name, weight in _weights(bench).items():
        sums = sum(
            state[f"tasks/{i:03d}/adapter/{name}/up"] @ state[f"tasks/{i:03d}/adapter/{name}/down"] for i in range(3)
        )
        torch.testing.assert_close(weight, base[name] + 3.0 * sums, rtol=1e-5, atol=1e-6)


def test_the_penalty_turns_new_rows_away_from_old_ones(models: dict[str, Path]) -> None:
    found = {}
    for weight in (0.0, 5.0):
        bench = Bench(models["vit"], "vit", "o_lora", rank=3, lambda_1=weight, lora_dropout=0.0, training={"epochs": 8})
        bench.learn(0)
        bench.learn(1)
        found[weight] = np.mean(list(bench.method.panels()["row_overlap"].values()))
    assert found[5.0] < 0.5 * found[0.0]


def test_dropout_is_for_the_adapters_of_linear_layers(models: dict[str, Path]) -> None:
    assert {r.dropout for r in Bench(models["vit"], "vit", "o_lora").method.layers().values()} == {0.1}
    convolutional = Bench(models["resnet"], "resnet", "o_lora", rank=2)
    assert {layer.dropout for layer in convolutional.method.layers().values()} == {0.0}
    convolutional.learn(0)
    with pytest.raises(UnsupportedError, match="no adapter dropout"):
        Bench(models["resnet"], "resnet", "o_lora", lora_dropout=0.2)


@pytest.mark.parametrize("kind", [pytest.param("resnet", marks=pytest.mark.slow), "bert"])
def test_a_learner_goes_on_after_reopening(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert_goes_on_after_reopening(tmp_path, models[kind], kind, "o_lora", lr=1e-3)


def test_each_task_is_a_plain_adapter_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], "o_lora", alpha=8)
    for task in tasks("vit", 2):
        learner.learn(task)
    folders = sorted((tmp_path / "learner" / "tasks").iterdir())
    for index, folder in enumerate(folders):
        factors, scales = read_factors(folder)
        assert set(scales.values()) == {4.0}
        for name, (down, up) in factors.items():
            block = learner.method.layers()[name].blocks()[index]
            assert torch.equal(down, block.down) and torch.equal(up, block.up) and float(block.scale[0]) == 4.0
    rows = concatenate(tasks("vit", 2))
    answers, again = learner.predict(rows), Learner.open(tmp_path / "learner").predict(rows)
    assert np.allclose([a.score for a in answers], [b.score for b in again], atol=1e-6)


def test_on_a_language_model(shared: Path) -> None:
    bench = LanguageBench(shared / "models" / "stories260K", "o_lora", 2, training={"epochs": 3}, lambda_1=0.1)
    base = bench.base()
    first = bench.learn(0)[0].log
    assert first[-1]["loss"] < first[0]["loss"]
    bench.learn(1)
    assert {layer.past_ranks.tolist() == [8, 8] for layer in bench.method.layers().values()} == {True}
    after = bench.base()
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    batch = bench.batch(1, [0, 1])
    bench.backbone.eval()
    with torch.no_grad():
        scores = bench.method.logits(batch)[:, :-1].flatten(0, 1)
        mean = functional.cross_entropy(scores, batch.labels[:, 1:].flatten())
        assert float(mean) == pytest.approx(float(bench.method.loss(batch).terms["cross_entropy"]), rel=1e-5)
    assert isinstance(bench.backbone.output_head, nn.Linear)
