from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.linalg import LinAlgError

from everlora.lowrank import tridiagonal as module
from everlora.lowrank.tridiagonal import Tridiagonal

F64 = torch.float64


def with_values(values, seed=0):
    values = torch.as_tensor(values, dtype=F64)
    normal = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=F64)
    turn = torch.linalg.qr(normal)[0]
    matrix = (turn * values) @ turn.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "power law": 1.0 / np.arange(1, 121),
    "steep": 10.0 ** -np.arange(0, 30, 0.25),
    "repeated": np.repeat([5.0, 3.0, 1.0, 0.5], 30),
    "clustered": np.repeat([5.0, 3.0, 1.0, 0.5], 30) * (1 + 1e-13 * np.arange(120)),
    "rank deficient": np.concatenate([[4.0, 2.0, 1.0, 0.5, 0.25], np.zeros(115)]),
    "identity": np.ones(120),
    "one direction": np.concatenate([[1.0], np.full(119, 1e-9)]),
    "signs": np.linspace(-2.0, 2.0, 120),
}


def assert_decomposes(matrix, count, gap=1e-9):
    found = Tridiagonal(matrix)
    expected, vectors = torch.linalg.eigh(matrix)
    expected, vectors = expected.flip(0), vectors.flip(1)
    scale = float(matrix.abs().max())
    assert torch.allclose(found.values, expected, rtol=0, atol=1e-12 * scale)
    columns = found.leading(count)
    assert columns.shape == (len(matrix), count)
    assert torch.allclose(columns.T @ columns, torch.eye(count, dtype=F64), rtol=0, atol=1e-10)
    assert torch.allclose(matrix @ columns, columns * expected[:count], rtol=0, atol=1e-10 * scale)
    if count == len(matrix) or expected[count - 1] - expected[count] > 1e-3 * scale:
        known = vectors[:, :count]
        assert torch.linalg.matrix_norm(columns @ columns.T - known @ known.T, 2) < gap


@pytest.mark.parametrize("count", [1, 5, 23, 24, 25, 30, 60, 119, 120])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenvectors_are_those_of_the_whole_decomposition(name, count):
    assert_decomposes(with_values(SPECTRA[name]), count)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 1000), decay=st.floats(0, 4))
def test_any_size_and_any_count(size, share, seed, decay):
    assert_decomposes(with_values(np.arange(1, size + 1) ** -decay, seed), max(1, round(share * size)), gap=1e-8)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_diagonal_and_zero_matrices(size):
    for count in range(1, size + 1):
        assert_decomposes(torch.diag(torch.arange(1.0, size + 1, dtype=F64)), count)
        assert_decomposes(torch.zeros(size, size, dtype=F64), count)
    assert Tridiagonal(torch.eye(size, dtype=F64)).leading(0).shape == (size, 0)


def test_a_zero_matrix_and_a_diagonal_one_of_some_width():
    assert_decomposes(torch.zeros(50, 50, dtype=F64), 4)
    assert_decomposes(torch.diag(torch.arange(50.0, 0.0, -1.0, dtype=F64)), 4)


def test_the_lower_triangle_is_read_in_either_memory_order_and_left_as_it_is():
    matrix = with_values(SPECTRA["power law"])
    lower = torch.where(torch.ones_like(matrix).tril() > 0, matrix, torch.nan)
    kept = lower.clone()
    for order in (lower, lower.T.contiguous().T):
        found = Tridiagonal(order)
        assert torch.allclose(found.values, Tridiagonal(matrix).values, rtol=0, atol=1e-14)
        assert torch.allclose(found.leading(3).abs(), Tridiagonal(matrix).leading(3).abs(), rtol=0, atol=1e-12)
    assert torch.equal(lower.nan_to_num(), kept.nan_to_num())


def test_the_same_matrix_gives_the_same_bits_in_any_order_of_questions():
    matrix = with_values(SPECTRA["clustered"])
    first, second = Tridiagonal(matrix), Tridiagonal(matrix.clone())
    first.leading(70)
    assert torch.equal(first.values, second.values)
    for count in (3, 70, 3):
        assert torch.equal(first.leading(count), second.leading(count))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    for size in (1, 2, 30):
        matrix = torch.eye(size, dtype=F64)
        matrix[size - 1, 0] = bad
        with pytest.raises(LinAlgError, match="finite"):
            Tridiagonal(matrix)


@pytest.mark.parametrize("damage", ["code", "count", "skew", "residual"])
def test_an_index_range_that_went_wrong_is_replaced_by_the_whole_tridiagonal_form(monkeypatch, damage):
    true = module.lapack.dstemr
    asked = []

    def broken(*arguments):
        found, values, vectors, _ = true(*arguments)
        asked.append(found)
        if damage == "skew":
            vectors[:, 1] += 1e-6 * vectors[:, 0]
        if damage == "residual":
            vectors[:, :4] = np.eye(120)[:, :4]
        return (found - (damage == "count")), values, vectors, int(damage == "code")

    monkeypatch.setattr(module.lapack, "dstemr", broken)
    assert_decomposes(with_values(SPECTRA["power law"]), 4)
    assert asked == [4]


@pytest.mark.parametrize(("name", "count"), [("dsytrd", 4), ("dsterf", 4), ("dstevd", 60), ("dormqr", 4)])
def test_a_failing_routine_is_named(monkeypatch, name, count):
    true = getattr(module.lapack, name)
    monkeypatch.setattr(module.lapack, name, lambda *args, **options: (*true(*args, **options)[:-1], 3))
    with pytest.raises(LinAlgError, match=f"{name} of LAPACK ended with code 3"):
        Tridiagonal(with_values(SPECTRA["power law"])).leading(count)


def test_the_bound_on_threads_ends_with_the_work():
    before = [library["num_threads"] for library in module._libraries().info()]
    with module._threads(8):
        assert {library["num_threads"] for library in module._libraries().info()} <= {1}
    Tridiagonal(with_values(SPECTRA["power law"])).leading(4)
    assert [library["num_threads"] for library in module._libraries().info()] == before
