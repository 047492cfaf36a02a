"""Statistics of features: what they sum up, and that no order, split or spread of the rows matters."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor

from everlora.errors import NumericError, ShapeError
from everlora.heads import Drift, DriftSums, FeatureStatistics
from everlora.heads.expansion import Expansion
from everlora.heads.ridge import PENALTIES, fit_ridge


def _rows(count: int = 60, dim: int = 7, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + 0.3 * torch.randn(count, dim, generator=generator), labels


def _of(features: Tensor, labels: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features, labels)
    return statistics


def test_sums_are_those_of_the_rows() -> None:
    features, labels = _rows()
    statistics = _of(features, labels)
    rows = features.double()
    assert statistics.gram is not None and torch.allclose(statistics.gram, rows.T @ rows, atol=1e-12)
    for c in range(4):
        assert torch.allclose(statistics.means()[c], rows[labels == c].mean(dim=0), atol=1e-12)
    assert statistics.counts.tolist() == torch.bincount(labels).tolist() and statistics.count == 60


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(60)), st.lists(st.integers(1, 59), max_size=4, unique=True))
def test_neither_order_nor_split_matters(order: list[int], cuts: list[int]) -> None:
    features, labels = _rows()
    whole, merged = fit_ridge(_of(features, labels), penalty=1e-3), FeatureStatistics(7)
    places = [0, *sorted(cuts), 60]
    for start, end in itertools.pairwise(places):
        chosen = torch.tensor(order[start:end])
        merged.merge(_of(features[chosen], labels[chosen]))
    assert torch.allclose(fit_ridge(merged, penalty=1e-3).weight, whole.weight, rtol=1e-9, atol=1e-12)


def test_ridge_is_that_of_scikit_learn() -> None:
    features, labels = _rows()
    statistics = _of(features, labels)
    assert statistics.gram is not None
    fit = fit_ridge(statistics, penalty=0.01)
    alpha = 0.01 * float(statistics.gram.diagonal().mean())
    targets = torch.nn.functional.one_hot(labels, 4)
    theirs = Ridge(alpha=alpha, fit_intercept=False).fit(features.double().numpy(), targets.numpy())
    assert torch.allclose(fit.weight, torch.from_numpy(theirs.coef_), rtol=1e-8, atol=1e-10)


def test_the_error_on_rows_held_out_is_that_of_the_rows() -> None:
    features, labels = _rows(count=40)
    more, truth = _rows(count=30, seed=1)
    fit = fit_ridge(_of(features, labels), _of(more, truth))
    targets = torch.nn.functional.one_hot(truth, 4).double()
    for penalty, error in zip(PENALTIES, fit.errors, strict=True):
        weight = fit_ridge(_of(features, labels), penalty=penalty).weight
        direct = (more.double() @ weight.T - targets).square().sum() / 30
        assert error == pytest.approx(float(direct), rel=1e-6)
    assert fit.penalty == PENALTIES[fit.errors.index(min(fit.errors))]
    again = fit_ridge(_of(features, labels), _of(more, truth))
    both = fit_ridge(_of(torch.cat([features, more]), torch.cat([labels, truth])), penalty=again.penalty)
    assert torch.allclose(again.weight, both.weight, rtol=1e-9, atol=1e-12), "once chosen, all rows are fitted"


def test_without_rows_that_can_judge_generalised_cross_validation_chooses() -> None:
    features, labels = _rows(count=40)
    fit = fit_ridge(_of(features, labels))
    rows, targets = features.double(), torch.nn.functional.one_hot(labels, 4).double()
    identity = torch.eye(7, dtype=torch.float64)
    for penalty, error in zip(PENALTIES, fit.errors, strict=True):
        hat = rows @ torch.linalg.solve(rows.T @ rows + penalty * rows.square().sum() / 7 * identity, rows.T)
        direct = 40 * (targets - hat @ targets).square().sum() / (40 - hat.trace()) ** 2
        assert error == pytest.approx(float(direct), rel=1e-6)
    assert fit.penalty == PENALTIES[fit.errors.index(min(fit.errors))]


def test_classes_that_take_turns_do_not_mislead_the_penalty() -> None:
    features, _ = _rows(count=200, dim=30, classes=5)
    labels = torch.arange(200) % 5
    features = features + 2 * torch.nn.functional.one_hot(labels, 30)
    held = labels == 4  # every fifth row, and all of one class
    parts = [_of(features[chosen], labels[chosen]) for chosen in (~held, held)]
    fit = fit_ridge(*parts)
    assert fit.penalty == fit_ridge(_of(features, labels)).penalty < 1
    assert int(((features.double() @ fit.weight.T).argmax(dim=1) == labels).sum()) > 180


def test_a_singular_gram_matrix_is_no_obstacle() -> None:
    features = torch.ones(5, 7)
    fit = fit_ridge(_of(features, torch.zeros(5, dtype=torch.int64)), penalty=1e-12)
    assert float(fit.weight[0].sum()) == pytest.approx(1.0, abs=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    statistics = FeatureStatistics(7)
    with pytest.raises(ShapeError, match=r"features \(n, 7\)"):
        statistics.update(torch.ones(3, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(NumericError, match="not finite"):
        statistics.update(torch.full((1, 7), torch.nan), torch.zeros(1, dtype=torch.int64))
    assert statistics.count == 0
    with pytest.raises(ShapeError, match="cannot merge"):
        statistics.merge(FeatureStatistics(7, gram=False))
    with pytest.raises(NumericError, match="Gram matrix"):
        fit_ridge(FeatureStatistics(7, gram=False))


def test_a_linear_movement_is_followed_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.eye(7, dtype=torch.float64) + 0.2 * torch.randn(7, 7, generator=generator, dtype=torch.float64)
    old, labels = _rows(count=200)
    new = old.double() @ matrix.T
    drift = _drift(old.double(), new)
    assert torch.allclose(drift.matrix, matrix, atol=1e-4) and drift.explained > 0.999
    moved, direct = _of(old, labels).mapped(drift.matrix), _of(new, labels)
    assert moved.gram is not None and direct.gram is not None
    assert torch.allclose(moved.gram, direct.gram, rtol=1e-3, atol=1e-3)
    assert torch.allclose(moved.sums, direct.sums, rtol=1e-3, atol=1e-2)


def test_a_movement_that_is_noise_is_not_followed() -> None:
    old, _ = _rows(count=100)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(5))
    drift = _drift(old, old + 0.5 * noise)
    assert drift.explained < 0.05 and drift.relative > 0.3
    assert torch.allclose(drift.matrix, torch.eye(7, dtype=torch.float64), atol=0.1)
    still = _drift(old, old)
    assert torch.equal(still.matrix, torch.eye(7, dtype=torch.float64)) and still.relative == still.explained == 0


def _drift(old: Tensor, new: Tensor) -> Drift:
    sums = DriftSums(7)
    held = torch.arange(len(old)) % 5 == 4
    for chosen in (slice(0, 37), slice(37, None)):
        sums.update(old[chosen], new[chosen], held[chosen])
    return sums.fit()


def test_random_features_are_the_same_everywhere() -> None:
    features, _ = _rows()
    one, other = (Expansion(7, random=50, seed=4)(features) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (60, 51) and bool((one >= 0).all())
    assert not torch.equal(one, Expansion(7, random=50, seed=5)(features))
    assert torch.equal(one[:, -1], torch.ones(60)), "a constant for the bias"
