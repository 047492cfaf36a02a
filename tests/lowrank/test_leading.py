from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.lowrank import GradientMemory
from everlora.lowrank import leading as leading_module
from everlora.lowrank.leading import Wanted, leading
from everlora.lowrank.spectrum import spectrum

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def columns(dim, count, seed=1):
    return torch.linalg.qr(normal(dim, count, seed=seed))[0]


def with_values(values, seed=0):
    turn = columns(len(values), len(values), seed=seed)
    matrix = (turn * values) @ turn.T
    return (matrix + matrix.T) / 2


def layer_moment(dim, seed, decay=1.2, strength=5.0):
    """A dominant mean direction and a power-law tail, as the inputs of a transformer block have."""
    tail = torch.arange(1, dim + 1, dtype=F64) ** -decay
    mean = normal(dim, seed=seed + 50)
    matrix = with_values(tail * (0.5 + torch.rand(dim, generator=torch.Generator().manual_seed(seed))), seed=seed)
    return matrix + strength * torch.outer(mean, mean) / mean.square().sum()


def gap(left, right):
    return float(torch.linalg.matrix_norm(left @ left.T - right @ right.T, 2)) if left.numel() else 0.0


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("held", [0, 5, 40, 130])
def test_leading_directions_agree_with_the_whole_decomposition(squared, held):
    moment, occupied = layer_moment(640, 1), columns(640, held)
    part = leading(moment, occupied, Wanted(count=6), squared=squared)
    whole = spectrum(moment, occupied, squared=squared, resolve=6)
    assert part is not None
    assert torch.allclose(part.values, whole.values[:6], rtol=1e-10)
    assert gap(part.directions, whole.leading(6)) < 1e-6
    assert torch.allclose(part.directions.T @ part.directions, torch.eye(6, dtype=F64), atol=1e-12)
    if held:
        assert (occupied.T @ part.directions).abs().max() < 1e-12


def test_the_same_call_gives_the_same_bits_and_leaves_the_global_generator_alone():
    moment, occupied = layer_moment(512, 2), columns(512, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = leading(moment, occupied, Wanted(count=5), squared=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = leading(moment, occupied, Wanted(count=5), squared=True)
    assert first is not None and second is not None
    assert torch.equal(first.directions, second.directions)


def falls_back(values, wanted, squared=True):
    moment = with_values(values)
    return leading(moment, moment[:, :0], wanted, squared=squared) is None


def test_what_cannot_be_proven_is_left_to_the_whole_decomposition():
    steep = 2.0 ** -torch.arange(256, dtype=F64)
    assert not falls_back(steep, Wanted(count=4))
    tied = steep.clone()
    tied[4] = tied[3] * (1 - 1e-12)  # the cut falls between equals
    assert falls_back(tied, Wanted(count=4)) and not falls_back(tied, Wanted(count=5))
    assert falls_back(torch.ones(256, dtype=F64), Wanted(count=4))
    assert falls_back(steep, Wanted(count=40))  # squares below the rounding of the largest
    few = torch.cat([1 + torch.arange(3, dtype=F64), torch.zeros(253, dtype=F64)])
    assert not falls_back(few, Wanted(count=3)) and falls_back(few, Wanted(count=4))  # the fourth is arbitrary


def test_more_equal_directions_than_a_block_holds_are_not_overlooked():
    # Exact arithmetic could find only 16 of the 24 equal directions in the space grown from 16 rows.
    values = torch.cat([torch.full((24,), 3.0, dtype=F64), 0.01 * 0.9 ** torch.arange(616, dtype=F64)])
    moment = with_values(values)
    total = float(moment.square().sum())
    energy = {"rest": total, "limit": 0.5, "total": total}
    part = leading(moment, moment[:, :0], Wanted(**energy), squared=True)
    assert part is None or part.values.shape == (24,)
    diagonal = torch.diag(values)
    assert leading(diagonal, diagonal[:, :0], Wanted(count=16), squared=True) is None


def test_the_norm_bound_sees_a_direction_that_the_space_does_not_hold():
    moment = with_values(torch.cat([torch.tensor([4.0, 3.0, 2.0], dtype=F64), torch.zeros(253, dtype=F64)]))
    space = leading_module._Krylov(moment, moment[:, :0], squared=True)
    assert space.extend(48)
    ritz = space.ritz()
    assert leading_module._nothing_missed(space, ritz, 2, gap=5.0)
    keep = [0, *range(2, 48)]  # as if the second eigenvector had never entered the space
    without = leading_module._Ritz(ritz.values[keep], ritz.vectors[keep], ritz.residuals[keep])
    space.size = 47
    assert not leading_module._nothing_missed(space, without, 2, gap=3.9)


def test_how_many_are_wanted_follows_the_energy():
    values = torch.tensor([16.0, 9.0, 4.0, 1.0], dtype=F64)
    for limit, general, below in [(29.0, 1, 1), (14.0, 1, 1), (13.9, 2, 1), (5.0, 2, 1), (4.9, 3, 2), (0.5, 4, 3)]:
        assert Wanted(rest=30.0, limit=limit, total=30.0).found(values) == general
        assert Wanted(rest=30.0, limit=limit, total=30.0, one_less=True).found(values) == below
    assert Wanted(rest=30.0, limit=0.5, total=30.0).found(values[:3]) is None
    assert Wanted(rest=30.0, limit=5.0 + 1e-11, total=30.0).is_tied(values)
    assert not Wanted(rest=30.0, limit=5.1, total=30.0).is_tied(values)
    assert Wanted(rest=0.5, limit=0.6, total=30.0).is_enough_already()
    assert not Wanted(rest=0.6, limit=0.6, total=30.0).is_enough_already()


def test_a_failing_eigensolver_is_left_to_the_whole_decomposition(monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    moment = layer_moment(256, 3)
    monkeypatch.setattr(leading_module.torch.linalg, "eigh", fail)
    assert leading(moment, moment[:, :0], Wanted(count=3), squared=True) is None


def pair(dim, options):
    full = GradientMemory(dim, decomposition="full", **options)
    return full, GradientMemory(dim, decomposition="partial", **options)


def assert_alike(full, partial, moment, threshold, rank=4):
    downs = [memory.design(moment, rank).T * 3**0.5 for memory in (full, partial)]
    assert gap(*downs) < 1e-5
    assert full.update(moment, threshold) == partial.update(moment, threshold)
    assert gap(full.state_dict()["occupied"], partial.state_dict()["occupied"]) < 1e-5
    assert full.kind == partial.kind


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    decay=st.floats(0.8, 2.5),
    strength=st.sampled_from([0.0, 1.0, 50.0]),
    threshold=st.floats(0.5, 0.999),
    energy=st.sampled_from(["moment_squared", "moment"]),
    first_task=st.sampled_from(["below", "reach"]),
)
def test_partial_and_full_memories_agree_over_tasks(seed, decay, strength, threshold, energy, first_task):
    full, partial = pair(448, {"energy": energy, "form": energy, "first_task": first_task})
    for t in range(2):
        if full.free_rank >= 8:
            assert_alike(full, partial, layer_moment(448, seed + t, decay, strength), threshold)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.6, 1.2])
@pytest.mark.parametrize("energy", ["moment_squared", "moment"])
def test_partial_and_full_memories_agree_at_full_width_for_both_kinds(decay, energy):
    full, partial = pair(768, {"energy": energy})
    for t in range(10):
        if full.free_rank >= 8:
            assert_alike(full, partial, layer_moment(768, t, decay, 3.0), 0.95 + 0.005 * t)


def test_thresholds_up_to_one_agree():
    for threshold in (0.999999, 1 - 1e-9, 1.0):
        full, partial = pair(160, {"first_task": "reach"})
        for t in range(2):
            assert_alike(full, partial, layer_moment(160, t, 4.0), threshold)


def test_the_partial_way_is_taken_where_it_pays(monkeypatch):
    calls = []
    whole = leading_module.leading

    def counted(*args, **kwargs):
        calls.append(whole(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr("everlora.lowrank.memory.leading", counted)
    moment = layer_moment(448, 7)
    for decomposition, dim, expected in [("auto", 448, 2), ("full", 448, 0), ("auto", 64, 0), ("partial", 400, 2)]:
        calls.clear()
        memory = GradientMemory(dim, decomposition=decomposition)
        memory.design(moment[:dim, :dim], 4)
        memory.update(moment[:dim, :dim], 0.95)
        assert len(calls) == expected and None not in calls
    calls.clear()
    memory = GradientMemory(448, first_task="reach")
    memory.update(moment, 0.99)
    assert memory.update(moment, 0.98) == 0
    assert len(calls) == 1  # what is captured already needs no decomposition
