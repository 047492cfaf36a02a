"""PackNet: who owns which weight, that frozen means frozen, nothing forgotten to the bit, growth, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everlora import Learner
from everlora.errors import OptionError, TaskCountError
from everlora.isolation.ownership import OwnedWeight
from everlora.methods import method_spec
from everlora.store.files import checksum
from tests.methods.isolation_builders import KINDS, Bench, begin_and_end, deep_resnet, examples, save_kind

OPTIMISERS = [{"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "sgd", "weight_decay": 0.1, "lr": 0.05}]
HALF = {"prune": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def _tensors(bench: Bench, task: int) -> dict[str, torch.Tensor]:
    """All that the network of a task computes with, statistics included."""
    found = {}
    for path, module in bench.method.task_modules.version(task).items():
        found.update({f"{path}.{name}": tensor.clone() for name, tensor in module.state_dict().items()})
        if path in bench.method._weights:
            found[f"{path} as read"] = module.weight.clone()
    return found


@pytest.mark.parametrize("training", OPTIMISERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_earlier_tasks_keep_every_bit(kind: str, training: dict, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "packnet", HALF, **training)
    pretrained = {name: tensor.clone() for name, tensor in bench.backbone.model.state_dict().items()}
    bench.learn(0)
    tensors, scores = _tensors(bench, 0), bench.logits(0, 0)
    if kind == "resnet":
        assert not torch.equal(tensors["bn1.running_mean"], pretrained["bn1.running_mean"])
    for index in (1, 2):
        bench.learn(index)
        assert torch.equal(bench.logits(0, 0), scores)
    later = _tensors(bench, 0)
    assert all(torch.equal(tensor, later[name]) for name, tensor in tensors.items())
    assert not torch.equal(bench.logits(0, 2, of=2), bench.logits(0, 1, of=2))
    bench.method.activate(None)
    after = bench.backbone.model.state_dict()
    assert after.keys() == pretrained.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in pretrained.items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_has_one_owner_and_the_kept_share_is_exact(kind: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "packnet", {"prune": 0.75}, epochs=2)
    for index in range(3):
        before = {name: weight.num_free for name, weight in bench.method._weights.items()}
        bench.learn(index)
        for name, weight in bench.method._weights.items():
            kept = int((weight.owner == index + 1).sum())
            assert abs(kept - 0.25 * before[name]) <= 1, name
            assert kept + weight.num_free == before[name]
            assert not weight.value[weight.owner == 0].any()
    free = bench.method.panels()["free_share"]
    assert sum(free.values()) / len(free) == pytest.approx(0.75**3, abs=0.01)


@pytest.mark.parametrize("training", OPTIMISERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("base", ["pretrained", "zero"])
def test_frozen_entries_are_bit_equal_after_every_step(base: str, training: dict, folders: dict[str, Path]) -> None:
    bench = Bench("resnet", folders["resnet"], "packnet", {"prune": 0.5, "base": base}, **training)
    bench.learn(0)
    weights = bench.method._weights
    owned = {name: (weight.owner == 1, weight.value.detach().clone()) for name, weight in weights.items()}
    moved = []
    original = bench.method.after_step

    def check(stepped: bool) -> None:
        moved.append(max(float((w.value.detach() - owned[n][1])[owned[n][0]].abs().max()) for n, w in weights.items()))
        original(stepped)
        for name, weight in weights.items():
            mask, kept = owned[name]
            assert torch.equal(weight.value[mask], kept[mask])
            if bench.method.settled and weight._mine is not None:
                assert not weight.value[(weight.owner == 0) & ~weight._mine].any(), "what was pruned stays out"

    bench.method.after_step = check  # type: ignore[method-assign]
    bench.learn(1)
    assert len(moved) == 6 and max(moved) > 0, "the optimiser moves frozen entries, so that restoring has a purpose"


def test_pruning_takes_the_smallest_and_breaks_ties() -> None:
    layer = torch.nn.Linear(4, 2, bias=False)
    weight = OwnedWeight(layer)
    weight.begin(0)
    with torch.no_grad():
        weight.value.copy_(torch.tensor([[0.1, -3.0, 0.0, 0.0], [2.0, -0.2, 0.0, 1.0]]))
    weight.prune(0.5)
    weight.finish()
    assert weight.owner.tolist() == [[0, 1, 0, 0], [1, 1, 0, 1]]
    assert torch.equal(weight.weight(0), layer.weight + weight.value)
    weight.begin(1)
    with torch.no_grad():
        weight.value += torch.where(weight.owner == 0, 5.0, 0.0)
    assert torch.equal(weight.weight(1), layer.weight + weight.value)
    assert torch.equal(weight.weight(0), layer.weight + torch.where(weight.owner > 0, weight.value, 0.0))


def test_zero_base_starts_from_the_pretrained_network_and_prunes_to_zero(folders: dict[str, Path]) -> None:
    bench = Bench("resnet", folders["resnet"], "packnet", {"base": "zero", "prune": 0.5}, epochs=1)
    weight = bench.method._weights["layer2.0.conv1"]
    start = bench.backbone.model.layer2[0].conv1.weight.detach().clone()
    assert torch.equal(weight.value, start)
    bench.learn(0)
    seen = weight.weight(0)
    assert int((seen == 0).sum()) == start.numel() // 2 == weight.num_free
    assert torch.equal(seen != 0, weight.owner == 1)


@pytest.mark.parametrize(("blocks", "reference"), [(3, 269_722), (5, 464_154)])
def test_growth_is_that_of_the_formula(blocks: int, reference: int) -> None:
    channels = {3: 688, 5: 1136}[blocks]
    totals = {}
    for base in ("zero", "pretrained"):
        for norm in ("per_task", "frozen_eval") if base == "zero" else ("per_task",):
            backbone = deep_resnet(blocks)
            spec = method_spec("packnet")
            method = spec.method_class(spec.options({"base": base, "norm": norm}), backbone, seed=1)
            begin_and_end(method, backbone, 4)
            totals[base, norm] = method.stored_parameters()
            later = sum(int((weight.owner > 1).sum()) for weight in method._weights.values())
    assert totals["zero", "frozen_eval"] == reference + 3 * 650
    assert totals["zero", "per_task"] == reference + 3 * (650 + 2 * channels)
    assert totals["pretrained", "per_task"] - totals["zero", "per_task"] == later > 0


def test_equal_parts_use_up_the_network(folders: dict[str, Path]) -> None:
    bench = Bench("vit", folders["vit"], "packnet", {"schedule": "equal", "num_tasks": 3}, epochs=1)
    for index in range(3):
        bench.learn(index)
    for weight in bench.method._weights.values():
        parts = [int((weight.owner == index + 1).sum()) for index in range(3)]
        assert weight.num_free == 0 and max(parts) - min(parts) <= 1
    with pytest.raises(TaskCountError, match="task 'task 3' is number 4"):
        bench.learn(3)


def test_refusals(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="needs num_tasks"):
        Bench("vit", folders["vit"], "packnet", {"schedule": "equal"})
    bench = Bench("vit", folders["vit"], "packnet", {"prune": 0.004}, epochs=1)
    bench.learn(0)
    with pytest.raises(TaskCountError, match="task 'task 1' finds 0"):
        bench.learn(1)


def test_pruning_comes_after_two_thirds_and_no_earlier_epoch_is_kept(folders: dict[str, Path]) -> None:
    for epochs, when in ((1, 0), (2, 0), (3, 1), (6, 3), (9, 5)):
        bench = Bench("vit", folders["vit"], "packnet", {}, epochs=epochs)
        pruned: list[int] = []
        bench.method.settled = False
        bench.method._prune = pruned.append  # type: ignore[method-assign]
        marks = []
        for epoch in range(epochs):
            bench.method.after_epoch(epoch, epochs)
            marks.append(len(pruned))
        assert marks.index(1) == when and marks[-1] == 1

    bench = Bench("vit", folders["vit"], "packnet", HALF, epochs=3, keep_best=True)
    answers = iter([0.9, 1.0, 0.5, 0.3])  # before the first epoch, after the first, after pruning, after retraining
    values: list[torch.Tensor] = []
    weight = next(iter(bench.method._weights.values()))

    def logits(batch, task=None):  # type: ignore[no-untyped-def]
        values.append(weight.value.detach().clone())
        right = torch.nn.functional.one_hot(batch.labels, 2).float()
        wrong = torch.arange(len(right)) >= round(next(answers) * len(right))
        return torch.where(wrong[:, None], 1 - right, right)

    bench.method.logits = logits
    report = bench.learn(0, validation=bench.data(0))
    curve = [value for value, _ in report.curve]
    assert len(curve) == 4 and max(curve[:2]) > curve[2] > curve[3], "the best epochs came before pruning"
    assert torch.equal(weight.value, values[2]) and not torch.equal(values[2], values[1])
    assert weight.num_free == weight.owner.numel() // 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_reopened_learner_is_the_same_and_goes_on_the_same(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"prune": 0.5, "epochs": 2, "batch_size": 8, "lr": 5e-3, "augment": "none"}
    learner = Learner.create(tmp_path / "learner", folders[kind], "packnet", **options)
    rows = [examples(kind, index) for index in range(3)]
    for index in (0, 1):
        learner.learn(rows[index], name=f"task {index}")
    folder = next((tmp_path / "learner" / "tasks").iterdir())
    files = {path.name: checksum(path.read_bytes()) for path in folder.iterdir()}
    again = Learner.open(tmp_path / "learner")
    assert again.method.task_modules.active is None, "the pretrained modules move with the model that holds them"
    for index in (0, 1):
        scores = [[p.scores for p in each.predict(rows[index], task=index)] for each in (learner, again)]
        assert scores[0] == scores[1]
    again.learn(rows[2], name="task 2")
    digest = again.digest
    assert {path.name: checksum(path.read_bytes()) for path in folder.iterdir()} == files
    again.rollback(2)
    learner = Learner.open(tmp_path / "learner")
    learner.learn(rows[2], name="task 2")
    assert learner.digest == digest


def test_it_learns_and_recognises_by_the_first_network(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"prune": 0.5, "epochs": 9, "batch_size": 8, "lr": 1e-2, "augment": "none"}
    learner = Learner.create(tmp_path / "learner", folders["vit"], "packnet", **options)
    rows = [examples("vit", index) for index in range(2)]
    for part in rows:
        learner.learn(part)
    for index, part in enumerate(rows):
        right = [p.label == label for p, label in zip(learner.predict(part, task=index), part.labels, strict=True)]
        assert sum(right) / len(right) > 0.9
    assert learner.evaluate(rows[0]).accuracy > 0.5
