"""What a process of a run of several does in `test_processes`; started by torchrun with a task's name and a folder."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from everlora import Learner
from everlora.backbones import Backbone
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.cli.application import main as main_program
from everlora.errors import EverloraError
from everlora.methods import method_spec
from everlora.methods.base import Batch, Loss, Recalled, TaskInfo
from everlora.store import LearnerStore
from everlora.training import Processes, TaskData, TaskTrainer, TrainingOptions, processes
from everlora.training.passes import Collector
from tests.toy import toy_images, toy_learner, toy_tasks
from tests.training.builders import language_rows

STEPS = 20
LANGUAGE_LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("replay", {"size": 6, "packing": True}),
    "dual": ("i_lora", {"ilora_buffer_size": 6, "selective_update": True, "reset_optimizer": False}),
}
LEARNERS = {"replay": {"size": 8, "insert": "online", "keep_validation": 2}, "inflora": {}, "lwf": {"warmup_epochs": 1}}


class DoubleBackbone(Backbone):
    """Two layers over the mean colours of an image's quarters, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        names: dict[str, Any] = {"source": "double", "folder": Path(), "architecture": "double", "pooling": "none"}
        super().__init__(model, ImageInputs(ImageTransform(size=16)), feature_dim=6, **names)

    @property
    def default_targets(self) -> tuple[str, ...]:
        return ("0", "2")

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        pixels = nn.functional.avg_pool2d(batch["pixel_values"].double(), 8)
        return self.model(pixels.flatten(1))


def train_double(micro_batches: int, seen: list[int] | None = None) -> dict[str, Tensor]:
    """Twenty steps with rows of a memory beside them, in float64; returns all weights and what the log says."""
    backbone = DoubleBackbone()
    spec = method_spec("sequential")
    method: Any = spec.method_class(spec.options({"train": "all"}), backbone, seed=1)
    data = TaskData.of(backbone, toy_images("abc", 7), {"a": 0, "b": 1, "c": 2})
    begin = method.begin_task

    def begin_task(*args: Any) -> None:
        begin(*args)
        method.heads.double()

    def recall(count: int, generator: torch.Generator) -> Recalled:
        rows = torch.randperm(21, generator=generator)[:5]
        return Recalled(data.encoded.select(rows), data.labels[rows], torch.zeros(5, dtype=torch.long))

    def loss(batch: Batch) -> Loss:
        if seen is not None:
            seen.append(len(batch.labels))
        parts = [batch] if batch.memory is None else [batch, batch.memory]
        scores = torch.cat([method.heads.row_logits(backbone.features(part.inputs)) for part in parts])
        labels = torch.cat([part.labels for part in parts])
        term = 0 if batch.memory is None else backbone.features(batch.memory.inputs).square().sum(dim=1).mean()
        value = nn.functional.cross_entropy(scores, labels)
        return Loss(value + batch.share.memory / batch.share.supervised * term)

    method.begin_task, method.recall, method.loss = begin_task, recall, loss
    options = TrainingOptions(
        max_steps=STEPS, batch_size=5, lr=1e-2, micro_batches=micro_batches, clip_norm=1.0, augment="none"
    )
    report = TaskTrainer(backbone, method, options).learn(TaskInfo(0, "first", (0, 1, 2), 21), data)
    assert report.steps == STEPS
    weights = {**backbone.state_dict(), **{f"head/{k}": v for k, v in method.heads.state_dict().items()}}
    losses = torch.tensor([row["loss"] for row in report.log], dtype=torch.float64)
    return {**{name: value.detach().clone() for name, value in weights.items()}, "log": losses}


def learn_all(folder: Path, model: Path) -> dict[str, str]:
    """Two tasks with each of some methods, on images and on a language model; returns the digests."""
    digests = {}
    for name, options in LEARNERS.items():
        # not Adam, which makes whole steps of gradients that are nothing but rounding
        learner = toy_learner(folder / name, model, name, device="cpu", optimizer="sgd", **options)
        for task in toy_tasks("image", 2):
            learner.learn(task)
        digests[name] = learner.digest
    story: dict[str, Any] = {"scenario": "language", "max_length": 64, "micro_batches": 2, "batch_size": 6}
    for name, (method, options) in LANGUAGE_LEARNERS.items():
        base = model.parent / "llama"
        learner = toy_learner(folder / name, base, method, device="cpu", optimizer="sgd", **story, **options)
        for seed in range(2):
            learner.learn(language_rows(10, seed=seed), name=f"part {seed}")
        digests[name] = learner.digest
    return digests


def fail_everywhere(folder: Path, model: Path) -> list[str]:
    """Failures in one process at several places; returns the error this process saw at each."""
    rank = distributed.get_rank()
    task = toy_tasks("image", 1)[0]
    seen = []
    for number, (place, failing) in enumerate([("loss", 1), ("begin_task", 1), ("end_task", 1), ("write_task", 0)]):
        learner = toy_learner(folder / f"{number}", model, "sequential", device="cpu")
        owner: Any = LearnerStore if place == "write_task" else learner.method
        hook = getattr(owner, place)
        if rank == failing:
            setattr(owner, place, _after(2 if place == "loss" else 0, hook))
        try:
            learner.learn(task)
            seen.append("nothing")
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
        setattr(owner, place, hook)
        assert not Learner.open(folder / f"{number}", device="cpu").tasks
    try:
        toy_learner(folder / "0", model, "sequential", device="cpu")
        seen.append("nothing")
    except EverloraError as error:
        seen.append(f"{type(error).__name__}: {error}")
    # all are still in step with each other
    learner = toy_learner(folder / "last", model, "sequential", device="cpu")
    assert learner.learn(task).steps == 6
    return seen


def pass_over(group: Processes) -> dict[str, Any]:
    """A pass over 21 rows in batches of four; returns the rows this process visited, and what was put together."""
    backbone = DoubleBackbone()
    spec = method_spec("sequential")
    method: Any = spec.method_class(spec.options({"train": "all"}), backbone, seed=1)
    trainer = TaskTrainer(backbone, method, TrainingOptions(eval_batch_size=4, augment="none"))
    data = TaskData.of(backbone, toy_images("abc", 7), {"a": 0, "b": 1, "c": 2})
    visited: list[int] = []
    collect = Collector(trainer, TaskInfo(0, "first", (0, 1, 2), 21), data, None)
    seen = collect(lambda batch, features: visited.extend(batch.rows.tolist()), stage="look", augment=False)
    first: list[int] = []
    collect(lambda batch, features: first.extend(batch.rows.tolist()), stage="first", augment=False, max_batches=1)
    parts = group.gather(
        {"rows": torch.tensor(visited), "size": len(visited), **({"own": torch.ones(1)} if first else {})}
    )
    return {
        "visited": visited,
        "seen": seen,
        "first": first,
        "parts": [{"rows": part["rows"].tolist(), "size": part["size"], "own": "own" in part} for part in parts],
    }


def command_lines(folder: Path, model: Path) -> list[dict[str, Any]]:
    """The program's verbs in a learner's life; returns the exit code, the output and the tasks after each."""
    learner, rows = folder / "learner", folder / "rows.csv"
    verbs = [
        ["init", learner, "--model", model, "--method", "ncm", "--keep-validation", "2", "--keep-states", "all"],
        *(["learn", learner, folder / f"rows-{number}.csv", "--json"] for number in range(2)),
        ["status", learner, "--json"],
        ["eval", learner, "--json"],
        ["predict", learner, "--input", rows, "--output", folder / "answers.csv"],
        ["export", learner, folder / "export", "--json"],
        ["export", learner, folder / "export"],
        ["forget", learner, "--label", "b", "--json"],
        ["rollback", learner, "--to-task", "5"],
        ["rollback", learner, "--to-task", "1", "--json"],
    ]
    done = []
    for words in verbs:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main_program([str(word) for word in words])
        processes("cpu").check()  # none goes on before the other is done
        tasks = len(LearnerStore.open(learner).tasks)
        done.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "tasks": tasks})
        processes("cpu").check()
    return done


def _after(calls: int, hook: Any) -> Any:
    left = [calls]

    def failing(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise EverloraError("the disk is full of water")
        return hook(*args, **options)

    return failing


def main(what: str, folder: Path, model: Path) -> None:
    group = processes("cpu")
    assert group.size == 2 == distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    assert distributed.get_backend() == "gloo"
    result: Any = None
    if what == "double":
        for micro_batches in (1, 2):
            seen: list[int] = []
            save_file(train_double(micro_batches, seen), folder / f"{micro_batches}-{group.rank}.safetensors")
            result = sum(seen)
        total = group.sum(torch.tensor([1.0, group.rank]))
        assert total.tolist() == [2.0, 1.0]
    elif what == "learner":
        result = learn_all(folder, model)
    elif what == "pass":
        result = pass_over(group)
    elif what == "commands":
        result = command_lines(folder, model)
    elif what == "fail":
        result = fail_everywhere(folder, model)
    (folder / f"result-{group.rank}.json").write_text(json.dumps({"size": group.size, "result": result}))
    if what == "fail":
        learner = toy_learner(folder / "crash", model, "sequential", device="cpu")
        if group.rank == 1:
            learner.method.loss = _after(1, learner.method.loss)  # type: ignore[method-assign]
        learner.learn(toy_tasks("image", 1)[0])


if __name__ == "__main__":
    np.random.seed(0)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
