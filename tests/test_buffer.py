"""The buffer of rows to train on again: who is kept, what is kept of them, and how they come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everlora.backbones.inputs import EncodedImages, EncodedTexts
from everlora.buffer import ReplayBuffer
from everlora.errors import OptionError, ShapeError


def _images(count: int, *, first: int = 0) -> EncodedImages:
    """Images of 2 x 2 pixels, each filled with the number of its row."""
    numbers = np.arange(first, first + count)
    return EncodedImages(np.broadcast_to(numbers[:, None, None, None], (count, 2, 2, 3)).astype(np.uint8), numbers)


def _texts(count: int) -> EncodedTexts:
    """Texts of 1, 2, 3, ... tokens, each the number of its row."""
    lengths = np.arange(1, count + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return EncodedTexts(np.repeat(np.arange(count), lengths).astype(np.int32), offsets, np.arange(count))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _held(buffer: ReplayBuffer) -> list[int]:
    return buffer.state()["rows/ids"].tolist()


def _chi_square(counts: torch.Tensor, share: float, trials: int) -> float:
    """Statistic of counts of rows drawn without replacement, chi-square with one degree less than rows."""
    expected = trials * share
    spread = (counts - expected).square().sum() / (expected * (1 - share))
    return float(spread) * (len(counts) - 1) / len(counts)


def test_a_reservoir_keeps_every_row_with_the_same_probability() -> None:
    counts = torch.zeros(20)
    first, second = _images(8), _images(12, first=8)
    for trial in range(2000):
        buffer, generator = ReplayBuffer(5), _generator(trial)
        buffer.add(first, torch.zeros(8, dtype=torch.long), 0, generator)
        buffer.add(second, torch.ones(12, dtype=torch.long), 1, generator)
        counts[_held(buffer)] += 1
    assert counts.sum() == 2000 * 5
    assert _chi_square(counts, 0.25, 2000) < 43.8  # 99.9 % of chi-square with 19 degrees of freedom


def test_slots_are_drawn_before_the_row_is_counted() -> None:
    buffer = ReplayBuffer(4)
    buffer.add(_images(30), torch.arange(30), 0, _generator(3))
    slots, generator = list(range(4)), _generator(3)
    for row in range(4, 30):
        slot = int(torch.randint(row + 1, (), generator=generator))  # 0 to row, both included
        if slot < 4:
            slots[slot] = row
    assert _held(buffer) == slots and buffer.labels.tolist() == slots and buffer.num_seen == 30


def test_tasks_are_kept_in_proportion_to_their_rows() -> None:
    buffer = ReplayBuffer(200)
    for task in range(10):
        buffer.add(_images(100), torch.full((100,), task), task, _generator(task))
    counts = torch.bincount(buffer.tasks, minlength=10)
    deviation = (200 * 0.1 * 0.9) ** 0.5
    assert counts.sum() == 200 and (counts - 20).abs().max() < 5 * deviation
    assert torch.equal(buffer.tasks, buffer.labels)


def test_balanced_keeps_as_many_of_each_class_whatever_their_numbers() -> None:
    buffer = ReplayBuffer(30, balanced=True)
    sizes = (120, 15, 60, 40)
    for label, size in enumerate(sizes):
        buffer.add(_images(size), torch.full((size,), label), label // 2, _generator(label))
    counts = torch.bincount(buffer.labels)
    assert counts.sum() == 30 and counts.max() - counts.min() <= 1
    mixed = ReplayBuffer(30, balanced=True)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=_generator())
    mixed.add(_images(len(labels)).select(order), labels[order], 0, _generator(1))
    counts = torch.bincount(mixed.labels)
    assert counts.sum() == 30 and counts.max() - counts.min() <= 1


def test_balanced_keeps_rows_of_a_class_with_the_same_probability() -> None:
    counts = torch.zeros(20)
    for trial in range(600):
        buffer, generator = ReplayBuffer(8, balanced=True), _generator(trial)
        buffer.add(_images(12), torch.zeros(12, dtype=torch.long), 0, generator)
        buffer.add(_images(8, first=100), torch.ones(8, dtype=torch.long), 0, generator)  # takes places of the first
        buffer.add(_images(8, first=12), torch.zeros(8, dtype=torch.long), 1, generator)
        kept = [row for row in _held(buffer) if row < 100]
        assert len(kept) == 4
        counts[kept] += 1
    assert _chi_square(counts, 0.2, 600) < 43.8


def test_few_rows_are_all_kept_in_order() -> None:
    buffer = ReplayBuffer(10)
    buffer.add(_images(4), torch.tensor([3, 1, 3, 2]), 5, _generator())
    assert _held(buffer) == [0, 1, 2, 3] and buffer.labels.tolist() == [3, 1, 3, 2] and buffer.tasks.tolist() == [5] * 4
    assert len(buffer) == 4 and buffer.nbytes == 4 * (12 + 8 + 8 + 8)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("make", [_images, _texts])
def test_what_was_saved_comes_back_and_goes_on_the_same(make: object, balanced: bool) -> None:
    rows = make(12)  # type: ignore[operator]
    buffer = ReplayBuffer(5, balanced=balanced)
    buffer.add(rows, torch.arange(12) % 3, 0, _generator())
    again = ReplayBuffer(5, balanced=balanced)
    again.load_state({name: value.clone() for name, value in buffer.state().items()})
    assert again.state().keys() == buffer.state().keys() and again.nbytes == buffer.nbytes
    assert all(torch.equal(value, again.state()[name]) for name, value in buffer.state().items())
    again.restore(rows.select(torch.empty(0, dtype=torch.long)))
    for one, other in zip(buffer.draw(3, _generator(4)), again.draw(3, _generator(4)), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert type(one) is type(other) is type(rows)
            for name, array in one.arrays().items():
                assert np.array_equal(array, other.arrays()[name]) and array.dtype == other.arrays()[name].dtype
    for each in (buffer, again):
        each.add(rows, torch.arange(12) % 4, 1, _generator(9))
    assert all(torch.equal(value, again.state()[name]) for name, value in buffer.state().items())


def test_images_stay_bytes_and_texts_stay_flat() -> None:
    images, texts = ReplayBuffer(3), ReplayBuffer(3)
    images.add(_images(9), torch.arange(9), 0, _generator())
    texts.add(_texts(9), torch.arange(9), 0, _generator())
    state = images.state()
    assert state["rows/images"].dtype == torch.uint8 and state["rows/images"].shape == (3, 2, 2, 3)
    assert torch.equal(state["rows/images"][:, 0, 0, 0].long(), images.labels)
    state = texts.state()
    assert state["rows/token_ids"].dtype == torch.int32 and state["rows/offsets"].shape == (4,)
    assert len(state["rows/token_ids"]) == int((texts.labels + 1).sum())
    drawn, labels, _ = texts.draw(3, _generator())
    assert all(drawn.row(i).tolist() == [label] * (label + 1) for i, label in enumerate(labels.tolist()))


def test_draws_are_without_replacement_and_never_more_than_there_are() -> None:
    buffer = ReplayBuffer(6)
    buffer.add(_images(6), torch.arange(6), 0, _generator())
    _, labels, tasks = buffer.draw(4, _generator(1))
    assert len(set(labels.tolist())) == 4 and tasks.tolist() == [0] * 4
    assert sorted(buffer.draw(50, _generator(2))[1].tolist()) == list(range(6))
    assert not torch.equal(buffer.draw(6, _generator(3))[1], buffer.draw(6, _generator(4))[1])


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(OptionError, match="1 row or more"):
        ReplayBuffer(0)
    buffer = ReplayBuffer(3)
    with pytest.raises(ShapeError, match="one label for each"):
        buffer.add(_images(3), torch.arange(2), 0, _generator())
    with pytest.raises(ShapeError, match="found 0"):
        buffer.draw(1, _generator())
    buffer.add(_images(3), torch.arange(3), 0, _generator())
    other = EncodedImages(np.zeros((9, 4, 4, 3), dtype=np.uint8), np.arange(9))
    with pytest.raises(ShapeError, match="to one size"):
        buffer.add(other, torch.arange(9), 1, _generator())


def _filled(seed: int = 0, **options: bool) -> ReplayBuffer:
    buffer = ReplayBuffer(6, **options)
    buffer.add(_texts(20), torch.arange(20) % 3, 0, _generator(seed))
    return buffer


def test_buffers_of_one_seed_are_equal_and_of_two_are_not() -> None:
    assert _filled() == _filled() and _filled() != _filled(1)
    assert _filled() != _filled(balanced=True) and _filled() != "a buffer"
    again = ReplayBuffer(6)
    again.load_state(_filled().state())
    assert again == _filled()


def test_a_filter_turns_rows_away_before_they_are_counted() -> None:
    buffer = ReplayBuffer(30)
    buffer.buffer_filter = lambda row: len(row.row(0)) % 2 == 0
    buffer.add(_texts(20), torch.arange(20), 0, _generator())
    assert buffer.num_seen == len(buffer) == 10 and all(row % 2 for row in _held(buffer))
    assert buffer.labels.tolist() == _held(buffer)


def test_forgotten_rows_leave_and_make_room() -> None:
    buffer = _filled()
    held, seen = _held(buffer), buffer.num_seen
    assert buffer.forget(lambda row, place: place == 0 or int(row.ids[0]) == held[3]) == 2
    assert _held(buffer) == [held[place] for place in (1, 2, 4, 5)] and buffer.num_seen == seen
    assert len(buffer.labels) == len(buffer.tasks) == 4 and not buffer.forget(lambda row, place: False)
    buffer.add(_texts(5), torch.zeros(5, dtype=torch.long), 1, _generator())
    assert len(buffer) == 6
    assert buffer.forget(lambda row, place: True) == 6 and len(buffer) == 0
    loaded = ReplayBuffer(6)
    loaded.load_state(_filled().state())
    with pytest.raises(ShapeError, match="restore"):
        loaded.forget(lambda row, place: True)
    assert ReplayBuffer(3).forget(lambda row, place: True) == 0
