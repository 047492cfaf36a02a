"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

import everlora
from everlora.export.layout import Layout
from everlora.export.lineage import base_on_hub, facts_table, licence_of, lineage_sections

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
        card: what the learner says of itself, see `Learner.card`: `method`, `scenario`, `base_model`, `base_sha256`,
            `changed_options`, `versions`, and `tasks`, a list of mappings with `name`, `labels`, what was recorded of
            them and their figures; all optional, as are `name` and `datasets`, names of data sets on the hub.
        max_difference: largest difference of a logit from the learner's on the probe batch.
        truncation: relative error of each layer's update whose rank was cut.

    Returns:
        Markdown.
    """
    licence = licence_of(layout.backbone.folder)
    parts = [
        _front_matter(layout, card, licence),
        f"# {card.get('name') or 'A model taught in tasks'}",
        layout.summary(),
    ]
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
    parts += [*layout.sections(), *lineage_sections(card, licence)]
    return "\n\n".join(parts) + "\n"


def _front_matter(layout: Layout, card: Mapping[str, Any], licence: str | None) -> str:
    """What the hub reads: valid YAML between two lines."""
    base = base_on_hub(card, layout.base)
    values: dict[str, Any] = {
        "library_name": layout.library if layout.base is None else "peft",
        "pipeline_tag": layout.pipeline_tag,
        "tags": ["everlora", "continual-learning", *([str(card["method"])] if card.get("method") else [])],
    }
    if base is not None:
        values |= {"base_model": base, "base_model_relation": "finetune" if layout.base is None else "adapter"}
    if licence is not None:
        values["license"] = licence
    if card.get("datasets"):
        values["datasets"] = [str(name) for name in card["datasets"]]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _facts(layout: Layout, card: Mapping[str, Any], max_difference: float | None) -> str:
    rows = [(title, card[key]) for title, key in _FACTS if card.get(key) is not None]
    rows += layout.facts()
    rows += [("Made with", f"everlora {everlora.__version__}, {layout.made_with}")]
    if card.get("versions"):
        rows += [("Learner begun with", ", ".join(f"{name} {version}" for name, version in card["versions"].items()))]
    if max_difference is not None:
        rows += [("Largest difference of a logit from the learner's, on a probe batch", f"{max_difference:.2g}")]
    return facts_table(rows)
