from __future__ import annotations

import pytest
import torch

from everlora.errors import NumericError
from everlora.lowrank import spectrum as spectrum_module
from everlora.lowrank.spectrum import Complement, as_symmetric, complete, lower_gram, spectrum

F64 = torch.float64
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def columns(dim, count, seed=1):
    return torch.linalg.qr(normal(dim, count, seed=seed))[0]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 129, 500])
def test_lower_gram_is_the_lower_triangle_of_the_product(count):
    product = normal(40, count)
    assert torch.allclose(lower_gram(product).tril(), (product.T @ product).tril(), atol=1e-12)


@pytest.mark.parametrize("held", [0, 1, 6, 7, 12, 13])
def test_complement_applies_an_orthonormal_basis_of_what_is_free(held):
    occupied = columns(13, held)
    complement, matrix = Complement(occupied), normal(5, 13)
    basis = complement.embed(torch.eye(13 - held, dtype=F64))
    assert basis.shape == (13, 13 - held)
    assert torch.allclose(basis.T @ basis, torch.eye(13 - held, dtype=F64), atol=1e-13)
    assert torch.allclose(basis.T @ occupied, torch.zeros(13 - held, held, dtype=F64), atol=1e-13)
    assert torch.allclose(complement.restrict(matrix), matrix @ basis, atol=1e-13)
    free = complete(occupied)
    assert torch.allclose(basis @ basis.T, free @ free.T, atol=1e-13)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("held", [0, 3, 9])
@pytest.mark.parametrize("resolve", [0, None])
def test_spectrum_agrees_with_singular_values_of_the_projected_moment(squared, held, resolve):
    root = normal(14, 14, seed=3)
    moment, occupied = root @ root.T, columns(14, held)
    outside = torch.eye(14, dtype=F64) - occupied @ occupied.T
    projected = moment @ outside if squared else outside @ moment @ outside
    _, singular, right = torch.linalg.svd(projected)
    found = spectrum(moment, occupied, squared=squared, resolve=resolve)
    expected = (singular.square() if squared else singular)[: 14 - held]
    assert torch.allclose(found.values, expected, atol=1e-10 * float(expected[0]))
    directions = found.leading(4)
    assert torch.allclose(directions @ directions.T, right[:4].T @ right[:4], atol=1e-8)
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_an_exactly_symmetric_moment_is_taken_as_it_is_and_the_rest_is_checked():
    root = normal(6, 6)
    exact = root + root.T
    assert as_symmetric(exact, 6, CPU).data_ptr() == exact.data_ptr()
    skewed = exact.clone()
    skewed[0, 1] += 1e-8
    accepted = as_symmetric(skewed, 6, CPU)
    assert torch.equal(accepted, accepted.T) and torch.allclose(accepted, exact, atol=1e-8)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = exact.clone()
        broken[2, 2] = bad
        with pytest.raises(NumericError, match="NaN or infinity"):
            as_symmetric(broken, 6, CPU)


def gap(left, right):
    return float(torch.linalg.matrix_norm(left @ left.T - right @ right.T, 2))


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("held", [0, 3])
@pytest.mark.parametrize("broken", ["construction", "vectors", "both solvers"])
def test_where_the_tridiagonal_form_fails_the_whole_decomposition_gives_the_same(monkeypatch, squared, held, broken):
    root = normal(14, 14, seed=4)
    moment, occupied = root @ root.T, columns(14, held)
    expected = spectrum(moment, occupied, squared=squared, resolve=4)
    directions = expected.leading(4)
    calls = []

    def fail(*_args, **_kwargs):
        calls.append(1)
        raise torch.linalg.LinAlgError("did not converge")

    part = "leading" if broken == "vectors" else "__init__"
    monkeypatch.setattr(spectrum_module.Tridiagonal, part, fail)
    if broken == "both solvers":
        monkeypatch.setattr(spectrum_module.torch.linalg, "eigh", fail)
    found = spectrum(moment, occupied, squared=squared, resolve=4)
    assert torch.allclose(found.values, expected.values, atol=1e-10 * float(expected.values[0]))
    assert gap(found.leading(4), directions) < 1e-9
    assert len(calls) == (2 if broken == "both solvers" else 1)


def test_squares_of_negative_eigenvalues_take_their_place():
    moment = torch.diag(torch.tensor([3.0, -2.0, 1.0, 0.5, -4.0], dtype=F64))
    found = spectrum(moment, moment[:, :0], squared=True)
    assert torch.allclose(found.values, torch.tensor([16.0, 9.0, 4.0, 1.0, 0.25], dtype=F64))
    for count, order in ((1, [4]), (2, [4, 0]), (4, [4, 0, 1, 2]), (0, [])):
        assert torch.allclose(found.leading(count), torch.eye(5, dtype=F64)[:, order], atol=1e-14)


@pytest.mark.parametrize("held", [0, 4, 60])
@pytest.mark.parametrize("share", [3, 20, 50])
def test_directions_of_clustered_and_deficient_moments_span_what_eigh_finds(held, share):
    basis, values = columns(120, 120, seed=9), torch.zeros(120, dtype=F64)
    values[:share] = 2.0
    values[share : share + 5] = 1.0 + 1e-13 * torch.arange(5, dtype=F64)
    moment, occupied = (basis * values) @ basis.T, basis[:, 120 - held :]
    moment = (moment + moment.T) / 2
    for count in (share, share + 5):
        found = spectrum(moment, occupied, squared=True, resolve=0).leading(count)
        assert gap(found, torch.linalg.eigh(moment)[1][:, -count:]) < 1e-9
