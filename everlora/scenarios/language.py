"""Language: rows are instructions, chats or plain texts, and an answer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.errors import DataError, OptionError
from everlora.export import ExportReport, export_language
from everlora.language import LanguageEvaluator
from everlora.methods.base import Method
from everlora.rejection import Rejection
from everlora.results import LanguageEvaluation, LanguageScore, Prediction
from everlora.scenarios.base import Scenario
from everlora.streams import Examples, check_dialogue_columns, hold_out_rows, load_dialogues
from everlora.training import TaskTrainer

__all__ = ["LanguageScenario"]


class LanguageScenario(Scenario[LanguageScore, LanguageEvaluation]):
    """Causal language models: see `Scenario`. There are no labels to keep account of."""

    max_new_tokens: int = 64
    """How long an answer may be, in tokens."""

    @staticmethod
    def check_columns(columns: Mapping[str, str | None]) -> None:
        """Refuse kinds of columns that do not exist."""
        check_dialogue_columns(columns)

    def load(self, dataset: Any, columns: Mapping[str, str | None] | None, *, labelled: bool = True) -> Examples:
        """Read rows with answers, or plain texts; a row is recognised by its answer, too."""
        return load_dialogues(dataset, columns=self._named(columns))

    def read_inputs(self, inputs: Any) -> Examples:
        """Read prompts: one text or a list of texts, rows without answers, or a data set."""
        if isinstance(inputs, Examples):
            return inputs
        if isinstance(inputs, str) or (isinstance(inputs, Mapping) and not isinstance(inputs, Path)):
            inputs = [inputs]
        is_plain = isinstance(inputs, Sequence) and all(isinstance(one, str) for one in inputs)
        return load_dialogues(inputs, columns=None if is_plain else self._named(None), require_answers=False)

    def hold_out(self, examples: Examples, *, maximum: int, seed: int) -> tuple[Examples, Examples]:
        """Hold out at most `maximum` rows, and never more than half of them."""
        return hold_out_rows(examples, maximum=maximum, seed=seed)

    def score(self, trainer: TaskTrainer, rows: Examples, task: int | None) -> LanguageScore:
        """Cross-entropy of the rows, and how many answers are right where rows have some."""
        return self._evaluator(trainer).score(rows)

    def summary(self, scores: Mapping[str, LanguageScore]) -> LanguageEvaluation:
        """Put the scores of several tasks together."""
        first, *rest = scores.values()
        return LanguageEvaluation(sum(rest, start=first), dict(scores))

    def evaluate(self, trainer: TaskTrainer, rows: Examples, names: Sequence[str]) -> LanguageEvaluation:
        """Cross-entropy and answers, split by the rows' task column where there is one."""
        evaluator = self._evaluator(trainer)
        groups = ["all rows"] * len(rows) if rows.groups is None else [str(group) for group in rows.groups]
        return self.summary(
            {
                name: evaluator.score(rows.select([i for i, group in enumerate(groups) if group == name]), answers=True)
                for name in dict.fromkeys(groups)
            }
        )

    def predict(
        self, trainer: TaskTrainer, inputs: Examples, task: int | None, rejection: Rejection | None = None
    ) -> list[Prediction]:
        """Write an answer to each prompt, or choose among the labels that a row names."""
        if task is not None:
            raise OptionError("a language model has one network for all tasks; leave task out.")
        return self._evaluator(trainer).predict(inputs)

    def scores_of_known(self, trainer: TaskTrainer, kept: Mapping[int, Examples], task: int | None) -> list[Tensor]:
        """Refuse: an answer is written."""
        raise OptionError("a language model writes its answers and has no classes to refuse; leave none_of_these out.")

    def generate(self, trainer: TaskTrainer, prompts: Sequence[Any], max_new_tokens: int | None) -> list[str]:
        """Go on from prompts, greedily."""
        if isinstance(prompts, str):
            raise DataError("prompts must be a list of texts; put the one text into a list.")
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return self._evaluator(trainer).generate(prompts, longest)

    @staticmethod
    def figure(score: LanguageScore) -> float:
        """Cross-entropy, nats a token."""
        return score.cross_entropy

    @staticmethod
    def plain(score: LanguageScore) -> dict[str, float]:
        """What the cross-entropy is made of, and of how many rows it is."""
        return {"nll": score.nll, "tokens": score.tokens, "num_bytes": score.num_bytes, "rows": score.rows}

    def export(
        self,
        method: Method,
        path: str | Path,
        *,
        format: str,
        card: Mapping[str, Any],
        max_rank: int | None,
        variant: str | None,
    ) -> ExportReport:
        """Write the model, or its adapters, with the tokenizer."""
        assert isinstance(self.backbone, CausalLMBackbone)
        return export_language(
            method, self.backbone, path, format=format, card=card, variant=variant, max_rank=max_rank
        )

    def _evaluator(self, trainer: TaskTrainer) -> LanguageEvaluator:
        return LanguageEvaluator(trainer, max_new_tokens=self.max_new_tokens)

    def _named(self, columns: Mapping[str, str | None] | None) -> dict[str, str]:
        return {**self.columns, **{key: value for key, value in (columns or {}).items() if value}}
