"""`LanguageEvaluator`: measures a language model on rows, and lets it answer them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from everlora.backbones.templates import answer_of
from everlora.errors import DataError
from everlora.language.answers import is_right, normalise, rouge_l
from everlora.language.generation import Written, check_max_new_tokens, write
from everlora.language.labels import LabelScores, label_scores
from everlora.language.passes import language_model
from everlora.language.scoring import score_encoded
from everlora.results import LanguageScore, Prediction
from everlora.streams import Examples, load_dialogues, parse_row
from everlora.streams.dialogue_rows import write_row
from everlora.training import TaskData, TaskTrainer

__all__ = ["LanguageEvaluator"]

Row = dict[str, Any]


class LanguageEvaluator:
    """Measures a language model with the weights that are in place.

    Nothing here draws random numbers, and modes and random states are afterwards what they were.

    Args:
        trainer: the pipeline of the model; its options say how many rows go into a forward pass.
        max_new_tokens: longest answer that is written.
        length_norm: divide the log-likelihood of a label by its number of tokens.
        pmi: subtract the log-likelihood that a label has after an empty prompt.

    Raises:
        ModelError: the model is no language model.
    """

    def __init__(
        self, trainer: TaskTrainer, *, max_new_tokens: int = 64, length_norm: bool = False, pmi: bool = False
    ) -> None:
        self.trainer = trainer
        self.backbone = language_model(trainer.backbone)
        self.max_new_tokens = max_new_tokens
        self.length_norm = length_norm
        self.pmi = pmi

    def score(self, examples: Examples, *, answers: bool = False) -> LanguageScore:
        """Measure the cross-entropy of rows, weighted by tokens.

        Args:
            examples: rows with answers, or plain texts.
            answers: also let the model answer the rows that have an answer: choose the likeliest label where the row
                has a `label_set`, else write one, which is compared by exact match (by number where the right one
                marks it with `####`) and ROUGE-L.

        Returns:
            The sums over all rows, encoded as for training: plain texts count as blocks.

        Raises:
            DataError: no row has a token to score, or an answer is missing from its own label set.
            OptionError: `max_new_tokens` leaves no room for a prompt.
        """
        rows = [parse_row(text) for text in examples.inputs] if answers else []
        answered = [row for row in rows if "text" not in row and answer_of(row) is not None]
        labelled = [row for row in answered if row.get("label_set")]
        right = [_label_of(row) for row in labelled]
        score = score_encoded(self.trainer, TaskData.of(self.backbone, examples, {}).encoded)
        if labelled:
            hits = [scores.best == label for scores, label in zip(self._labels(labelled), right, strict=True)]
            score += LanguageScore(0.0, 0, 0, 0, correct=sum(hits), answers=len(hits))
        return score + self._written_score([row for row in answered if not row.get("label_set")])

    def predict(self, examples: Examples) -> list[Prediction]:
        """Answer rows: choose among the labels that a row names, else write.

        Args:
            examples: rows, with or without answers, which are not looked at.

        Returns:
            One answer per row, in order. `score` of a written one is the probability of the whole text.

        Raises:
            DataError: a row or one of its labels cannot be used.
            OptionError: `max_new_tokens` leaves no room for a prompt.
        """
        rows = [parse_row(text) for text in examples.inputs]
        labelled = [place for place, row in enumerate(rows) if row.get("label_set")]
        others = [place for place, row in enumerate(rows) if not row.get("label_set")]
        result: dict[int, Prediction] = {}
        for place, scores in zip(labelled, self._labels([rows[place] for place in labelled]), strict=True):
            shares = scores.probabilities
            result[place] = Prediction(scores.best, shares[scores.best], shares)
        texts = self._write([examples.inputs[place] for place in others], self.max_new_tokens)
        for place, written in zip(others, texts, strict=True):
            result[place] = Prediction("", math.exp(written.log_probability), {}, written.text)
        return [result[place] for place in range(len(rows))]

    def generate(self, prompts: Sequence[str | Mapping[str, Any]], max_new_tokens: int | None = None) -> list[str]:
        """Go on from prompts, greedily.

        Args:
            prompts: instructions as text, rows as dicts, or rows as `everlora.streams.load_dialogues` makes them.
            max_new_tokens: longest answer; None for the evaluator's own.

        Returns:
            One text per prompt, in order.

        Raises:
            DataError: a prompt cannot be read.
            OptionError: `max_new_tokens` leaves no room for a prompt.
        """
        rows = [_as_row(prompt) for prompt in prompts]
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return [written.text for written in self._write(rows, limit)]

    def _labels(self, rows: Sequence[Row]) -> list[LabelScores]:
        if not rows:
            return []
        return label_scores(self.trainer, rows, length_norm=self.length_norm, pmi=self.pmi)

    def _write(self, rows: Sequence[Any], max_new_tokens: int) -> list[Written]:
        if not rows:
            return []
        limit = check_max_new_tokens(self.backbone, max_new_tokens)
        prompts = self.backbone.inputs.encode_prompts(list(rows), reserve=limit)
        with self.trainer.autocast():
            return write(
                self.backbone,
                prompts,
                max_new_tokens=limit,
                batch_size=self.trainer.options.eval_batch_size,
                progress=self.trainer.progress,
            )

    def _written_score(self, rows: Sequence[Row]) -> LanguageScore:
        if not rows:
            return LanguageScore(0.0, 0, 0, 0)
        texts = [written.text for written in self._write([write_row(row) for row in rows], self.max_new_tokens)]
        wanted = [str(answer_of(row)) for row in rows]
        pairs = list(zip(texts, wanted, strict=True))
        return LanguageScore(
            0.0,
            0,
            0,
            0,
            correct=sum(is_right(text, answer) for text, answer in pairs),
            answers=len(pairs),
            rouge_l=float(np.mean([rouge_l(text, answer) for text, answer in pairs])),
            written=len(pairs),
        )


def _label_of(row: Row) -> str:
    """Return the right label of a row, as its label set spells it."""
    answer = str(answer_of(row))
    labels: list[str] = row["label_set"]
    if answer in labels:
        return answer
    for label in labels:
        if normalise(label) == normalise(answer):
            return label
    known = ", ".join(repr(label) for label in labels[:8])
    raise DataError(f"the answer {answer[:40]!r} is not in its row's 'label_set' ({known}); add it or correct it")


def _as_row(prompt: str | Mapping[str, Any]) -> str:
    if isinstance(prompt, str):
        try:
            parse_row(prompt)
        except DataError:
            return write_row({"instruction": prompt, "input": ""})
        return prompt
    text: str = load_dialogues([dict(prompt)], require_answers=False).inputs[0]
    return text
