"""A task that is cut off anywhere, and gone on with by a new learner, ends with the bits of one that was not."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from everlora import Learner
from everlora.errors import NumericError, OptionError, UnsupportedError
from everlora.methods.base import Loss
from everlora.store import LearnerStore
from everlora.streams import Examples, concatenate
from everlora.training import Interval
from everlora.training.epochs import Epochs
from tests.methods.conv_builders import save_resnet
from tests.methods.test_contract import LANGUAGE_ROWS, ROWS
from tests.toy import tiny_model, toy_images, toy_learner, toy_tasks, toy_texts
from tests.training.builders import Bench, language_rows, save_language_model
from tests.training.courses import Course

RESNET_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("sequential", {"bn": "shared"}),
    ("replay", {"size": 10, "insert": "online"}),
    ("lwf", {"warmup_epochs": 1}),
    ("ewc", {}),
    ("inflora", {}),
    ("sd_lora", {}),
    ("o_lora", {}),
    ("convlora", {"bn_recalibrate": True}),
    ("senacnn", {}),
    ("independent", {"norm": "adabn"}),
    ("packnet", {}),
    ("pnn", {}),
]
MORE_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("replay", {"size": 10, "insert": "online", "balanced": True}),
    ("sequential", {"keep_validation": 4, "keep_best": True, "lr_schedule": "cosine", "schedule_per": "step"}),
    ("sequential", {"micro_batches": 3, "optimizer": "sgd", "warmup_steps": 3, "clip_norm": 1.0}),
    ("inflora", {"micro_batches": 2, "optimizer": "adamw", "max_steps": 8, "drop_last": True, "batch_size": 5}),
    ("inflora", {"second_pass": False, "stats_max_batches": 2, "forward_mode": "factored"}),
    ("inflora", {"augment": "crop_flip", "scenario": "domain_incremental"}),
    ("sd_lora_kd", {"scope": "module", "scenario": "task_incremental"}),
    ("packnet", {"prune": 0.5, "epochs": 3, "keep_best": True, "keep_validation": 4}),
    ("ewc", {"fisher": "batch", "gamma": 0.5, "fisher_samples": 10}),
    ("convlora", {"select": "energy", "keep_validation": 4}),
]
# the fast tests have one row of each kind of in-task memory; the slow ones have all
QUICK = [
    ("inflora", {}, "vit"),
    ("ncm", {}, "vit"),
    ("joint", {}, "bert"),
    ("replay", {"size": 10, "insert": "online"}, "bert"),
    ("lwf", {"warmup_epochs": 1}, "resnet"),
    ("packnet", {"prune": 0.5, "epochs": 3, "keep_best": True, "keep_validation": 4}, "vit"),
    ("ewc", {"fisher_samples": 20}, "vit"),
    ("i_lora", {"selective_update": True, "buffer_insert": "online", "ilora_buffer_size": 6}, "language"),
]
SLOW = [
    *[(name, options, kind) for name, options in ROWS for kind in ("vit", "bert")],
    *[(name, options, "resnet") for name, options in RESNET_ROWS],
    *[(name, options, "vit") for name, options in MORE_ROWS],
    *[(name, options, "language") for name, options in LANGUAGE_ROWS],
    ("i_lora", {"reset_optimizer": False, "buffer_insert": "every_step", "micro_batches": 2}, "language"),
    ("i_lora", {"ema_update": "task_end", "lora_dropout": 0.2, "packing": True, "keep_validation": 2}, "language"),
    ("replay", {"insert": "online", "size": 5, "checkpoint_gradients": True, "max_steps": 5}, "language"),
]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("vit", "bert")}
    folders["resnet"] = save_resnet(tmp_path_factory.mktemp("resnet"))
    folders["language"] = save_language_model(tmp_path_factory.mktemp("llama"))
    return folders


def _tasks(kind: str) -> list[Examples]:
    if kind == "language":
        return [language_rows(10, seed=seed) for seed in range(2)]
    if kind == "resnet":
        return [toy_images(names, 8, seed=seed, size=32) for seed, names in enumerate((["a", "b"], ["c", "d"]))]
    return toy_tasks("image" if kind == "vit" else "text", 2)


def _create(path: Path, models: dict[str, Path], name: str, kind: str, options: dict[str, Any]) -> Learner:
    special = {"scenario": "language", "max_length": 64, "batch_size": 4} if kind == "language" else {}
    options = {"eval_batch_size": 6, "device": "cpu", **special, **options}
    return toy_learner(path, models[kind], name, **options)


def _run_the_course(name: str, options: dict[str, Any], kind: str, models: dict[str, Path], folder: Path) -> None:
    tasks = _tasks(kind)
    whole = _create(folder / "whole", models, name, kind, {**options, "checkpoint_every": "0"})
    parts = _create(folder / "parts", models, name, kind, {**options, "checkpoint_every": 1})
    if whole.trains_on == "stream":
        tasks = [concatenate(tasks)]
    else:
        for learner in (whole, parts):
            learner.learn(tasks[0], name="first")
        assert whole.digest == parts.digest, "checkpoints at every step change nothing"
    result = whole.learn(tasks[-1], name="last")
    course = Course()
    learner = course.run(folder / "parts", lambda learner: learner.learn(tasks[-1], name="last"))
    assert learner.digest == whole.digest
    assert not (folder / "parts" / "checkpoint").exists() and not (folder / "parts" / "removed").exists()
    met = [stage for stage, _, _ in course.met]
    assert "write" in met
    if result.steps > 5:
        assert met.count("train") == 4
        assert course.steps <= result.steps + 3, "what was saved is not trained again"
    cost = LearnerStore.open(folder / "parts").read_task(-1).log()
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in cost] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in LearnerStore.open(folder / "whole").read_task(-1).log()
    ]


@pytest.mark.parametrize(("name", "options", "kind"), QUICK)
def test_cut_off_anywhere(name: str, options: dict, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    _run_the_course(name, options, kind, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "kind"), SLOW)
def test_cut_off_anywhere_with_every_method(
    name: str, options: dict, kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    _run_the_course(name, options, kind, models, tmp_path)
