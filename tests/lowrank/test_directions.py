from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.errors import NumericError, OptionError, ShapeError
from everlora.lowrank import Direction, cosines, fit_direction, gram
from everlora.lowrank.factors import direction_norm, kappa
from tests.lowrank.builders import CountProducts, rand

F64 = torch.float64
IN, OUT = 14, 11


def direction(rank, seed, *, dim_in=IN, dim_out=OUT, dtype=F64):
    return Direction(
        rand(rank, dim_in, seed=2 * seed, dtype=dtype), rand(dim_out, rank, seed=2 * seed + 1, dtype=dtype)
    )


def dense(item):
    return item.up.double() @ item.down.double()


def regauged(item, seed=0):
    """The same product from other factors."""
    change = rand(item.up.shape[1], item.up.shape[1], seed=seed, dtype=F64) + 4 * torch.eye(item.up.shape[1], dtype=F64)
    return Direction(torch.linalg.solve(change, item.down), item.up @ change)


def combination(items, weights):
    """`sum_i weights_i up_i down_i` with the factors side by side."""
    ups = [weight * item.up for item, weight in zip(items, weights, strict=True)]
    return Direction(torch.cat([item.down for item in items]), torch.cat(ups, dim=1))


def cancelling(size=1.0, seed=50):
    """Factors of size 1 whose product has only the relative size asked for."""
    common, rest = rand(1, IN, seed=seed, dtype=F64), rand(1, IN, seed=seed + 1, dtype=F64)
    up = rand(OUT, 1, seed=seed + 2, dtype=F64)
    return Direction(torch.cat([common, common + size * rest]), torch.cat([up, -up], dim=1))


def empty(rank=2):
    return Direction(rand(rank, IN, seed=90, dtype=F64), torch.zeros(OUT, rank, dtype=F64))


def dense_fit(new, old, norm):
    """Least squares on stacked, flattened, normalised directions."""
    columns = torch.stack([(dense(item) / direction_norm(item, norm)).flatten() for item in old], dim=1)
    target = (dense(new) / direction_norm(new, norm)).flatten()
    beta = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    residual = (target - columns @ beta).norm()
    return beta, float(residual / target.norm()), float(residual)


ranks = st.integers(1, 6)
seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=40)
@given(rank=ranks, seed=seeds, low=st.floats(-30, 30), high=st.floats(-30, 30))
def test_the_norm_is_that_of_the_product_at_every_size_of_the_factors(rank, seed, low, high):
    item = direction(rank, seed)
    item = Direction(item.down * 10.0**low, item.up * 10.0**high)
    assert direction_norm(item) == pytest.approx(float(dense(item).norm()), rel=1e-12)
    assert direction_norm(item, "factors") == pytest.approx(float(item.up.norm() * item.down.norm()), rel=1e-12)
    assert 0.0 < kappa(item) <= 1.0
    assert kappa(item) == pytest.approx(direction_norm(item) / direction_norm(item, "factors"), rel=1e-12)


def test_the_norm_of_a_two_by_two_product_by_hand():
    item = Direction(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    # up @ down = [[1, 3], [0, 2]]
    assert direction_norm(item) == pytest.approx(math.sqrt(14), rel=1e-15)
    assert direction_norm(item, "factors") == pytest.approx(6.0, rel=1e-15)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_rank_one_has_kappa_one(seed):
    assert kappa(direction(1, seed)) == pytest.approx(1.0, abs=1e-15)


def test_unstructured_factors_have_kappa_near_one_over_root_rank():
    assert kappa(direction(10, 3, dim_in=768, dim_out=768)) == pytest.approx(1 / math.sqrt(10), rel=0.02)


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7, 1e-10])
def test_norms_and_products_survive_cancelling_factors(size):
    item, other = cancelling(size), direction(3, 1)
    # The product is -up times the rounded difference of the two rows.
    exact = item.up[:, 1:] @ (item.down[1:] - item.down[:1])
    accuracy = 1e-15 / size + 1e-14
    assert direction_norm(item) == pytest.approx(float(exact.norm()), rel=50 * accuracy)
    inner = float((exact * dense(other)).sum())
    scale = float(exact.norm() * dense(other).norm())
    assert float(gram([item], [other])) == pytest.approx(inner, abs=50 * accuracy * scale)
    assert float(cosines([item, other])[0, 1]) == pytest.approx(inner / scale, abs=50 * accuracy)


def test_a_zero_direction_has_norm_and_kappa_zero():
    for item in (empty(), Direction(torch.zeros(0, IN), torch.zeros(OUT, 0))):
        assert direction_norm(item) == direction_norm(item, "factors") == kappa(item) == 0.0
    assert direction_norm(cancelling(0.0)) < 1e-14 * direction_norm(cancelling(0.0), "factors")


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(ranks, min_size=1, max_size=5), more=st.lists(ranks, min_size=1, max_size=3), seed=seeds)
def test_gram_products_are_those_of_the_dense_matrices(sizes, more, seed):
    first = [direction(rank, seed + i) for i, rank in enumerate(sizes)]
    second = [direction(rank, seed + 50 + i) for i, rank in enumerate(more)]
    stacked = [torch.stack([dense(item).flatten() for item in group]) for group in (first, second)]
    torch.testing.assert_close(gram(first), stacked[0] @ stacked[0].T, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gram(first, second), stacked[0] @ stacked[1].T, rtol=1e-12, atol=1e-11)
    assert torch.equal(gram(first), gram(first).T)


def test_gram_matrices_of_nothing_have_their_shape():
    assert gram([]).shape == (0, 0)
    assert gram([direction(2, 0)], []).shape == (1, 0)
    assert gram([], [direction(2, 0)]).shape == (0, 1)
    assert cosines([]).shape == (0, 0)


def test_no_product_has_the_size_of_the_layer():
    old = [direction(rank, rank, dim_in=97, dim_out=89) for rank in (2, 3, 1)]
    inside = regauged(combination(old, (1.0, -2.0, 0.5)))
    with CountProducts() as counted:
        gram(old)
        assert fit_direction(inside, old).rho < 1e-12
    assert counted.shapes
    for left, right in counted.shapes:
        assert left[-2] * right[-1] <= 97 * 12, (left, right)


def test_cosines_leave_out_empty_directions():
    item = direction(3, 1)
    result = cosines([item, empty(), Direction(item.down, -2 * item.up), direction(2, 7)])
    assert result[0, 2] == pytest.approx(-1.0, abs=1e-14)
    assert result.diagonal().tolist() == [1.0, 0.0, 1.0, 1.0]
    assert not result[1].any() and not result[:, 1].any()
    assert not cosines([item], floor=1e6).any()


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(ranks, min_size=1, max_size=6),
    rank=ranks,
    seed=seeds,
    mix=st.sampled_from([0.0, 1e-3, 0.3, 5.0]),
    norm=st.sampled_from(["fro", "factors"]),
)
def test_the_fit_is_dense_least_squares(sizes, rank, seed, mix, norm):
    old = [direction(size, seed + 10 * i) for i, size in enumerate(sizes)]
    weights = rand(len(old), seed=seed, dtype=F64).tolist()
    other = direction(rank, seed + 777)
    new = combination([*old, other], [*weights, mix])
    beta, rho, residual = dense_fit(new, old, norm)
    fit = fit_direction(new, old, norm=norm)
    torch.testing.assert_close(fit.beta, beta, rtol=1e-9, atol=1e-9)
    assert fit.rho == pytest.approx(rho, rel=1e-8, abs=1e-12)
    assert math.sqrt(fit.residual_squared) == pytest.approx(residual, rel=1e-8, abs=1e-12)
    assert fit.used == (True,) * len(old) and fit.num_independent == len(old)
    assert 0.0 <= fit.rho <= 1.0
    known = fit_direction(new, old, norm=norm, old_gram=gram(old))
    torch.testing.assert_close(known.beta, fit.beta, rtol=1e-9, atol=1e-9)
    assert known.rho == pytest.approx(fit.rho, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("rho", [1e-1, 1e-3, 1e-5, 1e-8, 1e-11])
def test_the_residual_is_resolved_far_below_the_root_of_the_rounding(rho):
    old = [direction(2, i) for i in range(4)]
    inside = combination(old, (1.0, -1.0, 2.0, 0.5))
    columns = torch.stack([dense(item).flatten() for item in old], dim=1)
    outside = dense(direction(1, 9)).flatten()
    outside -= columns @ torch.linalg.lstsq(columns, outside[:, None]).solution[:, 0]
    left, values, right = torch.linalg.svd(outside.reshape(OUT, IN), full_matrices=False)
    orthogonal = Direction(right, left * values)
    new = combination(
        [inside, orthogonal], (1 / direction_norm(inside), math.tan(math.asin(rho)) / float(outside.norm()))
    )
    assert fit_direction(new, old).rho == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("norm", ["fro", "factors"])
def test_a_direction_in_the_span_is_absorbed_without_changing_the_function(norm):
    old = [direction(rank, rank) for rank in (4, 2, 3)]
    coefficients = torch.tensor([0.8, -1.1, 0.4], dtype=F64)
    new, weight = regauged(combination(old, (0.3, -1.2, 2.0)), seed=5), 0.7
    fit = fit_direction(new, old, norm=norm)
    assert fit.rho < 1e-12 and fit.change(weight) < 1e-12

    def weight_matrix(magnitudes, items):
        pairs = zip(magnitudes.tolist(), items, strict=True)
        return sum(a * dense(item) / direction_norm(item, norm) for a, item in pairs)

    before = weight_matrix(torch.cat([coefficients, torch.tensor([weight], dtype=F64)]), [*old, new])
    after = weight_matrix(coefficients + fit.offsets(weight), old)
    x = rand(5, IN, seed=3, dtype=F64)
    torch.testing.assert_close(x @ after.T, x @ before.T, rtol=0, atol=1e-12)

    # And once more, on top of the first.
    again = regauged(combination(old, (-0.5, 0.1, 0.9)), seed=6)
    second = fit_direction(again, old, norm=norm)
    assert second.rho < 1e-12
    magnitudes = coefficients + fit.offsets(weight)
    before = weight_matrix(torch.cat([magnitudes, torch.tensor([-0.4], dtype=F64)]), [*old, again])
    torch.testing.assert_close(weight_matrix(magnitudes + second.offsets(-0.4), old), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["fro", "factors"])
def test_absorbing_a_direction_outside_changes_the_weight_by_what_is_said(norm):
    old, new, weight = [direction(3, i) for i in range(3)], direction(3, 20), -1.7
    fit = fit_direction(new, old, norm=norm)
    assert fit.rho > 0.5
    length = direction_norm(new) / direction_norm(new, norm)
    assert fit.length == pytest.approx(length, rel=1e-12)
    difference = weight * dense(new) / direction_norm(new, norm)
    for offset, item in zip(fit.offsets(weight).tolist(), old, strict=True):
        difference = difference - offset * dense(item) / direction_norm(item, norm)
    assert float(difference.norm()) == pytest.approx(fit.change(weight), rel=1e-12)
    assert fit.change(weight) == pytest.approx(abs(weight) * fit.rho * length, rel=1e-12)


def test_float32_factors_in_the_span_are_absorbed_and_others_are_refused():
    old = [direction(4, i, dtype=torch.float32) for i in range(3)]
    inside = regauged(Direction(*(f.double() for f in combination(old, (1.0, 0.5, -2.0)))))
    inside = Direction(inside.down.float(), inside.up.float())
    assert fit_direction(inside, old).rho < 1e-5
    assert fit_direction(direction(4, 8, dtype=torch.float32), old).rho > 0.9
    assert fit_direction(inside, old).beta.dtype == F64


def test_orthogonal_directions_have_residual_one():
    up, down = torch.eye(OUT, dtype=F64), torch.eye(IN, dtype=F64)
    old = [Direction(down[i : i + 2], up[:, i : i + 2]) for i in (0, 2)]
    fit = fit_direction(Direction(down[4:6], up[:, 0:2]), old)
    assert fit.rho == 1.0 and not fit.beta.any()


@settings(deadline=None, max_examples=30)
@given(seed=seeds, low=st.floats(-20, 20), high=st.floats(-20, 20), sign=st.sampled_from([1.0, -1.0]))
def test_the_residual_does_not_depend_on_the_size_or_gauge_of_factors(seed, low, high, sign):
    old, new = [direction(2, seed), direction(3, seed + 1)], direction(3, seed + 2)
    fit = fit_direction(new, old)
    other = regauged(new, seed=seed)
    other = Direction(other.down * 10.0**low, other.up * sign * 10.0**high)
    changed = fit_direction(other, [old[0], Direction(old[1].down * 10.0**high, old[1].up * 10.0**low)])
    assert changed.rho == pytest.approx(fit.rho, rel=1e-10)
    torch.testing.assert_close(changed.beta, sign * fit.beta, rtol=1e-8, atol=1e-10)


def test_random_directions_practically_never_lie_in_the_span():
    old = [direction(10, i, dim_in=768, dim_out=768) for i in range(9)]
    assert fit_direction(direction(10, 99, dim_in=768, dim_out=768), old).rho > 0.9999


@pytest.mark.parametrize("norm", ["fro", "factors"])
def test_dependent_old_directions_share_the_solution_of_least_norm(norm):
    one, two = direction(2, 1), direction(3, 2)
    fit = fit_direction(combination([one, two], (1.0, 1.0)), [one, regauged(one), two], norm=norm)
    assert fit.num_independent == 2 and fit.rho < 1e-12
    if norm == "fro":
        assert fit.beta[0] == pytest.approx(float(fit.beta[1]), rel=1e-9)
    assert float(fit.beta.abs().max()) < 3.0


def test_almost_equal_old_directions_give_no_wild_coefficients():
    one, nearby = direction(2, 1), direction(2, 2)
    old = [one, combination([one, nearby], (1.0, 1e-8))]
    fit = fit_direction(nearby, old)
    assert fit.num_independent == 1
    assert float(fit.beta.abs().max()) < 1.0
    assert fit.rho == pytest.approx(fit_direction(nearby, [one]).rho, rel=1e-6)


def test_many_dependent_directions_still_fit_exactly():
    basis = [direction(1, i) for i in range(4)]
    old = [combination(basis, rand(4, seed=i, dtype=F64).tolist()) for i in range(30)]
    fit = fit_direction(combination(basis, (1.0, 2.0, 3.0, 4.0)), old)
    assert fit.num_independent == 4 and fit.rho < 1e-10


def test_empty_old_directions_take_no_part():
    one, two = direction(2, 1), direction(3, 2)
    small = Direction(direction(2, 3).down * 1e-14, direction(2, 3).up)
    new = direction(3, 4)
    old = [empty(), one, small, cancelling(0.0), two, Direction(torch.zeros(0, IN), torch.zeros(OUT, 0))]
    for known in (None, gram(old)):
        fit = fit_direction(new, old, floor=1e-12, old_gram=known)
        assert fit.used == (False, True, False, False, True, False)
        torch.testing.assert_close(fit.beta[[1, 4]], fit_direction(new, [one, two]).beta, rtol=1e-10, atol=1e-12)
        assert not fit.beta[[0, 2, 3, 5]].any()
        assert fit.num_independent == 2


@pytest.mark.parametrize("norm", ["fro", "factors"])
def test_an_empty_new_direction_is_absorbed_for_free(norm):
    for new in (empty(), Direction(torch.zeros(0, IN), torch.zeros(OUT, 0)), cancelling(0.0)):
        fit = fit_direction(new, [direction(2, 1)], norm=norm)
        assert (fit.rho, fit.length, fit.change(3.0)) == (0.0, 0.0, 0.0)
        assert fit.offsets(3.0).tolist() == [0.0]


@pytest.mark.parametrize("old", [[], [empty()]], ids=["none", "empty"])
def test_with_nothing_to_express_it_by_a_direction_stays(old):
    fit = fit_direction(direction(2, 1), old)
    assert fit.rho == 1.0 and fit.num_independent == 0 and fit.beta.tolist() == [0.0] * len(old)
    assert fit.change(-2.0) == 2.0


def test_nothing_is_written_and_no_gradient_is_kept():
    items = [Direction(*(torch.nn.Parameter(f.clone()) for f in direction(2, i))) for i in range(3)]
    before = [[f.detach().clone() for f in item] for item in items]
    with torch.inference_mode():
        fit = fit_direction(items[0], items[1:])
    assert not fit.beta.requires_grad and not fit.beta.is_inference() and not gram(items).requires_grad
    assert all(
        torch.equal(a, b) for item, copy in zip(items, before, strict=True) for a, b in zip(item, copy, strict=True)
    )


def test_bad_input_is_refused():
    one, two = direction(2, 1), direction(3, 2)
    with pytest.raises(OptionError, match="unknown norm 'frob' of a direction; did you mean 'fro'"):
        direction_norm(one, "frob")
    with pytest.raises(OptionError, match="unknown norm"):
        fit_direction(one, [two], norm="l2")
    for floor in (-1.0, math.nan, math.inf, True):
        with pytest.raises(OptionError, match="floor must be a finite norm"):
            fit_direction(one, [two], floor=floor)
    with pytest.raises(ShapeError, match=r"direction 1: expected real factors"):
        gram([one, Direction(one.down, two.up)])
    with pytest.raises(ShapeError, match="expected real factors"):
        direction_norm(Direction(one.down.long(), one.up))
    with pytest.raises(ShapeError, match="expected real factors"):
        direction_norm(Direction(one.down[0], one.up))
    with pytest.raises(ShapeError, match="direction 1 maps 5 inputs to 11 outputs, direction 0 14 to 11"):
        fit_direction(one, [direction(2, 3, dim_in=5)])
    with pytest.raises(ShapeError, match="Gram matrix of 1 old directions"):
        fit_direction(one, [two], old_gram=torch.eye(2, dtype=F64))
    with pytest.raises(NumericError, match="Gram matrix of the old directions holds NaN"):
        fit_direction(one, [two], old_gram=torch.full((1, 1), math.nan, dtype=F64))
    for value in (math.nan, math.inf):
        with pytest.raises(NumericError, match="direction 1 holds NaN"):
            gram([two, Direction(one.down * value, one.up)])
        with pytest.raises(NumericError, match="weight of an absorbed direction must be finite"):
            fit_direction(one, [two]).offsets(value)
