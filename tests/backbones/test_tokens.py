"""Encoded rows: selected, joined, stored, cut again."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from everlora.backbones.tokens import EncodedTokens
from everlora.errors import ShapeError
from tests.backbones.language_builders import make, shown, task, text


def test_rows_can_be_selected_joined_and_stored() -> None:
    inputs = make()
    encoded = inputs.encode([task("a", "b"), task("abc", "de"), task("abcdefg", "h")], ids=[5, 6, 7])
    part = encoded.select(torch.tensor([2, 0]))
    assert part.ids.tolist() == [7, 5] and part.row(0).tolist() == encoded.row(2).tolist()
    assert part.prompt_lengths.tolist() == encoded.prompt_lengths[[2, 0]].tolist()
    assert len(encoded.select([])) == 0 and encoded.select([]).offsets.tolist() == [0]
    both = part.join(encoded.select([1]))
    again = EncodedTokens.from_arrays(both.arrays())
    assert [again.row(row).tolist() for row in range(3)] == [encoded.row(row).tolist() for row in (2, 0, 1)]
    assert again.num_bytes.tolist() == encoded.num_bytes[[2, 0, 1]].tolist()
    assert again.token_ids.dtype == np.uint16
    with pytest.raises(ShapeError, match="expected token ids of type uint16"):
        both.join(make(vocab_size=70_000).encode([task("a", "b")]))
    with pytest.raises(ShapeError, match="expected 2 prompt_lengths for 2 encoded rows"):
        EncodedTokens(both.token_ids, np.zeros(3, np.int64), np.zeros(1, np.int32), np.zeros(2), np.zeros(2))


def test_rows_of_a_longer_run_are_cut_again(caplog: pytest.LogCaptureFixture) -> None:
    rows = [task("abcdef", "xy"), task("a", "b"), task("abc", "é" * 6), text("stuvwxyzabcdef")]
    encoded, short = make().encode(rows), make(max_length=10)
    with caplog.at_level(logging.WARNING, "everlora"):
        fitted = short.fit(encoded)
    assert "3 of 4 rows are longer than 10 tokens and are cut" in caplog.text
    again = short.encode(rows[:3])
    assert [fitted.row(row).tolist() for row in range(3)] == [again.row(row).tolist() for row in range(3)]
    assert fitted.prompt_lengths.tolist()[:3] == again.prompt_lengths.tolist()
    assert shown(short, fitted.row(3)) == "<stuvwxyza" and fitted.num_bytes[3] == 9
    assert fitted.num_bytes[:2].tolist() == [2, 1] and fitted.num_truncated == 3
    assert make().fit(encoded) is encoded
