"""What is measured of a language model: before the first task and after each, on all domains and beyond them.

The test sets of all tasks are scored, also of tasks still to come; texts that the pretrained model wrote itself; data
sets of general abilities, before the first task and after the last; and what it writes when given some prompts. A
method with several weights to predict with is measured with each.

Source: sections 9 and 13 of the reference on I-LoRA.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlora.backbones.tokens import EncodedTokens
from everlora.errors import OptionError, nearest
from everlora.experiments.measuring import rows_to_test
from everlora.experiments.records import RunRecord
from everlora.experiments.retention import retention_set
from everlora.experiments.schema import RetentionSpec, SamplesSpec
from everlora.language import LanguageEvaluator, score_encoded
from everlora.learner import Learner
from everlora.results import LanguageScore
from everlora.streams import Examples, Stream
from everlora.training import TaskTrainer

__all__ = ["LanguageMeasurement"]

logger = logging.getLogger("everlora.experiments")

Cell = dict[str, Any]


@dataclass(frozen=True)
class LanguageMeasurement:
    """Cross-entropy on every domain at every stage, and what goes with it.

    The record gets `language`: `domains`, `prompts`, `general_sets`; `base`, what the pretrained model has; and
    `stages`, a list of `task` and `measured`, one entry for each of the weights: `variant`, `tests` by domain,
    `retention`, `general` and `samples`. A score is a `LanguageScore` as plain values.

    Attributes:
        retention: which texts of its own the model is measured on; None for none.
        samples: what it goes on from; None for nothing.
        general: name and test rows of each data set of general abilities.
        answers: whether answers are counted, beside the cross-entropy.
        weights: those of the method's variants to measure; None for all.
        folder: of the whole experiment, where the texts of its own are kept.
    """

    retention: RetentionSpec | None
    samples: SamplesSpec | None
    general: Sequence[tuple[str, Examples]]
    answers: bool
    weights: tuple[str, ...] | None
    folder: Path

    def empty(self, num_tasks: int) -> dict[str, Any]:
        """No stage, and nothing known of the pretrained model."""
        prompts = [_row_of(prompt) for prompt in self.samples.prompts] if self.samples else []
        return {
            "language": {
                "domains": [],
                "general_sets": [name for name, _ in self.general],
                "prompts": prompts,
                "base": None,
                "stages": [],
            }
        }

    def begin(self, learner: Learner, record: RunRecord, stream: Stream) -> None:
        """Measure the pretrained model, unless that was done."""
        known = record.values["language"]
        self._chosen(learner)  # refused before anything is learned
        if known["base"] is not None:
            return
        known["domains"] = [task.name for task in stream.tasks]
        known["base"] = self._measured(learner, stream, None, with_general=True)
        record.save()

    def measure(self, learner: Learner, record: RunRecord, stream: Stream, index: int) -> None:
        """Measure every one of the method's weights after task `index`."""
        is_last = index == len(stream.tasks) - 1
        measured = [
            {"variant": variant} | self._measured(learner, stream, variant, with_general=is_last)
            for variant in self._chosen(learner)
        ]
        stages = [stage for stage in record.values["language"]["stages"] if stage["task"] != index]
        record.values["language"]["stages"] = [*stages, {"task": index, "measured": measured}]

    def _chosen(self, learner: Learner) -> Sequence[str | None]:
        """The variants to measure; one without a name where the method has but one choice."""
        known = learner.variants
        for name in self.weights or ():
            if name not in known:
                raise OptionError(
                    f"a row asks for the weights '{name}' of method '{learner.settings.method.name}'; "
                    + (nearest(name, known) if known else "it has one choice only, so leave weights out.")
                )
        return [name for name in known if self.weights is None or name in self.weights] or [None]

    def _measured(self, learner: Learner, stream: Stream, variant: str | None, *, with_general: bool) -> dict[str, Any]:
        tests = [rows_to_test(task) for task in stream.tasks]
        found: dict[str, Any] = {"tests": self._scores(learner, tests, variant)}
        if self.retention is not None:
            rows = retention_set(learner, self.retention, self.folder)
            found["retention"] = _plain(_score_of_tokens(learner, rows, variant))
        if self.general and with_general:
            found["general"] = self._scores(learner, [rows for _, rows in self.general], variant)
        if self.samples is not None:
            prompts = [_row_of(prompt) for prompt in self.samples.prompts]
            length = self.samples.max_new_tokens
            found["samples"] = learner.generate(prompts, max_new_tokens=length, variant=variant)
        return found

    def _scores(self, learner: Learner, sets: Sequence[Examples], variant: str | None) -> list[Cell]:
        if not self.answers:
            return [_plain(score) for score in learner.evaluate_tasks(list(enumerate(sets)), variant=variant)]
        evaluator = LanguageEvaluator(_trainer(learner), max_new_tokens=learner.settings.learner.max_new_tokens)
        with learner.method.predicting(variant):
            return [_plain(evaluator.score(rows, answers=True)) for rows in sets]


def _row_of(prompt: str | Mapping[str, str]) -> dict[str, str]:
    return {"text": prompt} if isinstance(prompt, str) else dict(prompt)


def _score_of_tokens(learner: Learner, rows: EncodedTokens, variant: str | None) -> LanguageScore:
    with learner.method.predicting(variant):
        return score_encoded(_trainer(learner), rows)


def _trainer(learner: Learner) -> TaskTrainer:
    return TaskTrainer(learner.backbone, learner.method, learner.settings.training)


def _plain(score: LanguageScore) -> Cell:
    return dataclasses.asdict(score)
