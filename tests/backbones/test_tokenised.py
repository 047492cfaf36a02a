"""The bytes that tokens stand for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from everlora.backbones.tokenised import tokenise
from tests.backbones.language_builders import BYTES, WithoutPlaces, word_tokenizer


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=4))
def test_bytes_of_the_tokens_are_those_of_the_text(texts: list[str]) -> None:
    for tokenizer in (BYTES, WithoutPlaces(BYTES)):
        for content, tokens in zip(texts, tokenise(tokenizer, texts), strict=True):
            assert tokens.num_bytes.sum() == len(content.encode())
            assert (tokens.num_bytes == 1).all() or tokenizer is not BYTES


def test_bytes_between_tokens_belong_to_the_next_one() -> None:
    tokens = tokenise(word_tokenizer("?", "red", "é"), ["  red é\n\n", ""])
    assert tokens[0].num_bytes.tolist() == [5, 5] and len(tokens[1]) == 0
