"""The tables of `docs/how-to/none-of-these.md`, from what `none_of_these.py` measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results" / "none-of-these.json"
PAGE = _ROOT / "docs" / "how-to" / "none-of-these.md"
_SHARE = "0.05"
_KINDS = ("intents", "domains", "news")


_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def read(path: Path = RESULTS) -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def filled(text: str, results: dict[str, Any]) -> str:
    """The page with what stands between its marks `<!-- figures: NAME -->` and `<!-- end -->` made anew."""
    blocks = {
        "choice": (choice_table, "choice"),
        "refused": (refused_table, "rows"),
        "caught": (caught_table, "rows"),
        "run": (sentence, "rows"),
    }

    def block(found: re.Match[str]) -> str:
        make, part = blocks[found[2]]
        return found[1] + (make(results) if part in results else "*Not measured yet.*") + found[3]

    return _BLOCK.sub(block, text)


def chosen(results: dict[str, Any]) -> str:
    """The confidence that catches most unknown rows, in the mean over rows of the table and seeds."""
    figures = _choice(results)
    return max(figures, key=lambda name: mean(mean(row) for row in figures[name]["caught"].values()))


def _choice(results: dict[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By candidate, figure and row: the values of the seeds."""
    rows = results["choice"]
    names = next(iter(next(iter(rows.values())).values()))
    return {
        name: {
            figure: {row: [seed[name][figure] for seed in seeds.values()] for row, seeds in rows.items()}
            for figure in ("auroc", "caught")
        }
        for name in names
    }


def choice_table(results: dict[str, Any]) -> str:
    """Candidates by the share of unknown rows that they catch, and the AUROC of each row."""
    figures, rows = _choice(results), list(results["choice"])
    order = sorted(figures, key=lambda name: -mean(mean(row) for row in figures[name]["caught"].values()))
    head = ["confidence", "caught %", "AUROC", *rows]
    lines = []
    for name in order:
        by_row = [mean(figures[name]["auroc"][row]) for row in rows]
        caught = mean(mean(row) for row in figures[name]["caught"].values())
        lines.append([f"`{name}`", f"{100 * caught:.1f}", *(f"{value:.3f}" for value in (mean(by_row), *by_row))])
    return _table(head, lines)


def refused_table(results: dict[str, Any]) -> str:
    """What becomes of rows of known classes."""
    head = ["method, head", "refused %", "least and most after a task", "accuracy %", "of those answered", "right"]
    lines = []
    for name, seeds in results["rows"].items():
        after = [share for seed in seeds.values() for share in seed["after_each_task"]]
        parts = [_percent([seed[key] for seed in seeds.values()]) for key in ("accuracy", "accuracy_answered")]
        right = _percent([seed["right_and_answered"] for seed in seeds.values()])
        refused = _percent([seed["refused"][_SHARE] for seed in seeds.values()])
        lines.append([name, refused, f"{100 * min(after):.1f} to {100 * max(after):.1f}", *parts, right])
    return _table(head, lines)


def caught_table(results: dict[str, Any]) -> str:
    """What becomes of rows of unknown classes."""
    head = ["method, head", "other intents", "AUROC", "other domains", "AUROC", "news", "AUROC"]
    lines = []
    for name, seeds in results["rows"].items():
        cells = [name]
        for kind in _KINDS:
            cells.append(_percent([seed["caught"][kind][_SHARE] for seed in seeds.values()]))
            cells.append(f"{mean(seed['auroc'][kind] for seed in seeds.values()):.3f}")
        lines.append(cells)
    return _table(head, lines)


def sentence(results: dict[str, Any]) -> str:
    """How the figures were made."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seeds = ", ".join(next(iter(results["rows"].values())))
    return (
        f"`{results['command']}`, {results['date']}, {results['device']} ({results['processor']}), {versions}, seeds "
        f"{seeds}. The confidence that catches most of the pseudo-unknown rows is `{chosen(results)}`."
    )


def _percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
