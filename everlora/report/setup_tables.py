"""How a run was set up: every option as it was resolved, and the commits of the code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from everlora.report.table import UNDEFINED, FormattedTable

__all__ = ["commit_rows", "resolved_options"]

_COMMITS = {"everlora": "commit of everlora", "working folder": "commit of the working folder"}


def resolved_options(runs: Sequence[Mapping[str, Any]]) -> tuple[FormattedTable | None, FormattedTable | None]:
    """Return the options that all rows share, and those in which rows differ, a column for each row.

    Of each row the first run speaks, and its seed is left out: it differs between runs. Runs that recorded only what
    their learner was given have no more to show.

    Args:
        runs: entries of `runs` in `results.json`.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        first.setdefault(str(run["method"]), run)
    labels = [str(run.get("label") or name) for name, run in first.items()]
    columns = {
        label if labels.count(label) == 1 else f"{label} ({name})": _flat(run)
        for label, (name, run) in zip(labels, first.items(), strict=True)
    }
    names = list(dict.fromkeys(name for options in columns.values() for name in options if name != "training.seed"))
    shared, differing = [], []
    for name in names:
        cells = [_text(options[name]) if name in options else UNDEFINED for options in columns.values()]
        if len(columns) > 1 and len(set(cells)) == 1:
            shared.append([name, cells[0]])
        else:
            differing.append([name, *cells])
    return (
        FormattedTable(["Option", "Value"], shared) if shared else None,
        FormattedTable(["Option", *columns], differing) if differing else None,
    )


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """Options by group and name, or by name alone where only those that were given are known."""
    resolved = run.get("resolved")
    if not resolved:
        return dict(run.get("options") or {})
    return {f"{group}.{name}": value for group, options in resolved.items() for name, value in options.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def commit_rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the commits as rows of the table of versions; none where no repository was found."""
    return [(_COMMITS.get(name, name), str(commit)) for name, commit in (results.get("commits") or {}).items()]
