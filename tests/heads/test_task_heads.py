"""Growing heads: rows, repeated classes, losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everlora.errors import DataError
from everlora.heads import HeadRows, TaskHeads
from everlora.methods.keys import keyed_generator


def _heads() -> TaskHeads:
    heads = TaskHeads(3)
    heads.add_task([0, 1], keyed_generator(1, 0))
    heads.add_task([1, 2], keyed_generator(1, 1))
    return heads


def test_scores_of_a_repeated_class_are_the_maximum_over_its_rows() -> None:
    heads = _heads()
    with torch.no_grad():
        for head, bias in zip(heads.linears, ([1.0, 2.0], [5.0, -1.0]), strict=True):
            head.weight.zero_()
            head.bias.copy_(torch.tensor(bias))
    features = torch.randn(4, 3)
    assert heads.num_classes() == 3
    assert torch.equal(heads.class_logits(features), torch.tensor([[1.0, 5.0, -1.0]] * 4))
    assert torch.equal(heads.class_logits(features, task=0), torch.tensor([[1.0, 2.0, -torch.inf]] * 4))
    assert heads.rows().classes == (0, 1, 1, 2) and heads.rows().weight.shape == (4, 3)


def test_only_the_newest_head_is_trained_and_old_rows_keep_their_bits() -> None:
    heads = _heads()
    before = heads.linears[0].weight.clone()
    assert [head.weight.requires_grad for head in heads.linears] == [False, True]
    optimizer = torch.optim.AdamW([p for p in heads.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for over in ("local", "seen"):
        optimizer.zero_grad()
        heads.loss(torch.randn(6, 3), torch.tensor([1, 2, 1, 2, 1, 2]), over).backward()
        optimizer.step()
    assert torch.equal(heads.linears[0].weight, before) and heads.linears[0].weight.grad is None


def test_local_and_seen_losses_by_hand() -> None:
    heads = _heads()
    features, labels = torch.randn(5, 3), torch.tensor([1, 2, 2, 1, 2])
    own = heads.linears[1](features)
    torch.testing.assert_close(heads.loss(features, labels), nn.functional.cross_entropy(own, labels - 1))
    rows = torch.cat([heads.linears[0](features), own], dim=1)
    torch.testing.assert_close(heads.loss(features, labels, "seen"), nn.functional.cross_entropy(rows, labels + 1))


def test_a_label_of_another_task_is_refused() -> None:
    with pytest.raises(DataError, match="does not belong to the task"):
        _heads().loss(torch.randn(2, 3), torch.tensor([0, 1]))


def test_initial_rows_depend_on_their_key_only() -> None:
    torch.manual_seed(5)
    first = _heads().linears[1].weight
    torch.manual_seed(6)
    torch.rand(7)
    assert torch.equal(_heads().linears[1].weight, first)
    assert float(first.detach().abs().max()) <= 3**-0.5


def test_rows_of_classes_of_which_nothing_is_known_are_left_out() -> None:
    rows = HeadRows(torch.eye(3), torch.tensor([0.5, -torch.inf, -1.0]), (4, 1, 4), normalize=True)
    left = rows.of_known_classes()
    assert torch.equal(left.weight, torch.eye(3)[[0, 2]]) and torch.equal(left.bias, torch.tensor([0.5, -1.0]))
    assert (left.classes, left.normalize) == ((4, 4), True)
    with pytest.raises(DataError, match="every class was forgotten"):
        HeadRows(torch.eye(1), torch.tensor([-torch.inf]), (0,)).of_known_classes()
