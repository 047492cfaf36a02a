"""The model card of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

import everlora
from everlora.export.snippet import Snippet

__all__ = ["write_card"]

_FACTS = (("Method", "method"), ("Scenario", "scenario"), ("Base model", "base_model"), ("Base sha256", "base_sha256"))


def write_card(
    snippet: Snippet,
    card: Mapping[str, Any],
    *,
    max_difference: float | None,
    truncation: Mapping[str, float] | None = None,
) -> str:
    """Compose the README of an export.

    Args:
        snippet: the code that loads it.
        card: what the learner says of itself: `method`, `scenario`, `base_model`, `base_sha256`, and `tasks`, a list
            of mappings with `name` and `labels`; all optional.
        max_difference: largest difference of a logit from the learner's on the probe batch.
        truncation: relative error of each layer's update whose rank was cut.

    Returns:
        Markdown.
    """
    major = transformers.__version__.split(".")[0]
    parts = [_front_matter(snippet), f"# {card.get('name') or 'A model taught in tasks'}", _summary(snippet)]
    parts += [_facts(snippet, card, major, max_difference)]
    if truncation:
        parts += [
            f"The update of {len(truncation)} layers was cut to a lower rank, with a relative Frobenius error of at "
            f"most {max(truncation.values()):.3g}: the logits are not exactly the learner's."
        ]
    parts += ["## How to load it", _requirements(snippet, major), f"```python\n{snippet.code()}\n```"]
    if snippet.classifier is not None:
        parts += ["The same through a pipeline, which turns the logits into probabilities:"]
        parts += [f"```python\n{snippet.pipeline_code()}\n```"]
    parts += ["## Labels", _labels(snippet.head.classes), *_tasks(card.get("tasks") or ())]
    return "\n\n".join(parts) + "\n"


def _front_matter(snippet: Snippet) -> str:
    library = "transformers" if snippet.base is None else "peft"
    task = "image-classification" if snippet.backbone.modality == "image" else "text-classification"
    tags = "\n".join(["tags:", "- everlora", "- continual-learning"])
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\n{tags}\n---"


def _summary(snippet: Snippet) -> str:
    if snippet.base is not None:
        return "A LoRA adapter for PEFT, with its classifier beside it in `head.safetensors` and `head.json`."
    if snippet.classifier is not None:
        return f"Encoder and classifier in one `{snippet.classifier}`, the adapters merged into the weights."
    name = type(snippet.backbone.model).__name__
    return (
        f"A plain `{name}` with the adapters merged into its weights; the classifier lies beside it in "
        "`head.safetensors` and `head.json`."
    )


def _facts(snippet: Snippet, card: Mapping[str, Any], major: str, max_difference: float | None) -> str:
    rows = [(title, card[key]) for title, key in _FACTS if card.get(key) is not None]
    rows += [("Pooling", snippet.backbone.pooling), ("Classes", len(snippet.head.classes))]
    rows += [("Made with", f"everlora {everlora.__version__}, transformers {major}")]
    if max_difference is not None:
        rows += [("Largest difference of a logit from the learner's, on a probe batch", f"{max_difference:.2g}")]
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {_cell(value)} |" for title, value in rows)])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _requirements(snippet: Snippet, major: str) -> str:
    names = f"transformers {major} (names of layers differ between major versions)"
    extra = " and peft" if snippet.base is not None else ""
    return f"Needs torch, {names}{extra}; run it in this folder."


def _labels(labels: Sequence[str]) -> str:
    # As JSON strings, so that no label can break out of the block or span lines.
    return "\n".join(
        ["```text", *(json.dumps(label, ensure_ascii=False).replace("`", "\\u0060") for label in labels), "```"]
    )


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    if not tasks:
        return []
    rows = [
        f"| {i + 1} | {_cell(task.get('name', ''))} | {len(task.get('labels', ()))} |" for i, task in enumerate(tasks)
    ]
    return ["## Tasks, in the order they were learned", "\n".join(["| | Task | Labels |", "|---|---|---|", *rows])]
