"""Claims as rows of text: what was said, what was found, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from everlora.report.language import is_language, language_runs
from everlora.report.table import FormattedTable

__all__ = ["claims_caption", "format_claims"]


class _Unit(NamedTuple):
    """How a figure is called and printed."""

    words: str
    scale: float = 1.0
    decimals: int = 2
    unit: str = ""
    with_ratio: bool = False


_UNITS = {
    "til": _Unit("TIL accuracy", 100.0, 1, " %"),
    "cil": _Unit("CIL accuracy", 100.0, 1, " %"),
    "learning_acc": _Unit("accuracy when learned", 100.0, 1, " %"),
    "forgetting_til": _Unit("forgetting TIL", 100.0, 2, " points"),
    "bwt_til": _Unit("BWT TIL", 100.0, 2, " points"),
    "forgetting_cil": _Unit("forgetting CIL", 100.0, 2, " points"),
    "bwt_cil": _Unit("BWT CIL", 100.0, 2, " points"),
    "task_recognition": _Unit("tasks recognised", 100.0, 1, " %"),
    "params_growth": _Unit("growth", 100.0, 1, " %", True),
    "growth_per_task": _Unit("growth per task", 100.0, 2, " %", True),
    "e95_own": _Unit("epochs to 95 % of own best", 1.0, 2),
    "e95_ref": _Unit("epochs to 95 % of reference", 1.0, 2),
    "s95_ref": _Unit("seconds to 95 % of reference", 1.0, 1, " s"),
    "aulc": _Unit("mean accuracy over epochs", 100.0, 1, " %"),
    "sec_step": _Unit("step", 1000.0, 1, " ms", True),
    "sec_task": _Unit("time of a task", 1.0, 1, " s", True),
    "peak_mem": _Unit("peak memory", 1e-6, 0, " MB", True),
    "state_bytes": _Unit("on disk", 1e-6, 2, " MB", True),
    "ce": _Unit("mean cross-entropy", 1.0, 3, " nats"),
    "ce_first": _Unit("cross-entropy of the first domain", 1.0, 3, " nats"),
    "ce_earlier": _Unit("cross-entropy of all domains but the last", 1.0, 3, " nats"),
    "ce_last": _Unit("cross-entropy of the last domain", 1.0, 3, " nats"),
    "learning_ce": _Unit("cross-entropy when learned", 1.0, 3, " nats"),
    "bwt_ce": _Unit("BWT", 1.0, 3, " nats"),
    "fwt_ce": _Unit("FWT", 1.0, 3, " nats"),
    "forgetting_ce": _Unit("forgetting", 1.0, 3, " nats"),
    "retention": _Unit("own texts above the pretrained model", 1.0, 3, " nats", True),
    "bits_per_byte": _Unit("bits per byte", 1.0, 3),
    "buffer_bytes": _Unit("buffer", 1e-3, 1, " kB", True),
    "answer_acc": _Unit("right answers", 100.0, 1, " %"),
}


def format_claims(results: Mapping[str, Any], *, separator: str = "; ") -> FormattedTable:
    """Return one row for each claim of a run: id, claim, verdict, what was found, what its source's data say.

    Args:
        results: the content of `results.json`.
        separator: stands between several findings of one claim.
    """
    labels = _labels(results)
    rows = [
        [claim["id"], claim["claim"], claim["verdict"], _found(claim, labels, separator), claim["published"]]
        for claim in results.get("claims") or []
    ]
    columns = ["Claim", "What is claimed", "Verdict", "Found here", "Known of it"]
    if not any(row[-1] for row in rows):  # hypotheses of our own, of which no source says anything
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return FormattedTable(columns, rows)


def claims_caption(results: Mapping[str, Any]) -> str:
    """Return on what network, with how many runs and at what budget the claims were looked at."""
    settings, stream = results.get("settings") or {}, results["stream"]
    options: Mapping[str, Any] = next((run["options"] for run in results["runs"] if run.get("options")), {})
    seeds = len(results.get("seeds") or [])
    words = [
        f"network {results.get('model')}",
        f"setting {settings.get('setting')}",
        _counted(stream["num_tasks"], "task"),
        _length(options),
        _counted(seeds, "seed"),
    ]
    return (
        f"Measured with {', '.join(word for word in words if word)}; differences seed by seed with a 95 % interval. "
        "Nothing is said of other networks or budgets"
    )


def _labels(results: Mapping[str, Any]) -> dict[str, str]:
    """What each row is called, a row's name alone standing for the weights it usually has."""
    if not is_language(results):
        return {run["method"]: str(run.get("label") or run["method"]) for run in results.get("runs") or []}
    runs = language_runs(results)
    return {run.row: run.label for run in runs if run.is_usual} | {run.key: run.label for run in runs}


def _length(options: Mapping[str, Any]) -> str:
    """How long a task is trained."""
    if options.get("max_steps") is not None:
        return f"{_counted(options['max_steps'], 'step')} a task"
    return f"{_counted(options['epochs'], 'epoch')} a task" if "epochs" in options else ""


def _found(claim: Mapping[str, Any], labels: Mapping[str, str], separator: str) -> str:
    parts = [_finding(finding, claim, labels) for finding in claim["findings"] if finding["n"]]
    left_out = [f"not run: {', '.join(claim['left_out'])}"] if claim.get("left_out") else []
    return separator.join([*parts, *left_out, *([claim["reason"]] if claim["reason"] else [])])


def _finding(finding: Mapping[str, Any], claim: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    if "pretrained_unchanged" in finding:
        count = finding["n"]
        return (
            f"pretrained tensors unchanged in {finding['pretrained_unchanged']} of {count} runs, "
            f"those of earlier tasks in {finding['tasks_unchanged']}"
        )
    unit = _UNITS[finding["figure"]]
    names = {"row": claim["row"], "against": finding.get("other") or claim["against"]}
    means = [f"{labels.get(names[side], names[side])} {_value(finding[side]['mean'], unit)}" for side in _SIDES]
    difference = f"difference {_number(finding['difference'], unit)}"
    if finding["low"] is not None:
        difference += f" [{_number(finding['low'], unit)}, {_number(finding['high'], unit)}]"
    words = f"{unit.words}: {' and '.join(means)}{unit.unit}, {difference}"
    if unit.with_ratio and finding["ratio"] is not None:
        words += f", ratio {finding['ratio']:.2f}"
    return words if finding["decides"] else f"{words} (not decisive)"


_SIDES = ("row", "against")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _value(value: float, unit: _Unit) -> str:
    return f"{unit.scale * value:,.{unit.decimals}f}"


def _number(value: float, unit: _Unit) -> str:
    """A signed difference; adding zero turns a rounded -0.0 into 0.0."""
    return f"{round(unit.scale * value, unit.decimals) + 0.0:+,.{unit.decimals}f}"
