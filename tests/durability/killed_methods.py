"""What one process does in `test_killed`: kill learners of its share of all methods, and say how they ended.

Everything is imported once, before the first fork; torch computes in one thread and nothing is trained in the parent.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.store import LearnerStore
from everlora.store.layout import LEARNER_FILE
from everlora.streams import Examples, concatenate
from tests.durability.killing import kill_once, look, run
from tests.methods.conv_builders import save_resnet
from tests.methods.test_contract import LANGUAGE_ROWS, ROWS
from tests.toy import tiny_model, toy_images, toy_learner, toy_texts
from tests.training.builders import language_rows, save_language_model

Case = tuple[str, dict[str, Any], str]
"""Method, options, kind of model."""

RESNET: list[tuple[str, dict[str, Any]]] = [
    ("sequential", {"bn": "shared"}),
    ("convlora", {"bn_recalibrate": True}),
    ("independent", {"norm": "adabn"}),
]
CASES: list[Case] = [
    *[(name, options, ("vit", "bert")[place % 2]) for place, (name, options) in enumerate(ROWS)],
    *[(name, options, "resnet") for name, options in RESNET],
    *[(name, options, "language") for name, options in LANGUAGE_ROWS],
]
KILLS_EACH, MOST_KILLS_OF_ONE = 2, 3


@dataclass
class Outcome:
    """How the learners of one method ended.

    Attributes:
        case: method, options and model.
        kills: those that hit a process that was alive.
        learners: how many were killed at least once and learned to the end.
        moments: where the kills hit.
        problem: what went wrong; empty where nothing did.
    """

    case: str
    kills: int = 0
    learners: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    problem: str = ""


def save_models(place: Path) -> dict[str, Path]:
    """Tiny models of each kind, loaded once so that no fork imports anything."""
    models = {kind: place / kind for kind in ("vit", "bert", "resnet", "language")}
    for kind, folder in models.items():
        folder.mkdir(parents=True)
        make = {"resnet": save_resnet, "language": save_language_model}.get(kind, lambda folder: None)
        make(folder)
        if kind in ("vit", "bert"):
            tiny_model(kind, folder)
        load_backbone(folder, kind="causal_lm" if kind == "language" else "encoder")
    return models


def tasks_for(kind: str) -> list[Examples]:
    """Two small tasks."""
    if kind == "language":
        return [language_rows(8, seed=seed) for seed in range(2)]
    names = (["a", "b"], ["c", "d"])
    if kind == "bert":
        return [toy_texts(classes, 8, seed=seed) for seed, classes in enumerate(names)]
    size = 32 if kind == "resnet" else 16
    return [toy_images(classes, 8, seed=seed, size=size) for seed, classes in enumerate(names)]


def learn(path: Path, case: Case, model: Path) -> None:
    """Make a learner where there is none, and learn the tasks that it lacks, with a checkpoint at each step."""
    name, options, kind = case
    if not (path / LEARNER_FILE).exists():
        more = {"scenario": "language", "max_length": 64, "batch_size": 4} if kind == "language" else {}
        toy_learner(path, model, name, device="cpu", checkpoint_every=1, eval_batch_size=6, **{**more, **options})
    learner = Learner.open(path, device="cpu")
    tasks = tasks_for(kind)
    tasks = [concatenate(tasks)] if learner.trains_on == "stream" else tasks
    for number, rows in list(enumerate(tasks))[len(learner.tasks) :]:
        learner.learn(rows, name=f"task {number}")


def kill_learners(case: Case, model: Path, place: Path, random: Random) -> Outcome:
    """Kill learners of one method until enough kills have hit, and compare each with one that nobody killed."""
    outcome = Outcome(f"{case[0]} {case[1]} on {case[2]}")
    log, whole, parts = place / "log", place / "whole", place / "parts"
    try:
        seconds = run(lambda: learn(whole, case, model), log)
        digest = LearnerStore.open(whole).digest
        while outcome.kills < KILLS_EACH:
            done, kills = False, 0
            while not done and kills < MOST_KILLS_OF_ONE:
                done = not kill_once(lambda: learn(parts, case, model), log, random, seconds)
                if not done:
                    kills += 1
                    outcome.moments[look(parts)] += 1
            if not done:
                run(lambda: learn(parts, case, model), log)
            with LearnerStore.open(parts, write=True) as found:  # a writer sweeps what the last kill may have left
                found.verify()
            assert found.digest == digest, f"{parts} has the digest {found.digest} and {whole} has {digest}"
            assert not (parts / "checkpoint").exists(), f"{parts} keeps checkpoints of tasks that are done"
            assert {path.name for path in parts.iterdir()} <= {".lock", "learner.json", "removed", "state", "tasks"}
            outcome.kills += kills
            outcome.learners += kills > 0
            shutil.rmtree(parts)
        shutil.rmtree(place)
    except Exception as error:  # the other methods have their turn, and the directory stays for a look at it
        outcome.problem = f"{type(error).__name__}: {error}"
    return outcome


def main(place: Path, seed: int, part: int, parts: int) -> None:
    """Kill learners of every `parts`-th method from number `part` on; one line of JSON for each."""
    assert torch.get_num_threads() == 1, "a fork of a process with more threads may hang"
    models = save_models(place / "models")
    random = Random(f"{seed} {part}")
    for number, case in list(enumerate(CASES))[part::parts]:
        folder = place / f"{number:02d}-{case[0]}"
        folder.mkdir()
        print(json.dumps(vars(kill_learners(case, models[case[2]], folder, random))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
