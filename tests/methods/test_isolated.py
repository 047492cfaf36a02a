"""What every method with one network a task promises: nothing forgotten to the bit, on each kind of network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everlora import Learner
from everlora.errors import DataError, OptionError
from everlora.isolation import RULES, Recogniser
from everlora.methods.base import Batch, TaskInfo
from everlora.streams import concatenate
from everlora.training import TaskData
from everlora.training.passes import Collector
from tests.methods.isolation_builders import KINDS, NUMBERS, Bench, examples, save_kind
from tests.toy import toy_images

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("resnet", "convlora", {}),
    ("resnet", "convlora", {"first_task": "full"}),
    ("resnet", "convlora", {"init_from": "previous", "norm": "adabn", "bn_recalibrate": True}),
    ("resnet", "independent", {}),
    ("resnet", "independent", {"train": "adapter", "rank": 2}),
    ("resnet", "senacnn", {}),
    ("resnet", "senacnn", {"cut": "last_block", "tail_init": "random"}),
    ("vit", "convlora", {}),
    ("vit", "independent", {"train": "all"}),
    ("vit", "senacnn", {}),
    ("bert", "convlora", {"first_task": "full"}),
    ("bert", "independent", {}),
    ("bert", "senacnn", {"tail_init": "pretrained"}),
]
METHODS = [
    ("convlora", {}),
    ("convlora", {"first_task": "full"}),
    ("independent", {}),
    ("independent", {"train": "adapter"}),
    ("senacnn", {}),
]
ON_RESNET = [row for row in ROWS if row[0] == "resnet"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def snapshot(bench: Bench, task: int | None) -> dict[str, Tensor]:
    """All tensors of a task's network, statistics and their counters included."""
    bench.method.activate(task)
    return {name: tensor.clone() for name, tensor in bench.backbone.model.state_dict().items()}


def make(kind: str, folders: dict[str, Path], name: str, options: dict[str, Any], **training: Any) -> Bench:
    return Bench(kind, folders[kind], name, options, **{"epochs": 1, **training})


def scores(bench: Bench, shown: int, task: int | None) -> Tensor:
    """Scores of the rows of a task, of the classes of the given one or of all."""
    bench.backbone.eval()
    with torch.no_grad():
        found = bench.method.logits(bench.batch(shown), task)
    return found if task is None else found[:, 2 * task : 2 * task + 2]


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("kind", "name", "options"), ROWS)
def test_earlier_tasks_and_the_base_keep_every_bit(
    kind: str, name: str, options: dict[str, Any], folders: dict[str, Path]
) -> None:
    bench = make(kind, folders, name, options, optimizer="adamw", weight_decay=0.1)
    pretrained = snapshot(bench, None)
    bench.learn(0)
    early, network = scores(bench, 0, 0), snapshot(bench, 0)
    assert not same(pretrained, network)
    for index in (1, 2):
        bench.learn(index)
        assert torch.equal(scores(bench, 0, 0), early)
    assert same(network, snapshot(bench, 0)) and same(pretrained, snapshot(bench, None))
    rows = [scores(bench, 2, task) for task in (0, 1, 2)]
    assert not torch.equal(rows[1], rows[2]) and all(bool(row.isfinite().all()) for row in rows)
    frozen = [p for task in range(3) for p in bench.method.task_modules.version(task).values()]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())


def test_plain_fine_tuning_does_forget(folders: dict[str, Path]) -> None:
    bench = make("resnet", folders, "sequential", {"train": "all"})
    bench.learn(0)
    before = bench.backbone.features(bench.batch(0).inputs)
    bench.learn(1)
    assert not torch.equal(bench.backbone.features(bench.batch(0).inputs), before)


@pytest.mark.parametrize(("kind", "name", "options"), ROWS)
def test_exactly_the_tasks_own_state_is_trained(
    kind: str, name: str, options: dict[str, Any], folders: dict[str, Path]
) -> None:
    for index in range(2):
        bench = make(kind, folders, name, options)
        if index:
            bench.learn(0)
        info = TaskInfo(index, "new", (2 * index, 2 * index + 1), 8)
        bench.method.begin_task(info, None)  # type: ignore[arg-type]
        listed = {id(p) for group in bench.method.parameters().values() for p in group}
        modules = [bench.backbone, *bench.method.own_modules()]
        wanting = {id(p) for module in modules for p in module.parameters() if p.requires_grad and p.numel()}
        assert listed == wanting
        bench.backbone.train()
        bench.method.train_mode()
        loss = bench.method.loss(bench.batch(index)).value
        # a fresh head on features knows nothing yet
        assert abs(float(loss.detach()) - math.log(2)) < 0.7
        torch.autograd.backward(loss)
        touched = {id(p) for module in modules for p in module.parameters() if p.grad is not None}
        assert touched <= listed and len(touched) > 2
        assert all(p.ndim < 2 for p in bench.method.parameters()["norm"])


def test_perfect_scores_leave_no_loss(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("resnet", folders, "convlora", {})
    bench.method.begin_task(TaskInfo(0, "new", (0, 1), 8), None)  # type: ignore[arg-type]
    batch = bench.batch(0)
    weight, bias = bench.method.heads.trained()
    features = torch.nn.functional.one_hot(batch.labels, weight.shape[1]).float()
    monkeypatch.setattr(bench.method.encoder, "features", lambda inputs: features)
    with torch.no_grad():
        bias.zero_()
        weight.copy_(20 * torch.eye(*weight.shape))
    # scores that went through a softmax before the cross-entropy could not come below log(1 + 1 / e) = 0.31
    assert float(bench.method.loss(batch).value.detach()) < 0.01


@pytest.mark.parametrize(("kind", "name", "options"), ON_RESNET)
def test_a_task_is_the_same_whatever_came_before(
    kind: str, name: str, options: dict[str, Any], folders: dict[str, Path]
) -> None:
    if options.get("init_from") == "previous":
        options = {**options, "init_from": "fresh"}
    states = []
    for earlier in ((0, 1), (0, 3)) if name == "senacnn" or options.get("first_task") else ((0, 1), (2, 3)):
        bench = make(kind, folders, name, options)
        for index, shown in enumerate((*earlier, 2)):
            rows = examples(kind, shown)
            numbers = {label: 2 * index + place for place, label in enumerate(rows.classes)}
            info = TaskInfo(index, "task", (2 * index, 2 * index + 1), len(rows))
            bench.trainer.learn(info, TaskData.of(bench.backbone, rows, numbers))
        states.append({k: v for k, v in bench.method.state().items() if k.startswith("tasks/002/")})
    if options.get("train") != "adapter" and name == "independent":
        # tasks are recognised by the network of the first one, which is another here
        states = [{k: v for k, v in state.items() if "recognition" not in k} for state in states]
    first, second = states
    assert first.keys() == second.keys() and len(first) > 5
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key], key


@pytest.mark.parametrize(("name", "options"), [("independent", {"train": "all"}), ("convlora", {}), ("senacnn", {})])
def test_what_is_written_after_a_task_costs_the_same_for_each(
    name: str, options: dict[str, Any], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make("resnet", folders, name, options)
    calls: list[object] = []
    plain = nn.Module._save_to_state_dict

    def counted(module: nn.Module, *given: Any) -> None:
        calls.append(module)
        plain(module, *given)

    monkeypatch.setattr(nn.Module, "_save_to_state_dict", counted)
    costs = []
    for index in range(4):
        bench.learn(index)
        everything = bench.method.state()
        calls.clear()
        newest = bench.method.newest_state()
        bench.method.stored_parameters()
        costs.append(len(calls))
        assert newest.keys() <= everything.keys()
        left_out = [key for key in everything if key not in newest]
        assert all(key.startswith("tasks/") and not key.startswith(f"tasks/{index:03d}/") for key in left_out)
    assert costs[1] == costs[2] == costs[3] > 0
    assert any(f"tasks/{2:03d}/" in key for key in left_out)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_switching_gives_the_same_and_writes_nothing(
    name: str, options: dict[str, Any], folders: dict[str, Path]
) -> None:
    bench = make("resnet", folders, name, options)
    for index in range(3):
        bench.learn(index)
    modules = [bench.backbone, *bench.method.own_modules()]
    tensors = {id(t): t for module in modules for t in [*module.parameters(), *module.buffers()]}
    marks = {key: (t.data_ptr(), t._version) for key, t in tensors.items()}
    seen: dict[int | None, Tensor] = {}
    for task in (0, 2, 1, None, 0, 1, None, 2, 0):
        found = scores(bench, 0, task)
        assert torch.equal(found, seen.setdefault(task, found))
    assert {key: (t.data_ptr(), t._version) for key, t in tensors.items()} == marks


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("norm", ["affine_only", "adabn", "frozen_eval"])
def test_norm_modes_train_and_move_what_they_say(
    name: str, options: dict[str, Any], norm: str, folders: dict[str, Path]
) -> None:
    bench = make("resnet", folders, name, {**options, "norm": norm})
    pretrained = snapshot(bench, None)
    bench.learn(0)
    after = snapshot(bench, 0)
    changed = {key for key, tensor in pretrained.items() if key in after and not torch.equal(tensor, after[key])}
    parts = {key.rpartition(".")[2] for key in changed if ".bn" in key or key.startswith("bn")}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert parts == {"affine_only": {"weight", "bias"}, "adabn": statistics, "frozen_eval": set()}[norm]


def test_shared_norms_are_refused_with_the_reason(folders: dict[str, Path]) -> None:
    for name in ("convlora", "senacnn", "independent"):
        with pytest.raises(OptionError, match="change what earlier tasks see; take per_task"):
            Bench("resnet", folders["resnet"], name, {"norm": "shared"})


@pytest.mark.parametrize(
    ("kind", "name", "options", "select"),
    [(*row, ("prototype", "mahalanobis", "energy", "concat")[place % 4]) for place, row in enumerate(ON_RESNET)],
)
def test_a_reopened_learner_says_the_same_to_the_bit(
    kind: str, name: str, options: dict[str, Any], select: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    learner = Learner.create(
        tmp_path / "learner", folders[kind], name, **options, select=select, keep_validation=2,
        epochs=1, batch_size=8, augment="none", keep_best=True,
    )  # fmt: skip
    for index in range(2):
        learner.learn(examples(kind, index), name=f"task {index}")
    rows = concatenate([examples(kind, index) for index in range(2)])
    again = Learner.open(tmp_path / "learner")
    for task in (None, 0, 1):
        answers = [p.scores for p in learner.predict(rows, task=task)]
        assert [p.scores for p in again.predict(rows, task=task)] == answers
    assert again.method.stored_parameters() == learner.method.stored_parameters()
    if select == "mahalanobis":  # what tasks share for it is carried on
        digest = again.digest
        again.rollback(1)
        again.learn(examples(kind, 1), name="task 1")
        assert again.digest == digest


@pytest.mark.parametrize("name", ["convlora", "senacnn"])
def test_answers_without_a_task_obey_the_identities(name: str, folders: dict[str, Path]) -> None:
    bench = make("resnet", folders, name, {})
    for index in range(3):
        bench.learn(index)
    labels = torch.cat([bench.batch(index).labels for index in range(3)])
    owner = labels // 2
    given = torch.cat([2 * t + scores(bench, t, t).argmax(1) for t in range(3)])
    for rule in RULES:
        bench.method.recogniser = Recogniser(rule)
        for index in range(3):
            data = bench.data(index)
            info = TaskInfo(index, "again", (2 * index, 2 * index + 1), len(data))
            bench.method.activate(index)
            bench.method._learn_to_recognise(info, Collector(bench.trainer, info, data, data))
        found = torch.cat([scores(bench, t, None) for t in range(3)])
        answers = found.argmax(1)
        right, recognised = answers == labels, answers // 2 == owner
        assert not (right & ~recognised).any() and not (right & (given != labels)).any()
        competing = found.isfinite().sum(1).unique().tolist()
        assert competing == ([6] if rule == "concat" else [2])
        # once the task is right, its own decision is taken
        assert recognised.any() and torch.equal(answers[recognised], given[recognised])
        batch = bench.batch(1)
        back = Batch({k: v.flip(0) for k, v in batch.inputs.items()}, batch.labels.flip(0))
        with torch.no_grad():
            assert torch.equal(bench.method.logits(back).argmax(1).flip(0), bench.method.logits(batch).argmax(1))


def test_one_class_is_only_recognised_by_features(folders: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "augment": "none"}
    alone = toy_images(["alone"], 6, size=32)
    for select in ("prototype", "mahalanobis", "energy"):
        learner = Learner.create(tmp_path / select, folders["resnet"], "convlora", select=select, **options)
        learner.learn(examples("resnet", 0), name="two")
        if select in ("prototype", "mahalanobis"):
            learner.learn(alone, name="one")
            assert learner.evaluate(alone).counts["one"].task_aware == 6
        else:
            with pytest.raises(DataError, match="has one class"):
                learner.learn(alone, name="one")


def test_a_temperature_is_fitted_on_validation_rows_only(folders: dict[str, Path]) -> None:
    found = []
    for held in (None, examples("resnet", 0)):
        bench = make("resnet", folders, "convlora", {"select": "max_softmax"})
        bench.learn(0, None if held is None else TaskData.of(bench.backbone, held, NUMBERS))
        found.append(bench.method.state()["tasks/000/recognition/temperature"])
    assert found[0] == 1.0 and found[1] != 1.0
