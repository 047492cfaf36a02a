"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import everlora
from everlora.export.layout import Layout

__all__ = ["write_card"]

_FACTS = (("Method", "method"), ("Scenario", "scenario"), ("Base model", "base_model"), ("Base sha256", "base_sha256"))


def write_card(
    layout: Layout,
    card: Mapping[str, Any],
    *,
    max_difference: float | None,
    truncation: Mapping[str, float] | None = None,
) -> str:
    """Compose the README of an export.

    Args:
        layout: what was written, and the code that loads it.
        card: what the learner says of itself: `method`, `scenario`, `base_model`, `base_sha256`, and `tasks`, a list
            of mappings with `name` and `labels`; all optional.
        max_difference: largest difference of a logit from the learner's on the probe batch.
        truncation: relative error of each layer's update whose rank was cut.

    Returns:
        Markdown.
    """
    parts = [_front_matter(layout), f"# {card.get('name') or 'A model taught in tasks'}", layout.summary()]
    parts += [_facts(layout, card, max_difference)]
    if truncation:
        parts += [
            f"The update of {len(truncation)} layers was cut to a lower rank, with a relative Frobenius error of at "
            f"most {max(truncation.values()):.3g}: the logits are not exactly the learner's."
        ]
    parts += ["## How to load it", layout.requirements(), f"```python\n{layout.code()}\n```"]
    pipeline = layout.pipeline_code()
    if pipeline is not None:
        parts += ["The same through a pipeline, which turns the logits into probabilities:"]
        parts += [f"```python\n{pipeline}\n```"]
    parts += [*layout.sections(), *_tasks(card.get("tasks") or ())]
    return "\n\n".join(parts) + "\n"


def _front_matter(layout: Layout) -> str:
    library = layout.library if layout.base is None else "peft"
    tags = "\n".join(["tags:", "- everlora", "- continual-learning"])
    return f"---\nlibrary_name: {library}\npipeline_tag: {layout.pipeline_tag}\n{tags}\n---"


def _facts(layout: Layout, card: Mapping[str, Any], max_difference: float | None) -> str:
    rows = [(title, card[key]) for title, key in _FACTS if card.get(key) is not None]
    rows += layout.facts()
    rows += [("Made with", f"everlora {everlora.__version__}, {layout.made_with}")]
    if max_difference is not None:
        rows += [("Largest difference of a logit from the learner's, on a probe batch", f"{max_difference:.2g}")]
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {_cell(value)} |" for title, value in rows)])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tasks:
        return []
    title = "## Tasks, in the order they were learned"
    names = [_cell(task.get("name", "")) for task in tasks]
    counts = [len(task.get("labels") or ()) for task in tasks]
    if not any(counts):
        return [
            title,
            "\n".join(["| | Task |", "|---|---|", *(f"| {i + 1} | {name} |" for i, name in enumerate(names))]),
        ]
    rows = [f"| {i + 1} | {name} | {count} |" for i, (name, count) in enumerate(zip(names, counts, strict=True))]
    return [title, "\n".join(["| | Task | Labels |", "|---|---|---|", *rows])]
