"""Linear discriminant analysis from sums: that of the rows themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.distributions import MultivariateNormal

from everlora.errors import NumericError
from everlora.heads import FeatureStatistics
from everlora.heads.discriminant import PENALTIES, _within, fit_discriminant
from everlora.methods.headed import _without

NOTHING = FeatureStatistics(5)


def _rows(per_class: int = 20, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    centres = torch.randn(classes, 5, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), 5, generator=generator, dtype=torch.float64) @ mixing, labels


def _of(features: Tensor, labels: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(5)
    statistics.update(features, labels)
    return statistics


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_it_is_that_of_scikit_learn(penalty: float) -> None:
    features, labels = _rows()
    fit = fit_discriminant(_of(features, labels), NOTHING, penalty=penalty)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=penalty / (1 + penalty)).fit(features, labels)
    ours = features @ fit.weight.T + fit.bias
    scale = 80 / 76  # they divide the scatter by the rows, not by the degrees of freedom
    wanted = torch.from_numpy(theirs.decision_function(features.numpy()))
    assert torch.allclose(scale * (ours - ours[:, :1]), wanted - wanted[:, :1], atol=1e-8)


def test_held_out_rows_choose_by_their_likelihood() -> None:
    features, labels = _rows(per_class=5, seed=1)
    held = torch.arange(20) % 5 == 4
    fitted = _of(features[~held], labels[~held])
    fit = fit_discriminant(fitted, _of(features[held], labels[held]))
    means = fitted.means()
    within = features[~held] - means[labels[~held]]
    covariance = within.T @ within / (16 - 4)
    found = []
    for penalty in PENALTIES:
        shrunk = (covariance + penalty * covariance.trace() / 5 * torch.eye(5, dtype=torch.float64)) / (1 + penalty)
        normal = MultivariateNormal(torch.zeros(5, dtype=torch.float64), shrunk)
        judged = (features[held] - means[labels[held]]) / (1 + 1 / 4) ** 0.5
        constant = 5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        likelihood = normal.log_prob(judged).mean()  # type: ignore[no-untyped-call]
        found.append(float(-2 * likelihood - constant))
    assert torch.allclose(torch.tensor(fit.errors), torch.tensor(found))
    assert fit.penalty == PENALTIES[found.index(min(found))] and fit.penalty not in (PENALTIES[0], PENALTIES[-1])


def test_neither_order_nor_split_matters() -> None:
    features, labels = _rows(seed=2)
    whole, merged = fit_discriminant(_of(features, labels), NOTHING), FeatureStatistics(5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    for start, end in itertools.pairwise([0, 7, 50, 80]):
        merged.merge(_of(features[order[start:end]], labels[order[start:end]]))
    found = fit_discriminant(merged, NOTHING)
    assert torch.allclose(found.weight, whole.weight, rtol=1e-9) and torch.allclose(found.bias, whole.bias, rtol=1e-9)


def test_a_direction_in_which_nothing_varies_chooses_nothing() -> None:
    features, labels = _rows(per_class=5, seed=1)
    held = torch.arange(20) % 5 == 4
    found = []
    for rows in (features, torch.cat([features, torch.ones(20, 1)], dim=1)):
        parts = [FeatureStatistics(rows.shape[1]), FeatureStatistics(rows.shape[1])]
        for part, chosen in zip(parts, (~held, held), strict=True):
            part.update(rows[chosen], labels[chosen])
        found.append(fit_discriminant(*parts))
    assert found[0].penalty <= found[1].penalty <= 10 * found[0].penalty > 10 * PENALTIES[0]


def test_one_row_a_class_is_the_nearest_mean() -> None:
    features, labels = _rows(per_class=1)
    fit = fit_discriminant(_of(features, labels), NOTHING)
    others = features + 0.01
    nearest = torch.cdist(others, features).argmin(dim=1)
    assert torch.equal((others @ fit.weight.T + fit.bias).argmax(dim=1), nearest)


def test_a_class_that_only_the_held_out_rows_have_is_learned_and_one_without_rows_never_wins() -> None:
    features, labels = _rows()
    few = (labels != 3) | (torch.arange(80) == 79)
    held = few & (torch.arange(80) % 5 == 4)
    statistics = _of(features[few & ~held], labels[few & ~held])
    statistics.grow(5)
    fit = fit_discriminant(statistics, _of(features[held], labels[held]))
    scores = features @ fit.weight.T + fit.bias
    assert int(scores[79].argmax()) == 3 and bool((scores[:, 4] == -torch.inf).all())


def test_the_covariance_stays_one_of_rows_after_classes_were_forgotten() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 10
    features = 4 * torch.randn(10, 5, generator=generator)[labels] + torch.randn(400, 5, generator=generator)
    statistics = _of(features, labels)
    state: dict[str, Any] = {f"x/{name}": value for name, value in statistics.state().items()}
    assert _without(state, "x/", list(range(2, 10)))
    left = FeatureStatistics(5)
    left.load_state({name.removeprefix("x/"): value for name, value in state.items()})
    assert left.count == 80 and left.freedom == statistics.freedom == 390
    assert torch.allclose(_within(left), _within(statistics), rtol=1e-9, atol=1e-12)
    again = FeatureStatistics(5)
    again.load_state(left.state())
    assert again.copy().freedom == again.mapped(torch.eye(5, dtype=torch.float64)).freedom == 390


def test_sums_that_are_not_finite_or_not_there_are_refused() -> None:
    broken = _of(*_rows())
    assert broken.gram is not None
    broken.gram[0, 0] = torch.nan
    with pytest.raises(NumericError, match="not finite"):
        fit_discriminant(broken, NOTHING)
    with pytest.raises(NumericError, match="Gram"):
        fit_discriminant(FeatureStatistics(5, gram=False), FeatureStatistics(5, gram=False))
