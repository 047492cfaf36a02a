"""Where a model comes from, as parts of its card: base, data, method, figures, cost and licence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["base_on_hub", "cell", "facts_table", "licence_of", "lineage_of", "lineage_sections"]

Card = Mapping[str, Any]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_SHOWN_LETTERS = 16
_LINEAGE = ("base_model", "base_sha256", "method", "scenario", "changed_options", "versions", "created")
_OF_TASK = ("name", "labels", "num_examples", "num_validation", "data_sha256", "cost")


def base_on_hub(card: Card, location: str | None) -> str | None:
    """Return the hub's name of the base model, None where it has none: a folder, or what comes with a package.

    Args:
        card: what the learner says of itself.
        location: where an adapter finds its base.
    """
    name = str(card.get("base_model") or location or "")
    is_local = name == "packaged" or ":" in name or Path(name).exists()
    return name if not is_local and _REPOSITORY.fullmatch(name) else None


def licence_of(folder: Path) -> str | None:
    """Return the licence that the base model's own card names, None where it names none."""
    file = folder / "README.md"
    match = _FRONT_MATTER.match(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    try:
        known = yaml.safe_load(match[1]) if match is not None else None
    except yaml.YAMLError:
        return None
    licence = known.get("license") if isinstance(known, dict) else None
    return licence if isinstance(licence, str) else None


def lineage_of(card: Card) -> dict[str, Any]:
    """Return the lineage as plain values, whole fingerprints included, for `export.json`."""
    tasks = [{key: task[key] for key in _OF_TASK if key in task} for task in card.get("tasks") or ()]
    return {**{key: card[key] for key in _LINEAGE if key in card}, "tasks": tasks}


def lineage_sections(card: Card, licence: str | None) -> list[str]:
    """Return the parts of a card, in Markdown, that say what the model was taught, how, how well and at what cost."""
    tasks: Sequence[Card] = card.get("tasks") or ()
    parts = [*_tasks(tasks), *_figures(tasks), *_method(card), *_cost(tasks)]
    said = (
        f"The base model's card names the licence `{licence}`." if licence else "Beside the base model none is named."
    )
    return [*parts, f"## Licence\n\nThe licence of the base model holds for this one, too. {said}"]


def _tasks(tasks: Sequence[Card]) -> list[str]:
    if not tasks:
        return []
    columns: dict[str, list[Any]] = {"Task": [task.get("name", "") for task in tasks]}
    if any(task.get("labels") for task in tasks):
        columns["Labels"] = [len(task.get("labels") or ()) for task in tasks]
    columns["Rows"] = [task.get("num_examples") for task in tasks]
    columns["Data, sha256"] = [_start(task.get("data_sha256")) for task in tasks]
    known = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    rows = [[i + 1, *row] for i, row in enumerate(zip(*known.values(), strict=True))]
    return ["## Tasks, in the order they were learned", _table(["", *known], rows)]


def _figures(tasks: Sequence[Card]) -> list[str]:
    """How well each task is known at the end, on the rows that were kept back."""
    if not any("num_examples" in task for task in tasks):
        return []
    for name, scale, heading in (("accuracy", 100.0, "Accuracy %"), ("cross_entropy", 1.0, "Nats a token")):
        pairs = [(task.get(f"{name}_when_learned"), task.get(f"{name}_now")) for task in tasks]
        if any(now is not None for _, now in pairs):
            places = 2 if scale > 1 else 4
            rows = [
                [task.get("name", ""), *("" if value is None else f"{scale * value:.{places}f}" for value in pair)]
                for task, pair in zip(tasks, pairs, strict=True)
            ]
            said = "On rows that were kept back from training: of each task right after it was learned, and at the end."
            return ["## Figures", said, _table(["Task", f"{heading} when learned", "At the end"], rows)]
    return ["## Figures", "No rows were kept back from training, so there are none; measure it before you rely on it."]


def _method(card: Card) -> list[str]:
    if "changed_options" not in card:
        return []
    changed: Card = card["changed_options"]
    said = f"Method `{card.get('method')}`"
    if not changed:
        return ["## Training", f"{said} with its default options."]
    rows = [[f"`{name}`", f"`{value}`"] for name, value in changed.items()]
    return ["## Training", f"{said}; options that differ from its defaults:", _table(["Option", "Value"], rows)]


def _cost(tasks: Sequence[Card]) -> list[str]:
    costs = [task["cost"] for task in tasks if isinstance(task.get("cost"), Mapping)]
    if not costs:
        return []
    seconds = [cost["seconds"] for cost in costs if "seconds" in cost]
    total = sum(float(one["total"] if isinstance(one, Mapping) else one) for one in seconds)
    peak = max((int(cost["peak_memory_bytes"]) for cost in costs if "peak_memory_bytes" in cost), default=0)
    trained = max((int(cost["trainable_parameters"]) for cost in costs if "trainable_parameters" in cost), default=0)
    rows: list[list[Any]] = [
        ["Seconds, all tasks", f"{total:.1f}"],
        ["Optimiser steps, all tasks", f"{sum(int(cost.get('steps', 0)) for cost in costs):,}"],
        ["Peak memory, MB", f"{peak / 1e6:,.0f}"],
        ["Parameters trained at a time", f"{trained:,}"],
    ]
    if "stored_parameters" in costs[-1]:
        rows.append(["Parameters needed to predict", f"{int(costs[-1]['stored_parameters']):,}"])
    places = list(dict.fromkeys(str((task.get("environment") or {}).get("device")) for task in tasks))
    return ["## Cost", _table(["What", "How much"], [*rows, ["Device", ", ".join(places)]])]


def facts_table(rows: Sequence[tuple[str, Any]]) -> str:
    """Return a Markdown table of names and values, without headings."""
    return _table(["", ""], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "| " + " | ".join(columns) + " |" if any(columns) else "| " + " | ".join(columns).strip() + " |"
    lines = [head.replace("|  |", "| |"), "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(cell(value) for value in row) + " |" for row in rows)])


def cell(value: Any) -> str:
    """A value as the text of a cell, on one line and without an end of the cell in it."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")


def _start(digest: Any) -> str | None:
    return None if digest is None else f"`{str(digest)[:_SHOWN_LETTERS]}`"
