from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.errors import NumericError, OptionError, ShapeError
from everlora.lowrank import Direction, DirectionSum, compress
from everlora.lowrank.compression import allocate_ranks, plan_merge
from everlora.lowrank.factors import direction_norm
from tests.lowrank.builders import CountProducts, rand

F64 = torch.float64
IN, OUT = 13, 9


def direction(rank, seed, *, dim_in=IN, dim_out=OUT, dtype=F64):
    return Direction(
        rand(rank, dim_in, seed=2 * seed, dtype=dtype), rand(dim_out, rank, seed=2 * seed + 1, dtype=dtype)
    )


def dense(items, scales):
    return sum(scale * item.up.double() @ item.down.double() for item, scale in zip(items, scales, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    rank=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(IN, OUT), (4, 20), (20, 4)]),
)
def test_the_error_is_that_of_the_dense_difference_and_optimal(ranks, rank, seed, shape):
    items = [direction(r, seed + i, dim_in=shape[0], dim_out=shape[1]) for i, r in enumerate(ranks)]
    scales = rand(len(items), seed=seed, dtype=F64)
    whole = dense(items, scales.tolist())
    result = compress(items, scales, rank)
    cut = result.direction.up @ result.direction.down
    error = float((whole - cut).norm())
    best = float(torch.linalg.svdvals(whole)[rank:].norm())
    size = float(whole.norm())
    assert result.error_abs == pytest.approx(error, rel=1e-9, abs=1e-12 * size)
    assert result.error_abs == pytest.approx(best, rel=1e-9, abs=1e-12 * size)
    assert result.error_rel == pytest.approx(error / size, rel=1e-9, abs=1e-12)
    assert result.norm == pytest.approx(direction_norm(result.direction), rel=1e-12)
    kept = min(rank, sum(ranks), *shape)
    assert result.direction.up.shape == (shape[1], kept) and result.direction.down.shape == (kept, shape[0])
    if rank >= min(sum(ranks), *shape):
        assert result.error_rel < 1e-12


def test_dependent_directions_compress_without_error_to_their_true_rank():
    one = direction(2, 1)
    items = [one, Direction(2 * one.down, -one.up), direction(1, 5)]
    result = compress(items, None, 3)
    assert result.error_rel < 1e-12
    torch.testing.assert_close(
        result.direction.up @ result.direction.down, dense(items, (1.0, 1.0, 1.0)), rtol=0, atol=1e-12
    )


def test_factors_share_the_singular_values_equally():
    result = compress([direction(4, 1), direction(3, 2)], (1.5, -0.2), 5)
    down, up = result.direction
    torch.testing.assert_close(down @ down.T, up.T @ up, rtol=0, atol=1e-12)
    values = DirectionSum([direction(4, 1), direction(3, 2)], (1.5, -0.2)).singular_values[:5]
    torch.testing.assert_close((up.T @ up).diagonal(), values, rtol=1e-12, atol=0)


def test_a_sum_knows_the_price_of_each_rank():
    items, scales = [direction(3, i) for i in range(3)], (1.0, 0.1, 0.001)
    whole = DirectionSum(items, scales)
    values = torch.linalg.svdvals(dense(items, scales))
    torch.testing.assert_close(whole.singular_values, values[:9], rtol=1e-10, atol=1e-12)
    assert whole.norm == pytest.approx(float(values.norm()), rel=1e-12)
    errors = [whole.error(rank) for rank in range(1, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0
    for bound in (0.9, 0.05, 1e-3, 1e-6, 0.0):
        rank = whole.rank_within(bound)
        assert whole.error(rank) <= bound
        assert rank == 1 or whole.error(rank - 1) > bound
        assert whole.truncate(rank).error_rel == whole.error(rank)


@pytest.mark.parametrize("size", [1e-120, 1e-30, 1e30, 1e120])
def test_sizes_far_from_one_change_nothing(size):
    items = [direction(2, 1), direction(2, 2)]
    large = [Direction(item.down * size, item.up) for item in items]
    plain, scaled = compress(items, (1.0, -2.0), 2), compress(large, (1.0, -2.0), 2)
    assert scaled.error_rel == pytest.approx(plain.error_rel, rel=1e-12)
    assert scaled.error_abs == pytest.approx(plain.error_abs * size, rel=1e-12)


def test_zero_sums_and_empty_directions_compress_to_zero():
    zero = Direction(rand(2, IN, dtype=F64), torch.zeros(OUT, 2, dtype=F64))
    none = Direction(torch.zeros(0, IN), torch.zeros(OUT, 0))
    for items, scales in (([zero, none], None), ([none], None), ([direction(3, 1)], (0.0,))):
        whole = DirectionSum(items, scales)
        result = whole.truncate(2)
        assert (whole.norm, result.norm, result.error_abs, result.error_rel) == (0.0, 0.0, 0.0, 0.0)
        assert whole.rank_within(0.05) == 1
        assert not (result.direction.up @ result.direction.down).any()
    alone = compress([direction(3, 1)], None, 3).direction
    beside = compress([zero, direction(3, 1), none], None, 3).direction
    torch.testing.assert_close(beside.up @ beside.down, alone.up @ alone.down, rtol=0, atol=1e-12)


def test_directions_that_cancel_compress_to_zero_rather_than_to_their_rounding():
    item = direction(3, 1)
    whole = DirectionSum([item, Direction(item.down * 3, item.up / 3)], (1.0, -1.0))
    assert whole.norm == whole.error(1) == whole.truncate(1).error_rel == 0.0
    small = DirectionSum([item, Direction(item.down * (1 + 1e-9), item.up)], (1.0, -1.0))
    assert small.norm == pytest.approx(1e-9 * direction_norm(item), rel=1e-5)


def test_no_product_has_the_size_of_the_layer():
    items = [direction(rank, rank, dim_in=97, dim_out=89) for rank in (2, 3, 1)]
    with CountProducts() as counted:
        compress(items, None, 4)
    assert counted.shapes
    for left, right in counted.shapes:
        assert left[-2] * right[-1] <= 97 * 6, (left, right)


def test_float32_and_parameters_are_read_only_and_results_are_float64():
    item = Direction(*(torch.nn.Parameter(f) for f in direction(3, 1, dtype=torch.float32)))
    with torch.inference_mode():
        result = compress([item], torch.nn.Parameter(torch.tensor([0.5])), 2)
    assert result.direction.up.dtype == F64
    assert result.direction.down.dtype == F64 and not result.direction.up.requires_grad
    assert not result.direction.down.is_inference() and not result.direction.up.is_inference()
    whole = 0.5 * item.up.detach().double() @ item.down.detach().double()
    assert float((whole - result.direction.up @ result.direction.down).norm()) == pytest.approx(result.error_abs)


def test_a_hundred_blocks_stay_under_the_cap_and_the_errors_add_up_at_most():
    max_rank, new_rank = 12, 3
    blocks, bound, plain = [], 0.0, torch.zeros(OUT, IN, dtype=F64)
    for t in range(100):
        plan = plan_merge([block.up.shape[1] for block in blocks], new_rank, max_rank)
        if plan is not None:
            merged = compress(blocks[: plan.num_blocks], None, plan.rank)
            bound += merged.error_abs
            blocks = [merged.direction, *blocks[plan.num_blocks :]]
        new = direction(new_rank, 1000 + t)
        blocks.append(new)
        plain += new.up @ new.down
        assert sum(block.up.shape[1] for block in blocks) <= max_rank
    difference = float((plain - dense(blocks, [1.0] * len(blocks))).norm())
    assert 0.0 < difference <= bound


@settings(deadline=None, max_examples=100)
@given(
    ranks=st.lists(st.integers(1, 12), max_size=12),
    new_rank=st.integers(1, 12),
    extra=st.integers(0, 40),
    keep_last=st.integers(0, 5),
)
def test_a_plan_fits_exactly_and_keeps_as_many_as_it_can(ranks, new_rank, extra, keep_last):
    max_rank = 2 * new_rank + extra
    plan = plan_merge(ranks, new_rank, max_rank, keep_last=keep_last)
    if sum(ranks) + new_rank <= max_rank:
        assert plan is None
        return
    kept = ranks[plan.num_blocks :]
    assert 1 <= plan.num_blocks and len(kept) <= keep_last
    assert plan.rank + sum(kept) + new_rank == max_rank
    assert new_rank <= plan.rank < sum(ranks[: plan.num_blocks])
    if len(kept) < min(keep_last, len(ranks) - 1):
        assert max_rank - new_rank - sum(ranks[plan.num_blocks - 1 :]) < new_rank


def test_the_plan_of_the_usual_case():
    assert plan_merge([10] * 4, 10, 50) is None
    assert plan_merge([10] * 5, 10, 50) == (3, 20)
    assert plan_merge([20, 10, 10], 10, 40, keep_last=2) == (1, 10)
    assert plan_merge([10, 10], 10, 20, keep_last=2) == (2, 10)


VALUES = [torch.tensor([5.0, 4.0, 0.1]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.5, 0.0])]


def test_uniform_gives_each_layer_the_same():
    assert allocate_ranks(VALUES, 2) == [2, 2, 2]
    assert allocate_ranks(VALUES, 3) == [3, 3, 2]
    assert allocate_ranks([], 3) == []


def test_energy_keeps_the_largest_values_of_all_layers():
    assert allocate_ranks(VALUES, 2, allocation="energy") == [2, 3, 1]
    assert allocate_ranks(VALUES, 3, allocation="energy") == [3, 3, 1]  # nothing is spent on a zero
    assert allocate_ranks(VALUES, 2, allocation="energy", minimum=2) == [2, 2, 2]
    assert allocate_ranks([torch.zeros(0), torch.ones(3)], 1, allocation="energy") == [0, 2]


@settings(deadline=None, max_examples=50)
@given(
    layers=st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=6), min_size=1, max_size=5), rank=st.integers(1, 6)
)
def test_energy_loses_no_more_than_uniform_within_the_same_budget(layers, rank):
    values = [torch.tensor(sorted(layer, reverse=True), dtype=F64) for layer in layers]

    def lost(ranks):
        return sum(float(layer[r:].square().sum()) for layer, r in zip(values, ranks, strict=True))

    shared, spread = allocate_ranks(values, rank, allocation="energy"), allocate_ranks(values, rank)
    assert sum(shared) <= rank * len(values)
    assert all(1 <= r <= len(layer) for r, layer in zip(shared, values, strict=True))
    assert lost(shared) <= lost(spread) + 1e-9


def test_bad_input_is_refused():
    item = direction(2, 1)
    with pytest.raises(OptionError, match="needs at least one"):
        DirectionSum([])
    with pytest.raises(OptionError, match="expected 1 scales, one per direction, got 2"):
        compress([item], (1.0, 2.0), 1)
    for rank in (0, -1, True, 2.0):
        with pytest.raises(OptionError, match="rank must be a positive integer"):
            compress([item], None, rank)
        with pytest.raises(OptionError, match="rank must be a positive integer"):
            DirectionSum([item]).error(rank)
    for scale in (math.nan, math.inf):
        with pytest.raises(NumericError, match="scales of the directions"):
            compress([item, item], (1.0, scale), 1)
        with pytest.raises(NumericError, match="scales of the directions"):
            compress([item, item], (scale, 1.0), 1)
    with pytest.raises(OptionError, match="expected 1 scales, one per direction, got 2"):
        compress([item], torch.ones(2), 1)
    with pytest.raises(ShapeError, match="direction 1 maps"):
        DirectionSum([item, direction(2, 1, dim_in=4)])
    for bound in (-0.1, math.nan, True):
        with pytest.raises(OptionError, match="max_error"):
            DirectionSum([item]).rank_within(bound)
    with pytest.raises(OptionError, match="did you mean 'energy'"):
        allocate_ranks(VALUES, 2, allocation="energie")
    with pytest.raises(OptionError, match="minimum 3 exceeds"):
        allocate_ranks(VALUES, 2, allocation="energy", minimum=3)
    for values in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]), torch.ones(2, 2), torch.tensor([math.nan])):
        with pytest.raises(ShapeError, match="layer 0: expected singular values"):
            allocate_ranks([values], 1)
    with pytest.raises(OptionError, match=r"max_rank 19 leaves no room .* at least 20"):
        plan_merge([10], 10, 19)
    with pytest.raises(OptionError, match="keep_last"):
        plan_merge([10], 10, 20, keep_last=-1)
    with pytest.raises(OptionError, match="a sealed rank must be a positive integer"):
        plan_merge([10, 0], 10, 40)
