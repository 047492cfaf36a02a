"""Our own figures: the files of benchmarks/results/, written by the commands that measured them, put into one form."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from everlora.experiments.schema_part import Part
from everlora.metrics import AccuracyMatrix

__all__ = ["HEADS", "Measured", "Result", "Row", "read_results"]

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
# The folder of what benchmarks/heads.py writes: a file, and a result, for each of its streams.
HEADS = "heads"
_RUN = "everlora run"


class Measured(Part):
    """One measurement that went into a result."""

    command: str
    date: str
    device: str
    versions: dict[str, str]
    recipe_sha256: str = ""
    commit: str | None = None


@dataclass
class Row:
    """A row of a result: figures by seed, options, values of method figures after the last task by name and seed."""

    label: str
    seeds: dict[str, dict[str, float]]
    options: dict[str, Any] = field(default_factory=dict)
    panels: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def numbers(self, figure: str) -> dict[int | None, float]:
        """One figure by seed, where it is defined."""
        return {int(seed): values[figure] for seed, values in self.seeds.items() if figure in values}


@dataclass
class Result:
    """A file of benchmarks/results/, or one stream of it."""

    name: str
    recipe: str
    setting: str
    model: str
    num_tasks: int
    is_language: bool
    measured: list[Measured]
    rows: dict[str, Row]
    claims: list[dict[str, str]] = field(default_factory=list)


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return every result of a recipe, and each stream of the comparison of heads as `heads/STREAM`.

    Files of other measurements are left alone.
    """
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("kind") == _RUN:
            results[path.stem] = _of_run(path.stem, content)
    for path in sorted((folder / HEADS).glob("*.json")):
        results |= _of_heads(json.loads(path.read_text(encoding="utf-8")))
    return results


def _of_run(name: str, content: Mapping[str, Any]) -> Result:
    rows = {
        key: Row(row["label"], row["seeds"], row["options"], row.get("after_last_task", {}))
        for key, row in content["rows"].items()
    }
    stream = content["stream"]
    return Result(
        name=name,
        recipe=content["recipe"],
        setting=content["setting"],
        model=content["model"],
        num_tasks=stream["num_tasks"],
        is_language=stream["scenario"] == "language",
        measured=[Measured.model_validate(entry) for entry in content["measured"]],
        rows=rows,
        claims=content["claims"],
    )


def _of_heads(content: Mapping[str, Any]) -> dict[str, Result]:
    """Rows are called `ROW/HEAD`, as measured on test rows with nothing but the recipe's own options."""
    found: dict[str, Result] = {}
    for run in content["runs"]:
        if run.get("validation") or run.get("options"):
            continue
        name = f"{HEADS}/{run['stream']}"
        result = found.setdefault(name, _empty(name, content, run))
        for head, correct in run["correct"].items():
            row = result.rows.setdefault(f"{run['row']}/{head}", Row(f"{run['row']}, {head} head", {}))
            row.seeds[str(run["seed"])] = dict(_figures(tuple(map(tuple, correct)), tuple(run["sizes"])))
    return found


def _empty(name: str, content: Mapping[str, Any], run: Mapping[str, Any]) -> Result:
    stream = str(run["stream"])
    measured = Measured(
        command=f"{content['command']} --streams {stream}",
        date=str(run["date"]),
        device=content["device"],
        versions=content["versions"],
    )
    setting = "heads-domains" if stream == "clinc150-domains" else "heads"
    return Result(name, "", setting, "", len(run["sizes"]), False, [measured], {})


@functools.cache
def _figures(correct: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> dict[str, float]:
    """Figures from counts; a run that learned all tasks at once has one row of them, its last."""
    counts = np.full((len(sizes), len(sizes)), math.nan)
    for place, row in enumerate(correct, start=len(sizes) - len(correct)):
        counts[place, : len(row)] = row
    summary = AccuracyMatrix.from_counts(counts, sizes).summary()
    return {name: float(value) for name, value in summary.items() if value is not None}
