"""Learning without forgetting: the distillation by hand, the frozen copy, and the warming up of new heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from everlora.methods.base import Batch
from everlora.methods.lwf import distillation
from tests.methods.tuned_builders import (
    Bench,
    assert_goes_on_after_reopening,
    begin_linear,
    linear_method,
    linear_rows,
    save_models,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def _by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for new, old in zip(student, teacher, strict=True):
        p = torch.exp(old / temperature) / torch.exp(old / temperature).sum()
        q = torch.exp(new / temperature) / torch.exp(new / temperature).sum()
        total += float((p * (p / q).log()).sum())
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_distillation_is_a_divergence_per_old_head(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 5, 1)
    draws = [[torch.randn(7, n, generator=generator, dtype=torch.float64) for n in sizes] for _ in range(2)]
    expected = sum(_by_hand(new, old, temperature) for new, old in zip(*draws, strict=True))
    plain = distillation(*draws, temperature, q2=False)
    assert plain.dtype == torch.float64 and float(plain) == pytest.approx(expected, rel=1e-12)
    assert float(distillation(*draws, temperature)) == pytest.approx(temperature**2 * expected, rel=1e-12)
    assert float(distillation(draws[0], draws[0], temperature)) == pytest.approx(0, abs=1e-15)


def test_the_loss_is_cross_entropy_and_what_the_copy_teaches() -> None:
    method, encoder = linear_method("lwf", lwf_lambda=0.7, temperature=2.0, warmup_epochs=0)
    first = linear_rows(encoder, 0)
    info = begin_linear(method, 0, first)
    assert method.teacher is None
    method.end_task(info, first)
    weight, head = encoder.model[0].weight.detach().clone(), method.heads.linears[0].weight.detach().clone()  # type: ignore[index]
    bias = method.heads.linears[0].bias.detach().clone()
    second = linear_rows(encoder, 1)
    begin_linear(method, 1, second)
    with torch.no_grad():  # move the student away from its teacher
        encoder.model[0].weight.add_(0.3)  # type: ignore[index, operator]
        method.heads.linears[0].weight.mul_(1.5)
    loss = method.loss(Batch({"x": second.x}, second.labels))
    features = second.x @ encoder.model[0].weight.T  # type: ignore[index, operator]
    old = second.x @ weight.T @ head.T + bias
    own = functional.cross_entropy(method.heads.linears[1](features), second.labels - 2)
    kept = 4 * _by_hand(method.heads.linears[0](features).detach(), old, 2.0)
    assert float(loss.value.detach()) == pytest.approx(float(own.detach()) + 0.7 * kept, rel=1e-5)
    assert loss.terms["distillation"] == pytest.approx(kept, rel=1e-5)
    loss.value.backward()
    assert all(p.grad is not None for p in [encoder.model[0].weight, *method.heads.parameters()])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
def test_the_copy_is_frozen_and_gone_afterwards(kind: str, models: dict[str, Path]) -> None:
    bench = Bench(models[kind], kind, "lwf", rank=2)
    bench.learn(0)
    bench.backbone.eval()
    rows = bench.batch(0, [0, 5])
    before = bench.method.heads.row_logits(bench.method.features(rows), 0).detach()
    bench.begin(1)
    teacher = bench.method.teacher
    parameters = [p for group in bench.method.parameters().values() for p in group]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(3):
        bench.train_mode()
        optimizer.zero_grad()
        bench.method.loss(Batch(bench.batch(1, [step, 13]).inputs, bench.batch(1, [step, 13]).labels)).value.backward()
        bench.method.after_epoch(step, 3)  # the first epoch only warms up
        optimizer.step()
        modes = [module.training for module in bench.backbone.modules()]
        assert torch.allclose(teacher.outputs(rows)[0], before, atol=1e-6)
        assert [module.training for module in bench.backbone.modules()] == modes
    bench.backbone.eval()
    assert not torch.allclose(bench.method.heads.row_logits(bench.method.features(rows), 0), before, atol=1e-4)
    assert (teacher.encoder is bench.backbone) == (kind != "resnet"), "what no task trains is not copied"
    bench.method.end_task(bench.infos[1], None)
    assert bench.method.teacher is None


@pytest.mark.parametrize("loss", ["local", "seen"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_new_head_warms_up_alone(kind: str, loss: str, models: dict[str, Path]) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for epochs in (1, 2):
        # with decay and momentum, whatever the optimiser held would move
        training = {"epochs": epochs, "optimizer": "adamw", "weight_decay": 0.1, "drop_last": True, "batch_size": 7}
        bench = Bench(models[kind], kind, "lwf", rank=2, loss=loss, training=training)
        bench.learn(0)
        before = {key: value.clone() for key, value in bench.backbone.model.state_dict().items()}
        old = bench.method.heads.linears[0].weight.clone()
        bench.begin(1)
        new = bench.method.heads.linears[1].weight.detach().clone()
        bench.method.heads.heads, bench.method.heads.classes = bench.method.heads.heads[:1], [(0, 1)]
        bench.learn(1)
        after = bench.backbone.model.state_dict()
        still = all(torch.equal(value, after[key]) for key, value in before.items())
        assert still == torch.equal(old, bench.method.heads.linears[0].weight) == (epochs == 1)
        assert not torch.equal(new, bench.method.heads.linears[1].weight)
        weights.append(before)
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items()), "the first task trains"


def test_old_answers_stay_closer_than_without_distillation() -> None:
    distances = {}
    for strength in (0.0, 5.0):
        method, encoder = linear_method("lwf", lwf_lambda=strength, warmup_epochs=0)
        for task in range(2):
            rows = linear_rows(encoder, task, 40)
            info = begin_linear(method, task, rows)
            batch = Batch({"x": rows.x}, rows.labels)
            if task == 1:
                before = method.logits(batch, 0)[:, :2].softmax(dim=1).detach()
            optimizer = torch.optim.SGD([p for group in method.parameters().values() for p in group], lr=0.3)
            for _ in range(40):
                optimizer.zero_grad()
                method.loss(batch).value.backward()
                optimizer.step()
            method.end_task(info, rows)
        after = method.logits(batch, 0)[:, :2].softmax(dim=1).detach()
        distances[strength] = float((after - before).abs().mean())
    assert distances[5.0] < 0.5 * distances[0.0]


def test_a_learner_goes_on_after_reopening(models: dict[str, Path], tmp_path: Path) -> None:
    assert_goes_on_after_reopening(tmp_path, models["resnet"], "resnet", "lwf", lr=1e-3)
