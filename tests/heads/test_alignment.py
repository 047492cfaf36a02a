"""Classifier alignment: section 11 and invariant 23 of the InfLoRA reference."""

from __future__ import annotations

import pytest
import torch

from everlora.errors import NumericError
from everlora.heads import AlignmentOptions, ClassStatistics, TaskHeads, align_heads
from everlora.heads.alignment import _alignment_loss, _sample


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _statistics(dim: int = 4) -> dict[int, ClassStatistics]:
    generator = _generator()
    return {c: ClassStatistics.of(torch.randn(30, dim, generator=generator) + c, task=c // 2) for c in range(4)}


def _heads(dim: int = 4) -> TaskHeads:
    heads = TaskHeads(dim)
    for task in range(2):
        heads.add_task([2 * task, 2 * task + 1], _generator())
    return heads


def test_statistics_of_one_and_of_many_rows() -> None:
    one = ClassStatistics.of(torch.ones(1, 3), task=0)
    assert torch.equal(one.covariance, 1e-4 * torch.eye(3, dtype=torch.float64))
    rows = torch.randn(50, 3, generator=_generator())
    full = ClassStatistics.of(rows, task=0)
    expected = torch.cov(rows.double().T) + 1e-4 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(full.covariance, expected)
    torch.testing.assert_close(full.root() @ full.root().T, expected)
    diag = ClassStatistics.of(rows, task=0, covariance="diag")
    torch.testing.assert_close(diag.covariance, expected.diagonal())
    torch.testing.assert_close(diag.root() ** 2, expected.diagonal())


def test_means_of_the_current_task_are_not_shrunk_and_older_ones_are() -> None:
    statistics = _statistics()
    roots = {c: torch.zeros(4, dtype=torch.float64) for c in statistics}  # no spread: samples are the shrunk means
    features, labels = _sample(statistics, roots, 1, AlignmentOptions(samples=2), _generator())
    for c, entry in statistics.items():
        factor = 0.9 + 0.1 * (entry.task + 1) / 2
        assert (factor == 1.0) == (entry.task == 1)
        torch.testing.assert_close(features[labels == c], (factor * entry.mean).float().expand(2, -1))


def test_samples_have_the_mean_and_covariance_asked_for() -> None:
    entry = _statistics()[2]
    features, _ = _sample({2: entry}, {2: entry.root()}, 1, AlignmentOptions(samples=20_000), _generator())
    torch.testing.assert_close(features.mean(0), entry.mean.float(), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(features.T), entry.covariance.float(), atol=0.08, rtol=0)


def test_the_normalised_loss_ignores_a_common_scale_of_the_logits() -> None:
    heads, features, labels = _heads(), torch.randn(8, 4), torch.arange(8) % 4
    before = _alignment_loss(heads, features, labels, 0.1)
    plain = _alignment_loss(heads, features, labels, None)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(3)
    torch.testing.assert_close(_alignment_loss(heads, features, labels, 0.1), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_alignment_loss(heads, features, labels, None), plain)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_loss_is_of_the_scores_that_the_heads_give(cosine: bool) -> None:
    heads = TaskHeads(8)
    heads.cosine = cosine
    heads.add_task((0, 1))
    heads.add_task((2, 3))
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(64, 8, generator=generator) + 3, torch.arange(64) % 4
    expected = torch.nn.functional.cross_entropy(heads.class_logits(features), labels)
    assert _alignment_loss(heads, features, labels, None).item() == pytest.approx(expected.item(), rel=1e-6)
    if cosine:  # of one scale in all tasks as they are
        assert _alignment_loss(heads, features, labels, 0.1).item() == pytest.approx(expected.item(), rel=1e-6)


def test_alignment_makes_separately_trained_heads_comparable() -> None:
    heads, statistics = _heads(), _statistics()
    with torch.no_grad():
        heads.linears[0].bias.add_(50)  # an old head that shouts down the new one
    probe = torch.cat([statistics[c].mean.float()[None] for c in range(4)])
    assert heads.class_logits(probe).argmax(1).tolist() != [0, 1, 2, 3]
    for _ in range(6):
        loss = align_heads(heads, statistics, AlignmentOptions(lr=0.1, logit_norm=None), _generator())
    assert heads.class_logits(probe).argmax(1)[2:].min() >= 2, "new classes win again"
    assert loss < 1.4 and not any(parameter.requires_grad for parameter in heads.parameters())


def test_equal_means_give_a_finite_loss_and_broken_statistics_are_refused() -> None:
    same = {c: ClassStatistics(torch.zeros(4).double(), torch.eye(4).double() * 1e-4, c // 2) for c in range(4)}
    assert torch.isfinite(torch.tensor(align_heads(_heads(), same, AlignmentOptions(epochs=1), _generator())))
    with pytest.raises(NumericError, match="positive definite"):
        ClassStatistics(torch.zeros(2).double(), -torch.eye(2).double(), 0).root()
