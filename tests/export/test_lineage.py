"""The card of an export: what the hub reads of it, and where the model comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from everlora import Learner
from everlora.export.lineage import base_on_hub, licence_of, lineage_of, lineage_sections
from tests.experiments.conftest import coloured, network  # noqa: F401  a fixture
from tests.test_language_learner import FAST, SUMS

COST = {"seconds": {"total": 60.25}, "steps": 1000, "peak_memory_bytes": 2_000_000, "trainable_parameters": 10}
TASK = {
    "name": "a | b",
    "labels": ["x", "y"],
    "num_examples": 40,
    "data_sha256": "ab" * 32,
    "cost": COST,
    "environment": {"device": "cpu"},
    "accuracy_when_learned": 0.9,
    "accuracy_now": 0.75,
}
CARD: dict[str, Any] = {"method": "inflora", "changed_options": {"method.rank": 3}, "tasks": [TASK]}


def test_a_card_says_what_was_learned_how_well_and_at_what_cost() -> None:
    text = "\n\n".join(lineage_sections(CARD, "mit"))
    for line in (
        "| 1 | a \\| b | 2 | 40 | `abababababababab` |",
        "| a \\| b | 90.00 | 75.00 |",
        "| `method.rank` | `3` |",
        "| Seconds, all tasks | 60.2 |",
        "| Optimiser steps, all tasks | 1,000 |",
        "| Peak memory, MB | 2 |",
        "| Device | cpu |",
        "names the licence `mit`",
    ):
        assert line in text, line


def test_a_card_without_figures_says_so() -> None:
    task = {key: value for key, value in TASK.items() if not key.startswith("accuracy")}
    text = "\n\n".join(lineage_sections({"method": "ncm", "changed_options": {}, "tasks": [task]}, None))
    assert "No rows were kept back from training" in text and "with its default options" in text
    assert "none is named" in text


def test_a_language_model_has_nats() -> None:
    task = {"name": "plays", "num_examples": 3, "cross_entropy_when_learned": 2.5, "cross_entropy_now": 3.0}
    text = "\n\n".join(lineage_sections({"tasks": [task]}, None))
    assert "| plays | 2.5000 | 3.0000 |" in text and "Nats a token" in text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("packaged", None),
        ("shared:stories", None),
        ("/models/mine", None),
        ("own er/na\nme", None),
        ("", None),
    ],
)
def test_only_a_name_on_the_hub_is_given_to_the_hub(name: str, found: str | None) -> None:
    assert base_on_hub({"base_model": name}, None) == found


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    for text, found in (
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\n- 1\n---", None),
        ("---\n: : :\n---\n", None),
        ("# no front matter", None),
        ("---\nlicense: [a, b]\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == found


def test_lineage_keeps_whole_fingerprints_and_is_plain() -> None:
    lineage = json.loads(json.dumps(lineage_of({**CARD, "base_sha256": "0" * 64, "panels": object()})))
    assert lineage["tasks"][0]["data_sha256"] == "ab" * 32 and lineage["base_sha256"] == "0" * 64
    assert "panels" not in lineage


def check(folder: Path, learner: Learner, library: str) -> str:
    """Load a card as the hub does; return its text."""
    card = ModelCard.load(folder / "README.md")
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert card.data.to_dict() == front
    assert front["library_name"] == library and {"everlora", "continual-learning"} <= set(front["tags"])
    lineage = json.loads((folder / "export.json").read_text())["lineage"]
    recorded = learner.card()["tasks"]
    assert [task["data_sha256"] for task in lineage["tasks"]] == [task["data_sha256"] for task in recorded]
    for task in recorded:
        assert f"| {task['name']} |" in text and task["data_sha256"][:16] in text
    assert learner.card()["base_sha256"] in text and "## Cost" in text and "## Licence" in text
    return text


@pytest.mark.slow
def test_both_exports_of_a_classifier_carry_their_lineage(tmp_path: Path, network: Path) -> None:  # noqa: F811
    options: dict[str, Any] = {"rank": 2, "epochs": 1, "batch_size": 10, "augment": "none", "keep_validation": 2}
    learner = Learner.create(tmp_path / "mine", model=network, method="inflora", **options)
    rows = coloured(10, seed=1)
    for names in ("amber blue", "cyan denim"):
        learner.learn(rows.select([i for i in range(len(rows)) if rows.labels[i] in names]), name=names.split()[0])
    for form, library in (("merged", "transformers"), ("peft", "peft")):
        learner.export(tmp_path / form, format=form)
        text = check(tmp_path / form, learner, library)
        assert "| `method.rank` | `2` |" in text and "Accuracy % when learned" in text


@pytest.mark.slow
def test_adapters_of_a_language_model_carry_their_lineage(tmp_path: Path, shared: Path) -> None:
    learner = Learner.create(
        tmp_path / "mine", model=shared / "models" / "stories260K", method="sequential", **FAST | {"epochs": 1}
    )
    learner.learn(SUMS, name="sums")
    learner.export(tmp_path / "out", format="peft")
    assert "No rows were kept back" in check(tmp_path / "out", learner, "peft")
