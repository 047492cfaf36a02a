"""Evaluation of language models: cross-entropy, labels by likelihood, written answers, and text of the base model."""

from everlora.language.answers import exact_match, final_number, rouge_l
from everlora.language.evaluator import LanguageEvaluator
from everlora.language.generation import Written, write
from everlora.language.labels import LabelScores, label_scores
from everlora.language.retention import retention_rows
from everlora.language.scoring import score_encoded

__all__ = [
    "LabelScores",
    "LanguageEvaluator",
    "Written",
    "exact_match",
    "final_number",
    "label_scores",
    "retention_rows",
    "rouge_l",
    "score_encoded",
    "write",
]
