"""Comparing an answer with the right one: exact match, numbers, ROUGE-L."""

from __future__ import annotations

import functools
import re
import unicodedata
from decimal import Decimal
from typing import Any

__all__ = ["exact_match", "final_number", "is_right", "normalise", "rouge_l", "same_number", "words_of"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_MARK = "####"
# Han, Hiragana, Katakana and their signs: scripts that put no spaces between words.
_UNSPACED = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f]")
_UNSPACED_RARE = re.compile(r"[\U00020000-\U000323af]")


def normalise(text: str, *, punctuation: bool = False) -> str:
    """Fold case, collapse whitespace and take it off both ends.

    Args:
        text: any text.
        punctuation: whether punctuation is left out, too.
    """
    if punctuation:
        text = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in text)
    return " ".join(text.casefold().split())


def exact_match(prediction: str, answer: str, *, punctuation: bool = False) -> bool:
    """Whether both texts are the same once normalised; a prediction with nothing in it never is.

    Args:
        prediction: what was written.
        answer: what is right.
        punctuation: whether punctuation is left out, too.
    """
    written = normalise(prediction, punctuation=punctuation)
    return written != "" and written == normalise(answer, punctuation=punctuation)


def final_number(text: str) -> Decimal | None:
    """Return the number that a text arrives at: the first after `####`, else the last one; commas of thousands go.

    Returns:
        The number, or None where there is none.
    """
    _, mark, rest = text.partition(_MARK)
    marked = _NUMBER.search(rest) if mark else None
    found = marked.group() if marked else next(reversed([match.group() for match in _NUMBER.finditer(text)]), None)
    return None if found is None else Decimal(found.replace(",", ""))


def same_number(prediction: str, answer: str) -> bool:
    """Whether both texts arrive at the same number; without a number a prediction is wrong."""
    written = final_number(prediction)
    return written is not None and written == final_number(answer)


def is_right(prediction: str, answer: str) -> bool:
    """Compare by number where the right answer marks one with `####`, as GSM8K does, else by exact match."""
    return same_number(prediction, answer) if _MARK in answer else exact_match(prediction, answer)


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words at whitespace; each Chinese or Japanese character is a word of its own."""
    spaced = _UNSPACED_RARE.sub(r" \g<0> ", _UNSPACED.sub(r" \g<0> ", text))
    return spaced.casefold().split()


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words; 0 where either text has none.

    Args:
        prediction: what was written.
        answer: what is right.

    Source: Lin, 2004, as the package `rouge-score` computes it, over the words of `words_of`.
    """
    return float(_scorer().score(answer, prediction)["rougeL"].fmeasure)


class _Words:
    """The tokenizer that `rouge_score` is given in the place of its own, which drops all but Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        return words_of(text)


@functools.cache
def _scorer() -> Any:
    # Here and not above: the package imports nltk, which takes seconds, and few runs compare texts.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
