"""The gradient memory and the second moments under random tasks: merges, round trips, idempotence."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.lowrank import GradientMemory, SecondMoment

F64 = torch.float64
OPTIONS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["moment_squared", "moment"]),
        "energy": st.sampled_from(["moment_squared", "moment"]),
        "first_task": st.sampled_from(["below", "reach"]),
    }
)


def inputs(seed: int, rows: int, dim: int) -> torch.Tensor:
    """Rows whose directions are of very different size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=F64) * torch.logspace(0, -2, dim, dtype=F64)


def moment(seed: int, rows: int, dim: int) -> SecondMoment:
    made = SecondMoment(dim)
    made.update(inputs(seed, rows, dim))
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(2, 8), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.randoms())
def test_merging_does_not_depend_on_order_or_grouping(seed: int, dim: int, sizes: list[int], random: object) -> None:
    def parts() -> list[SecondMoment]:
        return [moment(seed + number, size, dim) for number, size in enumerate(sizes)]

    whole = SecondMoment(dim)
    for part in parts():
        whole.merge(part)
    shuffled = parts()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = shuffled[0]
    for part in shuffled[1:]:
        other.merge(part)
    assert whole.count == other.count == sum(sizes)
    assert torch.allclose(whole.matrix, other.matrix, rtol=1e-12, atol=1e-15)
    before = whole.matrix.clone()
    whole.merge(SecondMoment(dim))
    assert torch.equal(whole.matrix, before), "an empty one adds nothing"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(3, 10), st.integers(1, 4), st.integers(0, 4), OPTIONS)
def test_a_memory_saved_anywhere_goes_on_bit_for_bit(
    seed: int, dim: int, tasks: int, saved_after: int, options: dict[str, str]
) -> None:
    whole, parts = GradientMemory(dim, **options), GradientMemory(dim, **options)
    for task in range(tasks):
        if task == saved_after:
            again = GradientMemory(dim, **options)
            again.load_state_dict(parts.state_dict())
            parts = again
        for memory in (whole, parts):
            memory.update(moment(seed + task, 3 * dim, dim), 0.7 + 0.05 * task)
        assert torch.equal(whole.basis, parts.basis) and whole.updates == parts.updates
        assert torch.equal(whole.last_added, parts.last_added)
    assert whole.occupied_rank + whole.free_rank == dim


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(3, 10), st.integers(1, 4), st.integers(1, 7), OPTIONS)
def test_sizes_projection_and_repetition(seed: int, dim: int, tasks: int, rank: int, options: dict[str, str]) -> None:
    memory = GradientMemory(dim, **options)
    replayed = GradientMemory(dim, **options)
    for task in range(tasks):
        seen, before = moment(seed + task, 3 * dim, dim), memory.occupied_rank
        threshold = 0.6 + 0.08 * task
        assert memory.update(seen, threshold) == memory.occupied_rank - before == memory.last_added.shape[1]
        replayed.append(memory.last_added)
    assert memory.update(seen, threshold) + memory.update(seen, threshold) <= 1, "only the first task stops short"
    x = inputs(seed + 50, 4, dim)
    once = replayed.project_free(x)
    assert torch.allclose(replayed.project_free(once), once, atol=1e-10)
    wanted = min(rank, memory.free_rank)
    if wanted:
        down = memory.design(moment(seed + 60, 3 * dim, dim), wanted)
        assert down.shape == (wanted, dim)
        assert torch.allclose(memory.project_free(down), down, atol=1e-10)
