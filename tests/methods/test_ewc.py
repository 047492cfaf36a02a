"""Elastic weight consolidation: the Fisher information by hand, and the penalty in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everlora.errors import OptionError
from everlora.methods import method_spec
from everlora.methods.base import Batch
from everlora.methods.ewc import quadratic_penalty
from tests.methods.tuned_builders import (
    Bench,
    LinearEncoder,
    Rows,
    assert_goes_on_after_reopening,
    begin_linear,
    linear_method,
    linear_rows,
    save_models,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def _weight(encoder: LinearEncoder) -> nn.Parameter:
    return encoder.model.map.weight  # type: ignore[return-value, union-attr]


def _gradients_by_hand(method: Any, encoder: LinearEncoder, rows: Rows, task: int) -> torch.Tensor:
    """Gradient of each row's loss with respect to the map, `(n, 4, 5)`: head^T (p - y) x^T."""
    head = method.heads.linears[task]
    logits = rows.x @ _weight(encoder).detach().T @ head.weight.detach().T + head.bias.detach()
    error = logits.softmax(dim=1) - nn.functional.one_hot(rows.labels - 2 * task, 2)
    return (error @ head.weight.detach())[:, :, None] * rows.x[:, None, :]


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_the_fisher_information_is_the_mean_square_of_the_gradients(fisher: str) -> None:
    method, encoder = linear_method("ewc", fisher=fisher)
    rows = linear_rows(encoder, 0)
    info = begin_linear(method, 0, rows)
    method.end_task(info, rows)
    each = _gradients_by_hand(method, encoder, rows, 0)
    parts = each if fisher == "sample" else torch.stack([part.sum(0) for part in each.split(4)])
    expected = parts.square().sum(0) / len(each)
    torch.testing.assert_close(method.importance["map.weight"], expected, rtol=1e-5, atol=1e-9)


def test_fisher_information_adds_up_with_gamma() -> None:
    method, encoder = linear_method("ewc", gamma=0.25)
    found = []
    for task in range(3):
        rows = linear_rows(encoder, task)
        info = begin_linear(method, task, rows)
        method.end_task(info, rows)
        found.append(_gradients_by_hand(method, encoder, rows, task).square().mean(0))
    expected = found[2] + 0.25 * (found[1] + 0.25 * found[0])
    torch.testing.assert_close(method.importance["map.weight"], expected, rtol=1e-5, atol=1e-9)


def test_fewer_rows_can_be_measured_and_are_drawn_by_key() -> None:
    found = []
    for count in (3, 3, None):
        method, encoder = linear_method("ewc", fisher_samples=count)
        rows = linear_rows(encoder, 0)
        method.end_task(begin_linear(method, 0, rows), rows)
        squares = _gradients_by_hand(method, encoder, rows, 0).square()
        if count:
            sums = torch.stack([squares[list(c)].mean(0) for c in torch.combinations(torch.arange(10), 3).tolist()])
            distance = (sums - method.importance["map.weight"]).abs().amax(dim=(1, 2))
            assert int((distance < 1e-7).sum()) == 1
        found.append(method.importance["map.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_penalised_quadratic_has_its_minimum_where_the_closed_form_says() -> None:
    generator = torch.Generator().manual_seed(0)
    curvature, importance = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
    target, anchor = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    strength = 3.0
    closed = (curvature * target + strength * importance * anchor) / (curvature + strength * importance)
    theta = nn.Parameter(closed.clone())
    loss = 0.5 * (curvature * (theta - target).square()).sum()
    loss = loss + strength * quadratic_penalty({"theta": theta}, {"theta": anchor}, {"theta": importance})
    (gradient,) = torch.autograd.grad(loss, theta)
    assert float(gradient.abs().max()) < 1e-14
    expected = 0.5 * sum(float(f) * float(t - a) ** 2 for f, t, a in zip(importance, closed, anchor, strict=True))
    held = quadratic_penalty({"theta": theta}, {"theta": anchor}, {"theta": importance})
    assert float(held.detach()) == pytest.approx(expected, rel=1e-12)


def test_the_loss_pulls_towards_the_weights_after_the_newest_task() -> None:
    method, encoder = linear_method("ewc", ewc_lambda=7.0)
    first = linear_rows(encoder, 0)
    info = begin_linear(method, 0, first)
    alone = method.loss(Batch({"x": first.x}, first.labels))
    assert not alone.terms
    method.end_task(info, first)
    anchor = _weight(encoder).detach().clone()
    second = linear_rows(encoder, 1)
    begin_linear(method, 1, second)
    batch = Batch({"x": second.x}, second.labels)
    assert method.loss(batch).terms["penalty"] == 0
    with torch.no_grad():
        _weight(encoder).add_(0.5 * torch.rand(4, 5, dtype=torch.float64))
    loss = method.loss(batch)
    (gradient,) = torch.autograd.grad(loss.value, _weight(encoder))
    own = _gradients_by_hand(method, encoder, second, 1).mean(0)
    pull = 7.0 * method.importance["map.weight"] * (_weight(encoder).detach() - anchor)
    torch.testing.assert_close(gradient, own + pull, rtol=1e-5, atol=1e-7)
    assert float(loss.value.detach()) == pytest.approx(loss.terms["cross_entropy"] + 7 * loss.terms["penalty"])


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
def test_what_is_trained_is_held_and_heads_are_not(kind: str, models: dict[str, Path]) -> None:
    bench = Bench(models[kind], kind, "ewc", rank=2, fisher_samples=5)
    bench.learn(0)
    trained = bench.method.tuned.named_parameters()
    assert bench.method.importance.keys() == trained.keys()
    assert all(bench.method.importance[name].shape == p.shape for name, p in trained.items())
    assert all(bool((value >= 0).all()) for value in bench.method.importance.values())
    used = {name: float(value.sum()) > 0 for name, value in bench.method.importance.items()}
    assert any(used.values())
    # of a whole network, only what features do not depend on counts for nothing
    assert kind != "resnet" or {name for name, value in used.items() if not value} == {"linear.weight", "linear.bias"}
    assert not any(module.training for module in bench.backbone.modules())


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_strong_penalty_holds_and_none_is_plain_fine_tuning(kind: str, models: dict[str, Path]) -> None:
    moved, states = {}, {}
    for name, options in (("sequential", {}), ("ewc", {"ewc_lambda": 0}), ("ewc", {"ewc_lambda": 1e5})):
        few = {"fisher_samples": 8} if options else {}
        bench = Bench(models[kind], kind, name, rank=2, **options, **few)
        bench.learn(0)
        before = {key: p.detach().clone() for key, p in bench.method.tuned.named_parameters().items()}
        bench.learn(1)
        after = bench.method.tuned.named_parameters()
        key = f"{name} {options.get('ewc_lambda')}"
        moved[key] = sum(float((after[k] - value).square().sum().detach()) for k, value in before.items())
        states[key] = {k: v for k, v in bench.method.state().items() if isinstance(v, torch.Tensor)}
    plain, without = states["sequential None"], states["ewc 0"]
    assert all(torch.equal(value, without[name]) for name, value in plain.items())
    assert moved["ewc 100000.0"] < 0.8 * moved["ewc 0"]


def test_there_must_be_something_to_hold() -> None:
    with pytest.raises(OptionError, match="'train' of method 'ewc'"):
        method_spec("ewc").options({"train": "head"})


@pytest.mark.slow
def test_a_learner_goes_on_after_reopening(models: dict[str, Path], tmp_path: Path) -> None:
    assert_goes_on_after_reopening(tmp_path, models["resnet"], "resnet", "ewc", lr=1e-3, fisher_samples=4)
