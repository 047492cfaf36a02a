"""How each number is called, scaled and printed, and which direction is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["CLASSIFIER_DEFAULTS", "LANGUAGE_DEFAULTS", "Measure", "Unit", "measure"]

Unit = Literal["fraction", "nats a token", "bits a byte", "count", "seconds", "bytes", "epochs", "ratio"]

CLASSIFIER_DEFAULTS = ("last", "last_samples", "avg", "avg_samples", "forgetting")
LANGUAGE_DEFAULTS = ("ce", "ce_tokens", "learning_ce", "bwt_ce", "forgetting_ce", "retention", "answer_acc")

_TASKS, _SAMPLES = "task mean", "sample mean"


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        name: as in `AccuracyMatrix.summary` and the figures of the report.
        heading: what stands above its column; where there are two means it says which.
        unit: of the stored number.
        scale: factor for printing.
        decimals: digits after the point.
        lower_is_better: None where neither direction is.
    """

    name: str
    heading: str
    unit: Unit = "fraction"
    scale: float = 100.0
    decimals: int = 2
    lower_is_better: bool | None = False


def _percent(name: str, heading: str, mean: str = "") -> Measure:
    return Measure(name, f"{heading} % ({mean})" if mean else f"{heading} %")


def _points(name: str, heading: str, *, lower: bool = False) -> Measure:
    return Measure(name, f"{heading} (points)", lower_is_better=lower)


def _nats(name: str, heading: str, *, lower: bool = True) -> Measure:
    return Measure(name, f"{heading} (nats)", "nats a token", 1.0, 3, lower)


def _plain(name: str, heading: str, unit: Unit, scale: float = 1.0, decimals: int = 0) -> Measure:
    return Measure(name, heading, unit, scale, decimals, True)


_ACCURACIES = (
    _percent("last", "Last", _TASKS),
    _percent("last_samples", "Last", _SAMPLES),
    _percent("avg", "Average", _TASKS),
    _percent("avg_samples", "Average", _SAMPLES),
    _percent("avg_without_first", "Average without the first task", _TASKS),
    _percent("aulc", "Area under the curve", _TASKS),
    _percent("learning_acc", "When learned", _TASKS),
    _percent("worst_task", "Worst task"),
    _percent("task_recognition", "Task recognised", _SAMPLES),
    _percent("task_aware_last", "Task-aware last", _TASKS),
    _percent("task_aware_last_samples", "Task-aware last", _SAMPLES),
    _percent("task_aware_avg", "Task-aware average", _TASKS),
    _percent("remembering", "Remembering"),
    _percent("retention", "Retention"),
    _percent("til", "TIL", _TASKS),
    _percent("cil", "CIL", _TASKS),
    _percent("learning_til", "When learned, task given", _TASKS),
    _points("intransigence", "Intransigence", lower=True),
    _points("joint_gap", "Gap to joint training", lower=True),
    _points("forgetting", "Forgetting", lower=True),
    _points("forgetting_clipped", "Forgetting, never below 0", lower=True),
    _points("forgetting_from_diag", "Forgetting since learned", lower=True),
    _points("bwt", "BWT"),
    _points("bwt_avg", "BWT over all moments"),
    _points("bwt_avg_positive", "Positive BWT over all moments"),
    _points("bwt_trace", "BWT divided by T"),
    _points("fwt", "FWT"),
    _points("fwt_avg", "FWT over all moments"),
    _points("forgetting_til", "Forgetting TIL", lower=True),
    _points("forgetting_cil", "Forgetting CIL", lower=True),
    _points("bwt_til", "BWT TIL"),
    _points("bwt_cil", "BWT CIL"),
    Measure("retention_skipped", "Tasks left out of retention", "count", 1.0, 0, None),
)

_LANGUAGE = (
    _nats("ce", "Cross-entropy, domain mean"),
    _nats("ce_tokens", "Cross-entropy, token mean"),
    _nats("ce_first", "Cross-entropy of the first domain"),
    _nats("ce_earlier", "Cross-entropy of all but the last domain"),
    _nats("ce_last", "Cross-entropy of the last domain"),
    _nats("learning_ce", "Cross-entropy when learned"),
    _nats("bwt_ce", "BWT", lower=False),
    _nats("fwt_ce", "FWT", lower=False),
    _nats("forgetting_ce", "Forgetting"),
    _nats("retention", "Own texts, above pretrained"),
    Measure("bits_per_byte", "Bits per byte", "bits a byte", 1.0, 3, True),
    _percent("answer_acc", "Right answers"),
    _percent("rouge_l", "ROUGE-L"),
    Measure("general_delta", "General abilities", "ratio", 1.0, 3, False),
    _plain("buffer_bytes", "Buffer, kB", "bytes", 1e-3, 1),
)

_COSTS = (
    _plain("sec_task", "Seconds per task", "seconds", 1.0, 1),
    _plain("sec_step", "ms per step", "seconds", 1000.0),
    _plain("s95_ref", "Seconds to 95 % of reference", "seconds", 1.0, 1),
    _plain("peak_mem", "Peak memory, MB", "bytes", 1e-6),
    _plain("state_bytes", "On disk, MB", "bytes", 1e-6, 2),
    _plain("params_trainable", "Trainable parameters", "count"),
    Measure("params_growth", "Growth %", lower_is_better=True),
    Measure("growth_per_task", "Growth per task %", lower_is_better=True),
    Measure("relative_size", "Size over that at the start", "ratio", 1.0, 3, True),
    _plain("e95_own", "Epochs to 95 % of own best", "epochs", 1.0, 1),
    _plain("e95_ref", "Epochs to 95 % of reference", "epochs", 1.0, 1),
    Measure("e95_reached", "Tasks that reach 95 % of reference, %"),
)

_CLASSIFIER_MEASURES = {one.name: one for one in (*_ACCURACIES, *_COSTS)}
_LANGUAGE_MEASURES = {one.name: one for one in (*_LANGUAGE, *_COSTS)}
_OF_A_DOMAIN = {"ce": "Cross-entropy", "bits_per_byte": "Bits per byte", "answer_acc": "Right answers"}


def measure(name: str, *, is_language: bool, domains: Sequence[str] = ()) -> Measure:
    """Return how a number is shown; a name without an entry is shown as it is.

    Args:
        name: of the number; `ce:0` is that of the first domain.
        is_language: whether it is one of language models: some names mean other things there.
        domains: names of the domains.
    """
    known = _LANGUAGE_MEASURES if is_language else _CLASSIFIER_MEASURES
    if name in known:
        return known[name]
    kind, _, task = name.partition(":")
    if kind in known and task.isdigit():
        of = known[kind]
        domain = domains[int(task)] if int(task) < len(domains) else f"domain {int(task) + 1}"
        heading = f"{_OF_A_DOMAIN.get(kind, of.heading)}, {domain}" + (" %" if of.unit == "fraction" else "")
        return Measure(name, heading, of.unit, of.scale, of.decimals, of.lower_is_better)
    return Measure(name, name, "ratio", 1.0, 4, None)
