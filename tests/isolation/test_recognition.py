"""Rules that say which task a row belongs to, against plain forms of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from everlora.isolation import RULES, Recogniser, fit_temperature

BY_LOGITS = tuple(rule for rule in RULES if rule not in ("prototype", "mahalanobis"))


def features(task: int, classes: int = 2, rows: int = 20) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(task)
    centres = 3 * torch.randn(classes, 5, generator=generator)
    return {c: centres[c] + torch.randn(rows, 5, generator=generator) for c in range(classes)}


def logits(rows: int, sizes: tuple[int, ...] = (2, 3, 4), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, size, generator=generator) for size in sizes]


def trained(rule: str, sizes: tuple[int, ...] = (2, 3, 4)) -> Recogniser:
    recogniser = Recogniser(rule)
    for index, rows in enumerate(logits(30, sizes, seed=1)):
        labels = rows.argmax(dim=1)
        labels[: 5 * (index + 1)] = 0
        recogniser.observe_logits(rows, labels)
    return recogniser


def test_the_temperature_minimises_the_likelihood_and_is_one_without_rows() -> None:
    rows = logits(40, (4,))[0]
    labels = rows.argmax(dim=1)
    labels[:12] = (labels[:12] + 1) % 4
    found = fit_temperature(rows, labels)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64).exp()
    costs = torch.stack([functional.cross_entropy(rows.double() / t, labels) for t in grid])
    assert found == pytest.approx(float(grid[costs.argmin()]), rel=2e-3)
    assert 0.05 < found < 20 and found != pytest.approx(1, abs=0.05)
    assert fit_temperature(rows[:0], labels[:0]) == 1.0
    # Where the best lies outside, the bound is approached.
    assert fit_temperature(rows, rows.argmax(dim=1)) == pytest.approx(math.exp(-3), rel=1e-3)


def test_confidences_are_those_of_the_definitions() -> None:
    rows = logits(50)
    for rule in ("max_softmax", "entropy", "energy"):
        recogniser = trained(rule)
        scores = []
        for index, part in enumerate(rows):
            entry, size = recogniser.state(index), part.shape[1]
            tau = entry["temperature"]
            p = (part.double() / tau).softmax(dim=1)
            if rule == "max_softmax":
                scores.append((p.amax(1) - 1 / size) / (1 - 1 / size))
            elif rule == "entropy":
                scores.append(-(-(p * p.log()).sum(1) / math.log(size)))
            else:
                seen = logits(30, seed=1)[index].double()
                mean = (tau * (seen / tau).logsumexp(1)).mean()
                assert entry["mean_energy"] == pytest.approx(float(mean))
                scores.append(tau * (part.double() / tau).logsumexp(1) - mean)
        chosen = recogniser.choose_by_logits(rows)
        assert torch.equal(chosen, torch.stack(scores, 1).argmax(1))
        assert len(chosen.unique()) == 3, "the rows are such that every task is chosen"


def test_head_size_is_corrected_for() -> None:
    recogniser = Recogniser("max_softmax")
    for size in (2, 10):
        recogniser.observe_logits(torch.empty(0, size), torch.empty(0, dtype=torch.long))
    # 0.6 of two classes is close to chance, 0.55 of ten is far from it
    two = torch.tensor([[0.6, 0.4]]).log()
    ten = torch.tensor([[0.55] + [0.05] * 9]).log()
    assert recogniser.choose_by_logits([two, ten]).tolist() == [1]


def test_energy_takes_its_mean_from_training_rows_where_none_were_kept() -> None:
    rows = logits(30, (3,))[0]
    recogniser = Recogniser("energy")
    recogniser.observe_logits(rows[:0], torch.empty(0, dtype=torch.long), rows)
    assert recogniser.state(0)["temperature"] == 1.0
    assert recogniser.state(0)["mean_energy"] == pytest.approx(float(rows.double().logsumexp(1).mean()))


def test_prototypes_are_mean_directions() -> None:
    recogniser = Recogniser("prototype")
    means = []
    for task in range(3):
        recogniser.observe_features(features(task))
        means += [functional.normalize(functional.normalize(r, dim=1).mean(0), dim=0) for r in features(task).values()]
    rows = torch.cat([r for task in range(3) for r in features(task).values()])
    expected = torch.stack([rows @ m / rows.norm(dim=1) for m in means], 1).argmax(1) // 2
    assert torch.equal(recogniser.choose(rows), expected) and len(expected.unique()) == 3
    assert recogniser.state(1)["means"].dtype == torch.float32 and not recogniser.carried()


def test_mahalanobis_shares_one_covariance_within_classes() -> None:
    recogniser = Recogniser("mahalanobis")
    centred, means, total = [], [], 0
    for task in range(3):
        given = features(task, rows=10 + 5 * task)
        recogniser.observe_features(given)
        for rows in given.values():
            means.append(rows.double().mean(0))
            centred.append(rows.double() - means[-1])
            total += len(rows)
    x = torch.cat(centred)
    covariance = x.T @ x / total
    precision = torch.linalg.inv((1 - 1e-4) * covariance + 1e-4 * torch.eye(5, dtype=torch.float64))
    rows = torch.cat([r for task in range(3) for r in features(task).values()])
    score = torch.stack([rows.double() @ precision @ m - 0.5 * m @ precision @ m for m in means], 1)
    assert torch.equal(recogniser.choose(rows), score.argmax(1) // 2)
    # the nearest mean in that metric is the same
    distances = torch.stack([((rows - m) @ precision * (rows - m)).sum(1) for m in means], 1)
    assert torch.equal(recogniser.choose(rows), distances.argmin(1) // 2)
    assert recogniser.carried()["scatter"].dtype == torch.float64 and recogniser.carried()["rows"] == total


@pytest.mark.parametrize("rule", RULES)
def test_what_was_saved_answers_the_same(rule: str) -> None:
    again = Recogniser(rule)
    if rule in BY_LOGITS:
        first, rows = trained(rule), logits(20)
    else:
        first, rows = Recogniser(rule), torch.cat([*features(0).values(), *features(2).values()])
        for task in range(3):
            first.observe_features(features(task))
    for task in range(3):
        again.load_state(first.state(task))
    again.load_carried(first.carried())
    if rule == "concat":
        pairs = zip(first.log_probabilities(rows), again.log_probabilities(rows), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    elif rule in BY_LOGITS:
        assert torch.equal(first.choose_by_logits(rows), again.choose_by_logits(rows))
    else:
        assert torch.equal(first.choose(rows), again.choose(rows))
        first.observe_features(features(3))
        again.observe_features(features(3))
        assert torch.equal(first.choose(rows), again.choose(rows)), "and goes on the same"


@pytest.mark.parametrize("rule", ["max_softmax", "entropy", "energy"])
def test_ties_go_to_the_lowest_task_and_rows_do_not_see_each_other(rule: str) -> None:
    recogniser = Recogniser(rule)
    for _ in range(3):
        recogniser.observe_logits(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    rows = logits(20, (3,))[0]
    assert not recogniser.choose_by_logits([rows, rows.clone(), rows.clone()]).any()
    recogniser, parts = trained(rule), logits(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = recogniser.choose_by_logits([part[order] for part in parts])
    assert torch.equal(shuffled, recogniser.choose_by_logits(parts)[order])


@pytest.mark.parametrize("rule", ["prototype", "mahalanobis"])
def test_reference_rules_break_ties_alike(rule: str) -> None:
    recogniser = Recogniser(rule)
    for _ in range(3):
        recogniser.observe_features(features(0))
    rows = torch.cat(list(features(0).values()))
    assert not recogniser.choose(rows).any()
    one = Recogniser(rule)
    one.observe_features(features(0))
    one.observe_features({7: features(1)[0]})  # a single class is as good as any
    assert (one.choose(features(1)[0]) == 1).float().mean() > 0.9
