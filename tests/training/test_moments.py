"""Optimiser moments carried from one task to the next, where a method wants them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from everlora.errors import ShapeError
from everlora.snapshot import split_state
from everlora.training.moments import moments, put_back
from tests.toy import tiny_model
from tests.training.builders import Bench


def _groups() -> dict[str, list[nn.Parameter]]:
    torch.manual_seed(3)
    return {
        "adapter": [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))],
        "head": [nn.Parameter(torch.randn(2))],
    }


def _make(kind: str, groups: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    sets = [{"params": parameters} for parameters in groups.values()]
    if kind == "sgd":
        return torch.optim.SGD(sets, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(sets, lr=0.1)


def _train(optimizer: torch.optim.Optimizer, groups: dict[str, list[nn.Parameter]], steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        sum(((p - step) ** 3).sum() for group in groups.values() for p in group).backward()  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimiser_goes_on_as_if_it_had_not_been_made_anew(kind: str) -> None:
    whole, parts = _groups(), _groups()
    one = _make(kind, whole)
    _train(one, whole, 3)
    first = _make(kind, parts)
    _train(first, parts, 3)
    kept = moments(first, parts)
    assert kept and all(key.startswith("adapter/000") for key in kept), "a head belongs to its task"
    second = _make(kind, parts)
    put_back(second, parts, {key: value.clone() for key, value in kept.items()})
    _train(one, whole, 2)
    _train(second, parts, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole["adapter"], parts["adapter"], strict=True))
    assert not torch.equal(whole["head"][0], parts["head"][0])


def test_names_survive_the_way_through_a_directory() -> None:
    groups = _groups()
    optimizer = _make("adamw", groups)
    _train(optimizer, groups, 1)
    kept = moments(optimizer, groups)
    files = split_state({f"optimizer/{name}": value for name, value in kept.items()}, 0)
    assert set(files.state_arrays) == {f"optimizer/{name}" for name in kept} and not files.arrays


def test_another_kind_of_optimiser_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    groups = _groups()
    optimizer = _make("sgd", groups)
    _train(optimizer, groups, 1)
    other = _make("adamw", groups)
    with caplog.at_level(logging.WARNING, logger="everlora.training"):
        put_back(other, groups, moments(optimizer, groups))
    assert not other.state and "starts without moments" in caplog.text


def test_moments_of_another_shape_are_refused() -> None:
    groups = _groups()
    optimizer = _make("adamw", groups)
    _train(optimizer, groups, 1)
    kept = {key: value if value.ndim < 2 else value[:1] for key, value in moments(optimizer, groups).items()}
    with pytest.raises(ShapeError, match="of 'adapter/0000' in shape"):
        put_back(_make("adamw", groups), groups, kept)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_method_is_given_them_only_when_it_asks(wanted: bool, tmp_path: Path) -> None:
    bench = Bench(tiny_model("vit", tmp_path), "image", training={"max_steps": 2})
    kept: list[dict[str, torch.Tensor]] = []
    bench.method.optimizer_state = lambda: (kept[-1] if kept else {}) if wanted else None
    bench.method.keep_optimizer = kept.append
    bench.learn()
    if not wanted:
        assert not kept
        return
    bench.task = bench.task.__class__(1, "second", (0, 1), 24)
    bench.learn()
    assert [float(state["adapter/0000/step"]) for state in kept] == [2, 4]
