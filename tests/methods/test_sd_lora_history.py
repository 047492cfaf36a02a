"""Absorption, merging, storing and going back: what happens to SD-LoRA's directions after training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from everlora.errors import DataError, StoreError, UnsupportedError
from everlora.methods.sd_lora import SDLoRA
from tests.methods.sd_lora_builders import (
    ToyEncoder,
    begin,
    collect,
    data,
    distance,
    info,
    learn,
    make,
    reload,
    span_of_old,
    train,
    weights,
)


def _learn_inside_the_span(method: SDLoRA, encoder: ToyEncoder, task: int, *names: str) -> None:
    """Learn a task, and make its directions in some layers a combination of the old ones."""
    begin(method, encoder, task)
    train(method, task)
    for name in names:
        layer = method.layers()[name]
        down, up = span_of_old(method, name, (0.7, -0.4)[: len(layer.past_ranks)])
        with torch.no_grad():
            layer.down.copy_(down.to(layer.down))
            layer.up.copy_(up.to(layer.up))
    trained = weights(method)
    method.end_task(info(task), collect)
    method.trained = trained  # type: ignore[attr-defined]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("norm", ["fro", "factors"])
@pytest.mark.parametrize("current", ["raw", "normalised"])
def test_a_direction_in_the_span_is_absorbed_and_the_function_stays(
    norm: str, current: str, dtype: torch.dtype, tolerance: float
) -> None:
    schedule = {0: 2, 1: 2, 2: 4, 3: 2}
    method, encoder = make(ToyEncoder(dtype), kd=True, norm=norm, current=current, rank_schedule=schedule)
    learn(method, encoder, 0, 1)
    _learn_inside_the_span(method, encoder, 2, "0.query", "1.value")
    assert distance(weights(method), method.trained) < tolerance  # type: ignore[attr-defined]
    ranks = {name: layer.past_ranks.tolist() for name, layer in method.layers().items()}
    assert ranks["0.query"] == ranks["1.value"] == [2, 2, 0]
    assert ranks["0.value"] == ranks["1.query"] == [2, 2, 4], "the others lie outside and are kept"
    rho = method.panels()["rho"]
    assert rho["0.query"] < 1e-6 and rho["1.value"] < 1e-6 and rho["0.value"] > 0.5
    before = weights(method)
    begin(method, encoder, 3)
    assert distance(weights(method), before) < tolerance
    train(method, 3)
    method.end_task(info(3), collect)
    assert method.layers()["0.query"].past_ranks.tolist() == [2, 2, 0, 2]


def test_a_direction_near_the_span_changes_the_weight_by_what_the_residual_says() -> None:
    method, encoder = make(kd=True, kd_tau=0.2, rank_schedule={0: 2, 2: 4})
    learn(method, encoder, 0, 1)
    begin(method, encoder, 2)
    layer = method.layers()["0.query"]
    down, up = span_of_old(method, "0.query", (0.7, -0.4))
    noise = torch.randn(up.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        layer.down.copy_(down)
        layer.up.copy_(up + 0.05 * up.norm() / noise.norm() * noise)
        size = float((layer.up @ layer.down).norm())
    before = weights(method)["0.query"]
    method.end_task(info(2), collect)
    rho = method.panels()["rho"]["0.query"]
    weight = abs(float(method.past.sealed.alpha[0, -1])) * size
    change = float((weights(method)["0.query"] - before).norm())
    assert 1e-3 < rho < 0.2 and layer.past_ranks.tolist()[-1] == 0
    assert change == pytest.approx(weight * rho, rel=1e-9)
    assert method.layers()["0.value"].past_ranks.tolist()[-1] == 0, "never trained, so empty"


def test_absorbing_twice_and_absorbing_everywhere() -> None:
    method, encoder = make(kd=True, scope="network")
    learn(method, encoder, 0)
    names = list(method.layers())
    _learn_inside_the_span(method, encoder, 1, *names)
    _learn_inside_the_span_after_absorption(method, encoder, 2)
    assert all(layer.past_ranks.tolist() == [2, 0, 0] for layer in method.layers().values())
    begin(method, encoder, 3)
    train(method, 3, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5))
    values = method.magnitudes.detach()
    start = method.past.sealed.alpha[0]
    assert values.shape == (4,) and torch.equal(values[1:3], start[1:3]), "their magnitudes stay, unused"
    assert float(values[0]) != float(start[0])


def _learn_inside_the_span_after_absorption(method: SDLoRA, encoder: ToyEncoder, task: int) -> None:
    begin(method, encoder, task)
    for layer in method.layers().values():
        block = layer.blocks()[0]
        with torch.no_grad():
            layer.down.copy_(block.down)
            layer.up.copy_(1.5 * block.up)
    before = weights(method)
    method.end_task(info(task), collect)
    assert distance(weights(method), before) < 1e-10


def test_public_presets_absorb_at_the_next_start_with_the_reset_magnitude() -> None:
    method, encoder = make(preset="official", kd=True)
    learn(method, encoder, 0)
    _learn_inside_the_span(method, encoder, 1, "0.query")
    layer = method.layers()["0.query"]
    assert distance(weights(method), method.trained) < 1e-12  # type: ignore[attr-defined]
    assert layer.past_ranks.tolist() == [2, 2], "nothing is dropped before it was evaluated"
    (first, second), base = layer.blocks(), layer.base.weight
    norms = [float(block.up.norm() * block.down.norm()) for block in (first, second)]
    direction = first.up @ first.down / norms[0]
    newest = second.up @ second.down / norms[1]
    beta = float((newest * direction).sum() / direction.square().sum())
    begin(method, encoder, 2)
    assert layer.past_ranks.tolist() == [2, 0]
    expected = base + (0.8 + 0.8 * beta) * direction
    torch.testing.assert_close(weights(method)["0.query"], expected, rtol=1e-10, atol=1e-12)
    train(method, 2)
    method.end_task(info(2), collect)
    assert bool((method.past.sealed.delta[:, 0] != 0).tolist() == [name == "0.query" for name in method.layers()])
    with pytest.raises(DataError, match="from task 2 on"):
        method.past.coefficients_at(1)
    assert method.past.earliest_exact == 2
    again, _ = reload(method)
    assert distance(weights(again), weights(method)) == 0
    assert again.past.coefficients_at(0).keys() == method.layers().keys()
    begin(method, encoder, 3)
    assert layer.past_ranks.tolist() == [2, 0, 2]


def test_a_warning_says_when_absorption_is_out_of_reach() -> None:
    method, encoder = make(kd=True)
    learn(method, encoder, 0, 1, 2, 3)
    with pytest.warns(UserWarning, match="smallest residual of a new direction after 5 tasks"):
        learn(method, encoder, 4)
    learn(method, encoder, 5)
    rho = method.panels()["rho"]
    assert len(rho) == 4 and all(0.5 < value <= 1 for value in rho.values())


# -- the rank cap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_alloc", ["uniform", "energy"])
def test_a_rank_cap_holds_and_its_error_is_the_change_of_the_weight(rank_alloc: str) -> None:
    method, encoder = make(max_rank=6, keep_last=1, max_compress_error=1.0, rank_alloc=rank_alloc)
    learn(method, encoder, 0, 1, 2)
    before, blocks = weights(method), {n: layer.blocks() for n, layer in method.layers().items()}
    begin(method, encoder, 3)
    errors = method.past.compress_errors()
    for name, layer in method.layers().items():
        merged = sum(block.up * block.scale @ block.down for block in blocks[name][:2])
        change = float((weights(method)[name] - before[name]).norm() / merged.norm())
        assert change == pytest.approx(errors[name], rel=1e-9, abs=1e-12)
        assert torch.equal(layer.blocks()[1].down, blocks[name][2].down)
    assert max(errors.values()) > 1e-3
    assert list(method.panels()["magnitude"]) == ["tasks 0 to 1", "task 2"]
    total = sum(layer.total_rank for layer in method.layers().values())
    assert total <= 4 * 4
    train(method, 3)
    method.end_task(info(3), collect)
    assert method.past.earliest_exact == 3
    with pytest.raises(DataError, match="from task 3 on every model can"):
        method.past.coefficients_at(2)
    again, other = reload(method)
    assert distance(weights(again), weights(method)) == 0
    learn(method, encoder, 4)
    learn(again, other, 4)
    assert distance(weights(again), weights(method)) == 0
    cumulated = method.past.compress_errors()
    assert all(cumulated[name] > errors[name] for name in errors) and again.past.compress_errors() == cumulated


def test_a_cap_that_would_cost_too_much_is_exceeded_with_a_warning() -> None:
    method, encoder = make(max_rank=4, keep_last=0)
    learn(method, encoder, 0, 1)
    before = weights(method)
    with pytest.warns(UserWarning, match="by more than 0.05"):
        begin(method, encoder, 2)
    assert distance(weights(method), before) < 0.05
    assert max(method.past.compress_errors().values()) <= 0.05
    assert max(layer.total_rank for layer in method.layers().values()) > 2


def test_a_lossless_merge_keeps_the_function_and_empty_layers_stay_empty() -> None:
    method, encoder = make(max_rank=6, keep_last=0, kd=True)
    learn(method, encoder, 0)
    for task in (1, 2):
        _learn_inside_the_span_after_absorption(method, encoder, task)
    learn(method, encoder, 3, steps=0)
    before = weights(method)
    learn(method, encoder, 4, steps=0)
    assert distance(weights(method), before) < 1e-12
    assert max(method.past.compress_errors().values()) < 1e-12


def test_storage_stays_bounded_over_many_tasks() -> None:
    method, encoder = make(max_rank=6, max_compress_error=1.0, rank=2)
    learn(method, encoder, *range(30), steps=1)
    assert all(layer.total_rank <= 6 for layer in method.layers().values())
    kept = [value for key, value in method.past.state().items() if key.endswith(("/down", "/up"))]
    assert sum(value.numel() for value in kept) <= 6 * sum(
        layer.in_features + layer.out_features for layer in method.layers().values()
    )


# -- storing ----------------------------------------------------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {},
    {"preset": "paper"},
    {"preset": "official"},
    {"preset": "libcontinual", "kd": True},
    {"kd": True, "kd_tau": 0.999},
    {"scope": "module", "alpha": "reset"},
    {"max_rank": 4, "max_compress_error": 1.0},
    {"offset": "mul", "forward_mode": "factored"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_going_on_after_a_reload_gives_the_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    whole, encoder = make(ToyEncoder(dtype), **options)
    learn(whole, encoder, 0, 1)
    for task in (2, 3):
        parts, other = reload(whole)
        assert torch.equal(other.features(data(9).inputs), encoder.features(data(9).inputs))
        learn(whole, encoder, task)
        learn(parts, other, task)
        one, two = whole.state(), parts.state()
        assert one.keys() == two.keys()
        for key, value in one.items():
            same = torch.equal(value, two[key]) if isinstance(value, Tensor) else None
            assert same if same is not None else value == two[key], key


def test_what_a_task_wrote_is_never_written_again() -> None:
    method, encoder = make(kd=True, kd_tau=0.999, max_rank=4, max_compress_error=1.0)
    seen: dict[str, Any] = {}
    for task in range(4):
        learn(method, encoder, task)
        for key, value in method.state().items():
            assert key.startswith("tasks/"), "nothing is carried on, so going back needs nothing but old tasks"
            old = seen.setdefault(key, value)
            assert torch.equal(old, value) if isinstance(value, Tensor) else old == value


@pytest.mark.parametrize("options", VARIANTS[:6], ids=str)
def test_the_model_after_an_earlier_task_is_rebuilt(options: dict[str, Any]) -> None:
    options = {**options, "kd": False}
    method, encoder = make(**options)
    then, logits = [], []
    for task in range(4):
        learn(method, encoder, task)
        then.append(weights(method))
        logits.append(method.logits(data(0)).detach())
    for model in (method, reload(method)[0]):
        now = weights(model)
        for task in (3, 0, 2, 1):
            with model.model_at(task):
                assert distance(weights(model), then[task]) < 1e-12
                seen = model.logits(data(0))[:, : 2 * task + 2]
                torch.testing.assert_close(seen, logits[task], rtol=1e-9, atol=1e-12)
        assert distance(weights(model), now) == 0
        with pytest.raises(DataError, match="no model after task 4"):
            model.past.coefficients_at(4)
    begin(method, encoder, 4)
    with pytest.raises(DataError, match="being learned"), method.model_at(1):
        pass


def test_between_two_models_coefficients_may_be_mixed() -> None:
    method, encoder = make()
    learn(method, encoder, 0, 1)
    one, two = (method.past.coefficients_at(task) for task in (0, 1))
    half = {name: (one[name] + two[name]) / 2 for name in one}
    ends = []
    for task in (0, 1):
        with method.model_at(task):
            ends.append(weights(method))
    with method.past.counting(half):
        middle = weights(method)
    assert distance(middle, {name: (ends[0][name] + ends[1][name]) / 2 for name in middle}) < 1e-12


@pytest.mark.parametrize("preset", ["everlora", "official", "libcontinual", "paper"])
def test_a_path_leads_from_one_model_to_the_next_and_knows_where_training_went_on(preset: str) -> None:
    method, encoder = make(preset=preset)
    learn(method, encoder, 0, 1)
    after_one = weights(method)
    begin(method, encoder, 2)
    begun = weights(method)
    train(method, 2)
    method.end_task(info(2), collect)
    after_two, whole = weights(method), method.logits(data(0))
    for position in (-0.5, 0.0, 0.3, 1.0, 1.5):
        line = {name: (1 - position) * after_one[name] + position * after_two[name] for name in after_one}
        with method.path(1, 2, position, heads=2):
            assert distance(weights(method), line) < 1e-12
            assert method.logits(data(0)).shape[1] == 4, "two tasks of two classes compete"
    start = method.path_start(2, heads=3)
    if preset in ("official", "libcontinual"):
        assert start is not None and distance(begun, after_one) > 1e-3
        with start:
            assert distance(weights(method), begun) < 1e-12
    else:
        assert start is None and distance(begun, after_one) < 1e-12
    assert distance(weights(method), after_two) == 0 and bool((method.logits(data(0)) == whole).all())


def test_a_path_needs_heads_that_stayed() -> None:
    method, _ = make(alignment=True)
    with pytest.raises(UnsupportedError, match="alignment"), method.path(0, 1, 0.5, heads=2):
        pass


def test_changed_or_missing_factors_are_refused() -> None:
    method, encoder = make()
    learn(method, encoder, 0, 1)
    key = "tasks/000/adapter/0.query/"
    for change, message in (
        (lambda state: state.update({key + "up": 1.001 * state[key + "up"]}), "its factors were changed"),
        (lambda state: state.pop(key + "down"), "restore them from a copy"),
        (lambda state: state.update({"tasks/000/modules": ["other"]}), "found those of"),
    ):
        state = method.state()
        change(state)
        with pytest.raises(StoreError, match=message):
            make()[0].load_state(state)
    assert math.isfinite(float(method.state()[key + "up"].norm()))
