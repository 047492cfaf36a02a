from __future__ import annotations

import pytest
import torch

from everlora.errors import ShapeError
from everlora.streams.keyed import fold_key, keyed_bits, keyed_permutation, keyed_uniform


def splitmix64(state: int) -> int:
    """The finaliser on Python's unbounded integers, as the reference for the tensor form."""
    mask = 2**64 - 1
    state &= mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_bits_equal_the_reference_arithmetic() -> None:
    golden, key = 0x9E3779B97F4A7C15, fold_key("test", 3)
    ids = [0, 1, 2, 10**12, 2**62]
    expected = [[splitmix64(splitmix64(row * golden + key) + column * golden) for column in (1, 2, 3)] for row in ids]
    bits = keyed_bits(torch.tensor(ids), 3, "test", 3)
    assert [[value % 2**64 for value in row] for row in bits.tolist()] == expected


def test_fold_key_is_fixed_for_ever() -> None:
    assert fold_key("seed", 1993, 0) == 8_857_788_120_588_791_061
    assert 0 <= fold_key(-1) < 2**63
    distinct = {fold_key(*keys) for keys in [(), (1,), ("1",), (1, 2), (2, 1), (12,), ("a", "b"), ("ab",), (2**70,)]}
    assert len(distinct) == 9


def test_numbers_belong_to_the_id() -> None:
    ids = torch.tensor([5, 900, 17, 3])
    together = keyed_uniform(ids, 6, "flip", 1, 2)
    alone = torch.cat([keyed_uniform(ids[index : index + 1], 6, "flip", 1, 2) for index in range(4)])
    assert torch.equal(together, alone)
    assert torch.equal(together.flip(0), keyed_uniform(ids.flip(0), 6, "flip", 1, 2))
    assert torch.equal(together[:, :2], keyed_uniform(ids, 2, "flip", 1, 2)), "more columns do not change the first"
    assert not torch.equal(together, keyed_uniform(ids, 6, "flip", 1, 3))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = keyed_uniform(torch.arange(20_000), 4, 0)
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    # 20,000 draws: the mean's deviation is 0.29 / 141 = 0.002, a bin's 42 of 2,000; five deviations are allowed.
    assert torch.allclose(numbers.mean(0), torch.full((4,), 0.5), atol=0.01)
    for column in range(4):
        assert (torch.histc(numbers[:, column], 10, 0, 1) - 2000).abs().max() < 215
    correlation = torch.corrcoef(torch.cat([numbers, keyed_uniform(torch.arange(20_000), 4, 1)], 1).T)
    assert (correlation - torch.eye(8)).abs().max() < 0.036
    neighbours = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))
    assert neighbours[0, 1].abs() < 0.036


def test_permutation() -> None:
    permutation = keyed_permutation(1000, "order", 1, 0)
    assert sorted(permutation.tolist()) == list(range(1000))
    assert torch.equal(permutation, keyed_permutation(1000, "order", 1, 0))
    assert not torch.equal(permutation, keyed_permutation(1000, "order", 1, 1))
    assert keyed_permutation(0, 1).shape == (0,)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    keyed_uniform(torch.arange(3), 2, 1)
    keyed_permutation(5, 1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3)])
def test_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="vector of int64"):
        keyed_uniform(ids, 1, 0)


@pytest.mark.gpu
def test_the_same_on_an_accelerator() -> None:
    ids = torch.arange(5000)
    assert torch.equal(keyed_uniform(ids.cuda(), 8, 1, 2).cpu(), keyed_uniform(ids, 8, 1, 2))
