from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from everlora.errors import NumericError, OptionError, ShapeError
from everlora.lowrank import GradientMemory, SecondMoment
from everlora.lowrank import spectrum as spectrum_module

F64 = torch.float64


def moment(dim, seed=0, decay=1.0, rank=None):
    """A random second moment whose eigenvalues fall about as `1 / i ** decay`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=F64))[0][:, :rank]
    values = torch.arange(1, directions.shape[1] + 1, dtype=F64) ** -decay
    values = values * (0.5 + torch.rand(directions.shape[1], generator=generator, dtype=F64))
    matrix = directions @ torch.diag(values) @ directions.T
    return (matrix + matrix.T) / 2


def projector(memory):
    """On the protected space."""
    return torch.eye(memory.dim, dtype=F64) - memory.project_free(torch.eye(memory.dim, dtype=F64))


def row_projector(down):
    return 3 * down.T @ down


def grown(dim, tasks, *, start=0.8, **options):
    memory = GradientMemory(dim, **options)
    for t in range(tasks):
        memory.update(moment(dim, seed=t), start + (1 - start) * t / (tasks + 1))
    return memory


class OccupiedOracle:
    """The official rule with plain full singular-value decompositions, storing protected directions only."""

    def __init__(self):
        self.basis = None

    def residual(self, c):
        return c if self.basis is None else c - self.basis @ self.basis.T @ c

    def update(self, c, eps):
        left, values, _ = np.linalg.svd(self.residual(c))
        total = (np.linalg.svd(c)[1] ** 2).sum()
        if self.basis is None:
            count = max(1, int(((np.cumsum(values**2) / total) < eps).sum()))
            self.basis = left[:, :count]
            return count
        held, count = (total - (values**2).sum()) / total, 0
        while held < eps:
            held += values[count] ** 2 / total
            count += 1
        self.basis = np.hstack([self.basis, left[:, :count]])
        return count

    def projector(self):
        return self.basis @ self.basis.T


class FreeOracle(OccupiedOracle):
    """The official rule for the complement, from the second update on."""

    def residual(self, c):
        return c if self.basis is None else self.basis @ self.basis.T @ c

    def update(self, c, eps):
        if self.basis is None:
            first = OccupiedOracle()
            count = first.update(c, eps)
            self.basis = np.linalg.svd(first.basis)[0][:, count:]
            return count
        left, values, _ = np.linalg.svd(self.residual(c))
        total = (np.linalg.svd(c)[1] ** 2).sum()
        rest, count = (values**2).sum() / total, 0
        while rest >= 1 - eps:
            rest -= values[count] ** 2 / total
            count += 1
        kept = self.basis - left[:, :count] @ left[:, :count].T @ self.basis
        self.basis = np.linalg.svd(kept)[0][:, : self.basis.shape[1] - count]
        return count

    def projector(self):
        return np.eye(len(self.basis)) - self.basis @ self.basis.T


def test_fresh_memory():
    memory = GradientMemory(4)
    assert (memory.kind, memory.occupied_rank, memory.free_rank, memory.updates) == ("occupied", 0, 4, 0)
    assert memory.basis.shape == (4, 0) and memory.last_added.shape == (4, 0)
    x = torch.randn(3, 4)
    assert torch.equal(memory.project_free(x), x)
    assert memory.captured(moment(4)) == 0.0


def test_case_solved_by_hand():
    # Squared eigenvalues 16, 9, 4, 1 of 30: cumulative .533, .833, .967, 1.
    c = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64))
    down = GradientMemory(4).design(c, 2)
    assert torch.allclose(down, torch.eye(4, dtype=F64)[:2] / math.sqrt(3))
    below, reach = GradientMemory(4), GradientMemory(4, first_task="reach")
    assert below.update(c, 0.9) == 2 and reach.update(c, 0.9) == 3
    assert below.captured(c) == pytest.approx(25 / 30) and reach.captured(c) == pytest.approx(29 / 30)
    assert below.captured(c, energy="moment") == pytest.approx(7 / 10)
    assert (below.kind, reach.kind) == ("occupied", "free")
    assert torch.allclose(reach.basis.abs(), torch.eye(4, dtype=F64)[:, 3:])
    assert below.update(c, 0.9) == 1
    by_moment = GradientMemory(4, energy="moment", first_task="reach")
    assert by_moment.update(c, 0.9) == 3  # 4, 7, 9 of 10
    assert by_moment.captured(c) == pytest.approx(0.9, abs=1e-15)


@pytest.mark.parametrize("tasks", [0, 1, 3, 5])
def test_design_rows_are_orthogonal_with_the_norm_of_the_lora_start(tasks):
    memory = grown(16, tasks)
    down = memory.design(moment(16, seed=90), 3)
    assert torch.allclose(down @ down.T, torch.eye(3, dtype=F64) / 3, atol=1e-10)
    assert torch.allclose(down.float() @ down.float().T, torch.eye(3) / 3, atol=1e-6)
    peaks = down.gather(1, down.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize(("tasks", "kind"), [(1, "occupied"), (5, "free")])
def test_design_avoids_the_memory_for_both_kinds(tasks, kind):
    memory = grown(16, tasks)
    assert memory.kind == kind
    down = memory.design(moment(16, seed=91), 3)
    assert (down @ projector(memory)).abs().max() < 1e-10
    assert (down.float() @ projector(memory).float()).abs().max() < 1e-5


def test_basis_stays_orthonormal_over_fifty_updates():
    memory = GradientMemory(48)
    for t in range(50):
        memory.update(moment(48, seed=t, decay=2.0), min(0.5 + 0.0099 * t, 0.99))
        basis = memory.basis
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=F64), atol=1e-10)
    assert memory.updates == 50 and memory.occupied_rank > 20


def test_ranks_spans_and_kind_over_a_sequence():
    memory, seen = GradientMemory(12), []
    for t in range(8):
        before, rank, columns = projector(memory), memory.occupied_rank, memory.state_dict()["occupied"]
        count = memory.update(moment(12, seed=t), 0.8 + 0.02 * t)
        after = projector(memory)
        assert memory.occupied_rank + memory.free_rank == 12
        assert memory.occupied_rank == rank + count
        assert torch.allclose(after @ before, before, atol=1e-12)
        assert memory.kind == ("free" if memory.occupied_rank > 6 else "occupied")
        assert torch.equal(memory.state_dict()["occupied"][:, :rank], columns)  # old columns keep every bit
        held = memory.state_dict()["occupied"]
        assert torch.allclose(after, held @ held.T, atol=1e-12)  # whichever side is stored
        seen.append(memory.kind)
    assert "occupied" in seen and "free" in seen


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(4, 14), tasks=st.integers(1, 5), decay=st.floats(0.3, 2.0))
def test_occupied_and_free_oracles_agree_with_the_memory(seed, dim, tasks, decay):
    memory, occupied, free = GradientMemory(dim), OccupiedOracle(), FreeOracle()
    for t in range(tasks):
        c, eps = moment(dim, seed=seed + t, decay=decay), 0.7 + 0.05 * t
        fresh = moment(dim, seed=seed + 77 + t, decay=decay)
        rows = min(2, memory.free_rank)
        if rows and t:
            down = row_projector(memory.design(fresh, rows)).numpy()
            for oracle in (occupied, free):
                left, values, _ = np.linalg.svd(oracle.residual(fresh.numpy()))
                assume(rows == dim or values[rows - 1] - values[rows] > 1e-4 * values[0])
                np.testing.assert_allclose(down, left[:, :rows] @ left[:, :rows].T, atol=1e-8)
        values = np.linalg.svd(occupied.residual(c.numpy()))[1]
        assume((np.abs(np.diff(values[: max(memory.free_rank, 1)])) > 1e-4 * values[0]).all())
        count = memory.update(c, eps)
        assert count == occupied.update(c.numpy(), eps) == free.update(c.numpy(), eps)
        np.testing.assert_allclose(projector(memory).numpy(), occupied.projector(), atol=1e-8)
        np.testing.assert_allclose(projector(memory).numpy(), free.projector(), atol=1e-8)


@pytest.mark.parametrize("energy", ["moment_squared", "moment"])
def test_an_update_reaches_the_threshold_with_the_fewest_directions(energy):
    memory = GradientMemory(20, energy=energy)
    assert memory.update(moment(20, decay=0.5), 0.6) > 1  # not clamped
    assert memory.captured(moment(20, decay=0.5)) < 0.6
    added = 0
    for t in range(1, 6):
        c = moment(20, seed=t)
        threshold = 0.6 + 0.06 * t
        count = memory.update(c, threshold)
        added += count
        assert memory.captured(c) >= threshold - 1e-12
        if count:
            short = GradientMemory(20, energy=energy)
            state = memory.state_dict()
            short.load_state_dict({**state, "occupied": state["occupied"][:, :-1], "last_added": count - 1})
            assert short.captured(c) < threshold
    assert added > 3


def test_the_first_update_keeps_one_direction_even_above_the_threshold():
    c = torch.diag(torch.tensor([10.0, 1.0, 1.0], dtype=F64))
    memory = GradientMemory(3)
    assert memory.update(c, 0.5) == 1
    assert memory.captured(c) > 0.5
    assert memory.update(c, 0.5) == 0


def test_a_reserve_keeps_directions_free_and_takes_the_leading_ones(caplog):
    free, kept = GradientMemory(20, first_task="reach"), GradientMemory(20, first_task="reach")
    with caplog.at_level("INFO", logger="everlora.lowrank.memory"):
        assert free.update(moment(20), 0.9999) > 5
        assert not caplog.messages
        assert kept.update(moment(20), 0.9999, reserve=15) == 5
    assert torch.equal(kept.last_added, free.last_added[:, :5])
    left_out = 100 * (1 - kept.captured(moment(20)))
    needed = free.occupied_rank - 5
    assert caplog.messages == [
        f"{needed} directions that the threshold asks for are left out to keep 15 free; {left_out:.3g} % of energy is "
        "unprotected"
    ]
    assert kept.update(moment(20, seed=1), 0.9999, reserve=15) == 0
    assert kept.free_rank == 15


def test_a_reserve_that_does_not_bind_changes_no_bit():
    with_it, without = GradientMemory(20), GradientMemory(20)
    assert with_it.update(moment(20), 0.9, reserve=3) == without.update(moment(20), 0.9)
    assert torch.equal(with_it.basis, without.basis)


@pytest.mark.parametrize("reserve", [-1, 20])
def test_a_reserve_of_the_whole_space_is_refused(reserve):
    with pytest.raises(OptionError, match=f"reserve={reserve} leaves nothing to protect of 20"):
        GradientMemory(20).update(moment(20), 0.9, reserve=reserve)


def test_repeating_an_update_adds_what_the_first_left_out_and_then_nothing():
    c = moment(15, seed=3)
    memory = GradientMemory(15)
    memory.update(c, 0.9)
    assert [memory.update(c, 0.9) for _ in range(3)] == [1, 0, 0]
    reach = GradientMemory(15, first_task="reach")
    reach.update(c, 0.9)
    assert reach.update(c, 0.9) == 0 and reach.updates == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_inputs_of_an_exactly_captured_task_are_left_alone(dtype, tolerance):
    generator = torch.Generator().manual_seed(5)
    old = (torch.randn(200, 5, generator=generator, dtype=F64) @ torch.randn(5, 12, generator=generator, dtype=F64)).to(
        dtype
    )
    memory = GradientMemory(12)
    assert memory.update(SecondMoment(12).update(old), 1.0) == 5
    down = memory.design(moment(12, seed=1), 4).to(dtype)
    up = torch.randn(7, 4, generator=generator, dtype=F64).to(dtype)
    assert (old @ down.T @ up.T).abs().max() < tolerance * old.norm(dim=1).max()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tasks=st.integers(0, 6), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_project_free_is_the_projector_it_claims_to_be(seed, tasks, dtype):
    memory = grown(10, tasks)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    x = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    once = memory.project_free(x)
    assert once.dtype == dtype and once.shape == x.shape
    assert torch.allclose(memory.project_free(once), once, atol=tolerance)
    p = memory.project_free(torch.eye(10, dtype=dtype))
    assert torch.allclose(p, p.T, atol=tolerance)
    basis = memory.basis.T.to(dtype)
    expected = torch.zeros_like(basis) if memory.kind == "occupied" else basis
    assert torch.allclose(memory.project_free(basis), expected, atol=tolerance)


def test_project_free_of_half_precision_rounds_once():
    memory = grown(10, 2)
    x = torch.randn(4, 10).bfloat16()
    assert torch.equal(memory.project_free(x), memory.project_free(x.float()).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory.project_free(x), memory.project_free(x.float()).bfloat16())


def test_first_design_takes_the_leading_eigenvectors():
    c = moment(11, seed=4)
    leading = torch.linalg.eigh(c)[1][:, -3:]
    assert torch.allclose(row_projector(GradientMemory(11).design(c, 3)), leading @ leading.T, atol=1e-10)


def test_design_does_not_change_the_memory_and_ignores_scale():
    memory, c = grown(14, 2), moment(14, seed=8)
    before = memory.state_dict()
    down = memory.design(c, 4)
    for scale in (1e-200, 3.0, 1e200):
        assert torch.allclose(memory.design(c * scale, 4), down, atol=1e-10)
        other = grown(14, 2)
        assert other.update(c * scale, 0.95) == grown(14, 2).update(c, 0.95)
    after = memory.state_dict()
    assert torch.equal(before.pop("occupied"), after.pop("occupied")) and before == after


def test_forms_coincide_exactly_when_the_moment_has_no_cross_term():
    first = torch.diag(torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0, 0.0], dtype=F64))
    memories = [GradientMemory(6, form=form, first_task="reach") for form in ("moment_squared", "moment")]
    for memory in memories:
        assert memory.update(first, 0.999) == 2
    split = torch.block_diag(moment(2, seed=1), moment(4, seed=2))
    same = [row_projector(memory.design(split, 2)) for memory in memories]
    assert torch.allclose(*same, atol=1e-10)
    generic = [row_projector(memory.design(moment(6, seed=3), 2)) for memory in memories]
    assert (generic[0] - generic[1]).abs().max() > 1e-3


def test_a_wide_spectrum_is_designed_by_singular_values():
    # Eigenvalues fall by ten orders: the squared problem alone would return noise after the fifth.
    values = 10.0 ** -torch.arange(12, dtype=F64)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=F64))[0]
    c = turn @ torch.diag(values) @ turn.T
    c = (c + c.T) / 2
    memory = GradientMemory(12)
    memory.update(c, 0.5)
    wanted = turn[:, 1:9]
    assert torch.allclose(row_projector(memory.design(c, 8)), wanted @ wanted.T, atol=1e-6)


def test_the_free_space_runs_out_with_warnings_and_not_with_wrong_rows():
    memory = GradientMemory(8, first_task="reach")
    memory.update(moment(8, rank=5), 1.0)
    assert memory.free_rank == 3
    with pytest.warns(UserWarning, match="only 3 of 8"):
        down = memory.design(moment(8, seed=1), 5)
    assert down.shape == (3, 8)
    with pytest.warns(UserWarning):
        padded = memory.design(moment(8, seed=1), 5, pad=True)
    assert torch.equal(padded[:3], down) and not padded[3:].any()
    memory.update(moment(8, seed=2), 1.0)
    assert (memory.free_rank, memory.kind, memory.basis.shape) == (0, "free", (8, 0))
    with pytest.warns(UserWarning, match="only 0 of 8"):
        assert memory.design(moment(8, seed=1), 5).shape == (0, 8)
    with pytest.warns(UserWarning):
        assert not memory.design(moment(8, seed=1), 2, pad=True).any()
    assert memory.update(moment(8, seed=3), 0.9) == 0
    assert not memory.project_free(torch.randn(2, 8)).any()


def test_a_rank_deficient_moment_still_gives_rows_outside_the_memory():
    memory = grown(10, 1)
    down = memory.design(moment(10, seed=6, rank=2), 4)
    assert torch.allclose(down @ down.T, torch.eye(4, dtype=F64) / 3, atol=1e-10)
    assert (down @ projector(memory)).abs().max() < 1e-10


def test_a_zero_moment_warns_and_does_not_count_as_the_first_update():
    memory = GradientMemory(4)
    with pytest.warns(UserWarning, match="zero"):
        assert memory.update(torch.zeros(4, 4), 0.9) == 0
    assert memory.updates == 0 and memory.captured(torch.zeros(4, 4)) == 0.0


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, float("nan"), True])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(OptionError, match="threshold"):
        GradientMemory(4).update(moment(4), threshold)


def test_bad_moments_are_refused_and_rounding_asymmetry_is_accepted():
    memory, c = GradientMemory(4), moment(4)
    bad = c.clone()
    bad[0, 1] += 1e-3
    for wrong in (moment(5), bad, torch.ones(4, 4, dtype=torch.int64), torch.ones(4)):
        with pytest.raises(ShapeError):
            memory.update(wrong, 0.9)
    for value in (torch.nan, torch.inf):
        wrong = c.clone()
        wrong[2, 2] = value
        with pytest.raises(NumericError):
            memory.design(wrong, 2)
    with pytest.raises(NumericError):
        memory.update(SecondMoment(4), 0.9)
    with pytest.raises(NumericError, match="trace"):
        GradientMemory(2, energy="moment").update(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 0.9)
    nearly = c.clone()
    nearly[0, 1] += 1e-9
    assert memory.update(nearly, 0.9) == GradientMemory(4).update(c, 0.9)


def test_bad_options_are_refused():
    for options in ({"form": "squared"}, {"energy": "x"}, {"first_task": "over"}, {"dtype": torch.float16}):
        with pytest.raises(OptionError):
            GradientMemory(4, **options)
    with pytest.raises(OptionError):
        GradientMemory(0)
    with pytest.raises(OptionError, match="did you mean 'moment_squared'"):
        GradientMemory(4, form="moment_square")
    for rank in (0, -1, True, 2.0):
        with pytest.raises(OptionError):
            GradientMemory(4).design(moment(4), rank)
    with pytest.raises(ShapeError):
        GradientMemory(4).project_free(torch.ones(3))


def test_state_round_trip_goes_on_bit_for_bit():
    memory = grown(24, 3)
    copy = GradientMemory(24)
    copy.load_state_dict(memory.state_dict())
    for t in range(3, 6):
        c = moment(24, seed=t)
        assert torch.equal(copy.design(c, 1), memory.design(c, 1))
        assert copy.update(c, 0.95) == memory.update(c, 0.95)
        assert torch.equal(copy.state_dict()["occupied"], memory.state_dict()["occupied"])
    assert copy.updates == memory.updates == 6


def test_replaying_what_each_task_added_gives_the_same_bits():
    memory, replayed = GradientMemory(12), GradientMemory(12)
    for t in range(6):
        memory.update(moment(12, seed=t % 3), 0.9)
        assert torch.equal(memory.last_added, memory.state_dict()["occupied"][:, replayed.occupied_rank :])
        replayed.append(memory.last_added)
        assert replayed.updates == memory.updates
        assert torch.equal(replayed.last_added, memory.last_added)
        assert torch.equal(replayed.basis, memory.basis)
        if memory.free_rank:
            c = moment(12, seed=50 + t)
            assert torch.equal(replayed.design(c, 1), memory.design(c, 1))
    with pytest.warns(UserWarning):
        memory.update(torch.zeros(12, 12), 0.9)
    replayed.append(memory.last_added, counted=False)
    assert replayed.updates == memory.updates


def test_damaged_states_and_replays_are_refused_and_change_nothing():
    memory = grown(8, 1)
    state, before = memory.state_dict(), memory.state_dict()
    skewed = state["occupied"] * 1.01
    cases = [
        {**state, "occupied": skewed},
        {**state, "dim": 9},
        {**state, "occupied": state["occupied"][:-1]},
        {**state, "occupied": state["occupied"].float()},
        {**state, "updates": -1},
        {"dim": 8},
    ]
    for case in cases:
        with pytest.raises(ShapeError):
            memory.load_state_dict(case)
    for name, value in (("form", "moment"), ("energy", "moment"), ("first_task", "reach")):
        with pytest.raises(OptionError, match=name):
            memory.load_state_dict({**state, name: value})
    for directions in (state["occupied"], skewed.float(), torch.zeros(8, 9, dtype=F64), torch.zeros(7, 1, dtype=F64)):
        with pytest.raises(ShapeError):
            memory.append(directions)
    assert torch.equal(memory.state_dict()["occupied"], before["occupied"])
    assert memory.updates == before["updates"]


def test_a_failing_eigensolver_falls_back_on_singular_values(monkeypatch):
    c0, c1 = moment(9, seed=1), moment(9, seed=2)

    def run(energy):
        memory = GradientMemory(9, energy=energy, form=energy)
        memory.update(c0, 0.8)
        return row_projector(memory.design(c1, 2)), memory.update(c1, 0.9), projector(memory)

    expected = {energy: run(energy) for energy in ("moment_squared", "moment")}

    def fail(*_args, **_kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(spectrum_module, "Tridiagonal", fail)
    monkeypatch.setattr(spectrum_module.torch.linalg, "eigh", fail)
    for energy, (design, count, protected) in expected.items():
        got = run(energy)
        assert got[1] == count
        assert torch.allclose(got[0], design, atol=1e-9) and torch.allclose(got[2], protected, atol=1e-9)


def test_tails_keep_the_digits_of_what_is_small():
    tails = spectrum_module.energy_tails(torch.tensor([1.0, 1e-20, 1e-21], dtype=F64))
    assert tails.tolist() == [1.0, 1.1e-20, 1e-21, 0.0]


def test_outputs_follow_the_dtype_option_and_can_be_made_in_inference_mode():
    memory = GradientMemory(6, dtype=torch.float32)
    with torch.inference_mode(), warnings.catch_warnings():
        memory.update(moment(6), 0.8)
        down = memory.design(moment(6, seed=1), 2)
    assert down.dtype == memory.basis.dtype == torch.float32
    assert memory.last_added.dtype == F64
    memory.update(moment(6, seed=2), 0.9)
    down += 0  # an ordinary tensor


def test_many_directions_and_slightly_skewed_ones_are_protected_orthonormally(monkeypatch):
    memory = GradientMemory(60, first_task="reach", decomposition="full")
    assert memory.update(moment(60, decay=0.1), 0.9) > 30
    held = memory.last_added
    assert torch.allclose(held.T @ held, torch.eye(held.shape[1], dtype=F64), atol=1e-13)
    true = spectrum_module.Spectrum.leading

    def skewed(self, count):
        columns = true(self, count)
        return columns + 1e-9 * columns.roll(1, 1)

    monkeypatch.setattr(spectrum_module.Spectrum, "leading", skewed)
    memory.update(moment(60, seed=2, decay=0.1), 0.95)
    held = memory.state_dict()["occupied"]
    assert memory.last_added.shape[1] > 1
    assert torch.allclose(held.T @ held, torch.eye(held.shape[1], dtype=F64), atol=1e-13)
