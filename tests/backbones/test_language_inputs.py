"""Rows of a language model: masks, cutting, blocks, padding, packing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from everlora.backbones.batches import width_of
from everlora.backbones.inputs import EncodedTexts
from everlora.errors import DataError, ModelError, OptionError
from tests.backbones.language_builders import BOS, CPU, EOS, byte_tokenizer, chat, make, shown, supervised, task, text

# ---------------------------------------------------------------- prompts and answers


def test_a_row_is_bos_prompt_answer_eos_and_only_answer_and_eos_carry_labels() -> None:
    inputs = make()
    encoded = inputs.encode([task("add 2", "4"), task("sum", "é", input="1 2")], ids=[7, 3])
    assert [shown(inputs, encoded.row(row)) for row in (0,)] == ["<add 2\n4>"]
    assert inputs.decode(encoded.row(1)) == "sum\n1 2\né"
    assert encoded.ids.tolist() == [7, 3] and encoded.lengths.tolist() == [9, 12]
    assert encoded.prompt_lengths.tolist() == [7, 9] and encoded.num_bytes.tolist() == [1, 2]
    assert supervised(inputs, encoded) == "4>"
    assert (encoded.num_truncated, encoded.num_dropped) == (0, 0)
    types = {name: array.dtype for name, array in encoded.arrays().items()}
    assert types == {
        "token_ids": np.uint16,
        "offsets": np.int64,
        "prompt_lengths": np.int32,
        "num_bytes": np.int64,
        "ids": np.int64,
    }
    assert make(vocab_size=65_536).encode([task("a", "b")]).token_ids.dtype == np.int32


def test_training_on_inputs_supervises_all_but_the_first_token_and_padding() -> None:
    inputs = make(train_on_inputs=True)
    encoded = inputs.encode([task("é", "4"), task("a longer one", "4")])
    assert supervised(inputs, encoded, 1) == "a longer one\n4>"
    assert encoded.prompt_lengths.tolist() == [1, 1] and encoded.num_bytes.tolist() == [4, 14]
    batch = inputs.collate(encoded, [0, 1], device=CPU)
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0).index_fill(1, torch.tensor([0]), True)).all()
    # Without a bos it is the first letter that nothing predicts.
    bare = make(tokenizer=byte_tokenizer(bos=None, eos="</s>"), train_on_inputs=True)
    encoded = bare.encode([task("éa", "4")])
    assert len(encoded.row(0)) == 6 and encoded.num_bytes.tolist() == [4]


def test_prompts_for_generation_are_those_of_training() -> None:
    inputs = make(max_length=12)
    rows = [task("add", "4"), chat(("user", "add"), ("assistant", "4")), chat(("user", "add")), task("add")]
    prompts = inputs.encode_prompts(rows)
    assert [shown(inputs, prompt) for prompt in prompts] == ["<add\n"] * 4
    encoded = inputs.encode(rows[:2])
    for row in range(2):
        assert encoded.row(row)[: encoded.prompt_lengths[row]].tolist() == prompts[row]
    assert shown(inputs, inputs.encode_prompts([text("once upon a time")])[0]) == "<upon a time"
    assert shown(inputs, inputs.encode_prompts([text("once upon a time")], reserve=4)[0]) == "< a time"
    with pytest.raises(OptionError, match="expected reserve as a whole number, between 0 and 10, found 11"):
        inputs.encode_prompts(rows, reserve=11)


@pytest.mark.parametrize(
    ("instruction", "output", "row", "labels", "size"),
    [
        ("abcdef", "xy", "<bcdef\nxy>", "xy>", 2),  # the prompt loses its beginning, bos stays
        ("abc", "stuvwxyz", "<stuvwxyz>", "stuvwxyz>", 8),  # nothing of the prompt fits
        ("abc", "rstuvwxyz", "<rstuvwxyz", "rstuvwxyz", 9),  # eos goes before the answer does
        ("abc", "qrstuvwxyz", "<qrstuvwxy", "qrstuvwxy", 9),
    ],
)
def test_cutting(instruction: str, output: str, row: str, labels: str, size: int) -> None:
    inputs = make(max_length=10)
    encoded = inputs.encode([task(instruction, output)])
    assert shown(inputs, encoded.row(0)) == row
    assert supervised(inputs, encoded) == labels
    assert encoded.num_truncated == 1 and encoded.num_bytes.tolist() == [size]


def test_a_prompt_that_fills_the_length_keeps_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    inputs = make(max_length=8)
    with caplog.at_level(logging.WARNING, "everlora"):
        encoded = inputs.encode([task("x" * 50, "4"), task("ab", "4")])
    assert "1 of 2 rows are longer than 8 tokens" in caplog.text
    assert supervised(inputs, encoded) == "4>" and encoded.num_truncated == 1
    assert encoded.lengths.tolist() == [8, 6]


def test_rows_without_anything_to_supervise_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    inputs = make(tokenizer=byte_tokenizer(eos=None), vocab_size=257)
    with caplog.at_level(logging.WARNING, "everlora"):
        encoded = inputs.encode([task("a", ""), task("a", "b"), text("")])
    assert encoded.num_dropped == 2 and encoded.ids.tolist() == [1]
    assert "2 of 3 rows hold nothing to learn" in caplog.text
    assert supervised(make(), make().encode([task("a", "")])) == ">"  # an empty answer is its end
    assert len(inputs.encode([])) == 0


def test_one_token_answers() -> None:
    inputs = make(max_length=3)
    encoded = inputs.encode([task("question", "4")])
    assert shown(inputs, encoded.row(0)) == "<4>" and supervised(inputs, encoded) == "4>"
    shortest = make(max_length=2)
    assert supervised(shortest, shortest.encode([task("question", "42")])) == "4"


# ---------------------------------------------------------------- plain text


def test_texts_of_one_call_are_one_stream_cut_into_blocks() -> None:
    inputs = make(block_size=4)
    encoded = inputs.encode([text("abcd"), text("é"), text("")], ids=[10, 20, 30])
    # <abc d><Ã ©>
    assert encoded.lengths.tolist() == [4, 4, 2]
    assert shown(inputs, encoded.row(0)) == "<abc" and encoded.row(1)[:3].tolist() == [*encoded.row(1)[:1], EOS, BOS]
    assert encoded.ids.tolist() == [0, 1, 2] and encoded.num_dropped == 1
    assert encoded.prompt_lengths.tolist() == [1, 1, 1]
    assert encoded.num_bytes.tolist() == [3, 1, 0]  # the first token of a block is not scored
    labels = inputs.collate(encoded, [0, 1, 2], device=CPU)["labels"]
    assert (labels == -100).tolist() == [
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]


def test_a_tail_of_one_token_is_dropped() -> None:
    inputs = make(max_length=5)
    assert inputs.encode([text("abcd")]).lengths.tolist() == [5]  # <abcd and the eos alone
    assert inputs.encode([text("abcde")]).lengths.tolist() == [5, 2]
    assert inputs.encode([text("abcd")]).num_dropped == 0
    assert make(block_size=3).encode([text("abcd")]).lengths.tolist() == [3, 3]


def test_texts_and_pairs_in_one_call() -> None:
    encoded = make().encode([text("abc"), task("q", "a"), text("d")], ids=[4, 9, 2])
    assert encoded.ids.tolist() == [9, 10] and encoded.lengths.tolist() == [5, 8]


def test_one_token_may_be_bos_eos_and_pad() -> None:
    tokenizer = byte_tokenizer(bos="<e>", eos="<e>", pad="<e>")
    inputs = make(tokenizer=tokenizer, vocab_size=257)
    assert inputs.bos == inputs.eos == inputs.pad == 256
    encoded = inputs.encode([task("a", "b"), task("a", "bcd")])
    batch = inputs.collate(encoded, [0, 1], device=CPU)
    assert batch["attention_mask"].sum(1).tolist() == [5, 7]
    assert batch["labels"][0].tolist() == [-100, -100, -100, encoded.row(0)[3], 256, -100, -100]
    blocks = make(tokenizer=tokenizer, vocab_size=257, block_size=8).encode([text("ab"), text("c")])
    labels = inputs.collate(blocks, [0], device=CPU)["labels"][0].tolist()
    assert [label == 256 for label in labels] == [False, False, False, True, False, False, True]
    assert labels[4] == -100 and labels[0] == -100  # both bos


# ---------------------------------------------------------------- batches


def test_batches_are_padded_on_the_right_to_their_longest_row() -> None:
    inputs = make()
    encoded = inputs.encode([task("a", "b"), task("abc", "de"), task("abcdefg", "h")])
    batch = inputs.collate(encoded, [1, 0], device=CPU)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 5 + [0] * 3]
    assert batch["input_ids"][1, 5:].tolist() == [inputs.pad] * 3
    assert (batch["labels"][1, 5:] == -100).all()
    where = batch["labels"] != -100
    assert torch.equal(batch["labels"][where], batch["input_ids"][where])
    assert inputs.collate(encoded, [], device=CPU)["input_ids"].shape == (0, 0)


def test_widths_on_cuda_are_multiples_of_eight() -> None:
    cuda = torch.device("cuda")
    assert [width_of(longest, 100, cuda) for longest in (1, 8, 9, 98, 0)] == [8, 8, 16, 100, 0]
    assert width_of(9, 100, CPU) == 9


def test_the_pad_token_is_the_tokenizers_else_eos_else_zero() -> None:
    assert make().pad == EOS
    assert make(tokenizer=byte_tokenizer(pad="<p>"), vocab_size=259).pad == 258
    assert make(tokenizer=byte_tokenizer(pad="<p>")).pad == EOS  # the embedding has no row for it
    assert make(tokenizer=byte_tokenizer(bos=None, eos=None)).pad == 0


def test_prompts_are_padded_on_the_left() -> None:
    inputs = make()
    batch = inputs.collate_prompts(inputs.encode_prompts([task("a"), task("abc")]), device=CPU)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["input_ids"][0, :2].tolist() == [inputs.pad] * 2


def test_packed_rows_lie_end_to_end() -> None:
    inputs = make(max_length=12)
    encoded = inputs.encode([task("a", "b"), task("abc", "def"), task("c", "d"), task("e", "fg")])
    assert encoded.lengths.tolist() == [5, 9, 5, 6]
    batch = inputs.collate(encoded, [0, 1, 2, 3], device=CPU, pack=True)
    assert batch["segments"].tolist() == [[1] * 5 + [2] * 5, [1] * 9 + [0], [1] * 6 + [0] * 4]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert torch.equal(batch["attention_mask"], (batch["segments"] > 0).long())
    starts = (batch["position_ids"] == 0) & (batch["segments"] > 0)
    assert starts.sum() == 4 and (batch["labels"][starts] == -100).all()
    alone = inputs.collate(encoded, [0, 1, 2, 3], device=CPU)["labels"]
    assert (batch["labels"] != -100).sum() == (alone != -100).sum()
    everything = {name: tensor.dtype for name, tensor in batch.items()}
    assert set(everything.values()) == {torch.int64} and len(everything) == 5


# ---------------------------------------------------------------- refusals


def test_wrong_rows_are_refused() -> None:
    inputs = make()
    for row, message in {
        task("a"): "row 2 has no 'output'",
        chat(("user", "a")): "row 2 has no message of the assistant",
        "plain words": "row 2: the row is no JSON object, but 'plain words'",
        '{"prompt": "a"}': "row 2: the row must have one of 'text', 'instruction' and 'messages', but has none of them",
        '{"text": 3}': "row 2: the row has a int in 'text'; write a text",
    }.items():
        with pytest.raises(DataError, match=message):
            inputs.encode([task("a", "b"), row])
    with pytest.raises(DataError, match="row 1: the row is no JSON object, but a int"):
        inputs.encode([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="expected 1 row ids"):
        inputs.encode([task("a", "b")], ids=[1, 2])
    encoded = inputs.encode([task("a", "b")])
    with pytest.raises(OptionError, match="no augmentation for texts"):
        inputs.collate(encoded, [0], device=CPU, augment=lambda pixels, ids: pixels)
    other = EncodedTexts(encoded.token_ids, encoded.offsets, encoded.ids)
    with pytest.raises(DataError, match="found EncodedTexts"):
        inputs.collate(other, [0], device=CPU)


def test_lengths_and_vocabularies_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="expected max_length as a whole number, 2 or more, found 1"):
        make(max_length=1)
    for size in (1, 65, 8.0, True):
        with pytest.raises(OptionError, match="expected block_size as a whole number, between 2 and 64"):
            make(block_size=size)
    with pytest.raises(ModelError, match=r"expected token ids below 257, .* found 257 \('</s>'\)"):
        make(vocab_size=257)
    inputs = make(tokenizer=byte_tokenizer(bos=None, eos=None), vocab_size=100)
    for call in (inputs.encode, inputs.encode_prompts):
        with pytest.raises(ModelError, match="use the tokenizer the model came with"):
            call([task("é", "é")])
