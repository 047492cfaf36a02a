"""What came out of a sweep: the value of every setting, the best of each row, and what to make of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everlora.errors import OptionError
from everlora.experiments.plan import method_row
from everlora.metrics import mean_and_deviation
from everlora.sweep.plan import SweepPlan, Trial
from everlora.sweep.space import Range, Space
from everlora.sweep.trial import read_outcome

__all__ = ["collect", "set_words"]


def collect(plan: SweepPlan, space: Space, out: Path) -> dict[str, Any]:
    """Read the outcome of all trials and choose the best of each row.

    Args:
        plan: of the sweep.
        space: what was to be tried, for words on the edges.
        out: folder of the sweep.

    Returns:
        `trials`, in order: `name`, `row`, `label`, `options`, `values` by seed, `mean`, `deviation`, `seconds`,
        `error`; and `best`, by row: the name of the trial, its `options`, `mean` and `deviation`, the words `set` for
        `everlora run`, the names of `ties`, and `edges`, sentences on values at the end of what was tried. A row
        without any value has no entry there.

    Raises:
        OptionError: no trial has a value.
    """
    trials = [_entry(plan, trial, out) for trial in plan.trials]
    if all(entry["mean"] is None for entry in trials):
        reason = next((entry["error"] for entry in trials if entry["error"]), "nothing was tried")
        raise OptionError(f"No setting of the sweep could be judged; the first: {str(reason).rstrip('.')}.")
    best = {}
    for row in dict.fromkeys(entry["row"] for entry in trials):
        mine = [entry for entry in trials if entry["row"] == row and entry["mean"] is not None]
        if mine:
            best[row] = _best(mine, space, is_lower_better=plan.is_language)
    return {"trials": trials, "best": best}


def set_words(options: Mapping[str, Any]) -> str:
    """Options as `everlora run` takes them: `--set lr=0.003 --set rank=8`."""
    return " ".join(f"--set {_quoted(f'{key}={_word(value)}')}" for key, value in options.items())


def _entry(plan: SweepPlan, trial: Trial, out: Path) -> dict[str, Any]:
    outcomes = {seed: read_outcome(out, trial, seed) for seed in plan.plan.seeds}
    known = {seed: outcome for seed, outcome in outcomes.items() if outcome is not None}
    values = {str(seed): outcome["value"] for seed, outcome in known.items() if outcome["value"] is not None}
    # A mean over fewer seeds than the others have is not comparable: one that failed leaves the setting without.
    is_whole = len(values) == len(plan.plan.seeds)
    mean, deviation = mean_and_deviation(list(values.values())) if is_whole else (None, None)
    return {
        "name": trial.name,
        "row": trial.row,
        "label": method_row(plan.plan.recipe, trial.row).label or trial.row,
        "options": dict(trial.options),
        "values": values,
        "mean": mean,
        "deviation": deviation,
        "seconds": math.fsum(outcome["seconds"] for outcome in known.values()),
        "error": next((outcome["error"] for outcome in known.values() if outcome["error"]), None),
    }


def _best(entries: Sequence[Mapping[str, Any]], space: Space, *, is_lower_better: bool) -> dict[str, Any]:
    """The best mean; of equal ones the first that was to be tried."""
    sign = -1 if is_lower_better else 1
    chosen = max(entries, key=lambda entry: sign * entry["mean"])
    equal = [entry for entry in entries if entry["mean"] == chosen["mean"]]
    ties = [entry["name"] for entry in equal if entry is not chosen]
    # Where another value did as well, nothing points beyond the end.
    settled = {key: value for key, value in chosen["options"].items() if all(_has(one, key, value) for one in equal)}
    edges = [_edge(key, value, space.get(key)) for key, value in settled.items()]
    return {
        "trial": chosen["name"],
        "label": chosen["label"],
        "options": chosen["options"],
        "mean": chosen["mean"],
        "deviation": chosen["deviation"],
        "set": set_words(chosen["options"]),
        "ties": ties,
        "edges": [words for words in edges if words is not None],
    }


def _has(entry: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in entry["options"] and bool(entry["options"][key] == value)


def _edge(key: str, value: Any, tried: tuple[Any, ...] | Range | None) -> str | None:
    """Say it when a number is the smallest or the largest of those tried: the best may lie beyond."""
    if isinstance(tried, Range):
        side = tried.edge(value)
        where = f"lies at the end of {tried}"
    else:
        numbers = [one for one in tried or () if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(numbers) < 2 or value not in numbers or isinstance(value, bool):
            return None
        side = "smallest" if value == min(numbers) else "largest" if value == max(numbers) else None
        where = f"is the {side} that was tried"
    return None if side is None else f"{key}={_word(value)} {where}: try {side.removesuffix('st')}r ones too"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(word: str) -> str:
    """For a shell, where it has signs that mean something to one."""
    return (
        word if all(sign.isalnum() or sign in "_-=.+:/@%," for sign in word) else "'" + word.replace("'", "'\\''") + "'"
    )
