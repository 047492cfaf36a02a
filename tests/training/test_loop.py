"""The training loop: order, schedules, non-finite losses, no call for other rows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from everlora.backbones import load_backbone
from everlora.errors import DataError, NumericError, OptionError
from everlora.methods import method_spec
from everlora.methods.base import Batch, Loss, Recalled, TaskInfo
from everlora.methods.registry import parse_options
from everlora.training import TaskData, TaskTrainer, TrainingOptions
from everlora.training.epochs import Epochs
from everlora.training.options import make_optimizer, rate_factor
from tests.toy import tiny_model, toy_images, toy_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


def _trainer(folder: Path, **options: object) -> tuple[TaskTrainer, TaskData, TaskInfo]:
    backbone = load_backbone(folder)
    spec = method_spec("probe")
    method = spec.method_class(spec.options({"rank": 2}), backbone, seed=1)
    data = TaskData.of(backbone, toy_texts(["a", "b"], 20), {"a": 0, "b": 1})
    trainer = TaskTrainer(backbone, method, TrainingOptions(**{"batch_size": 8, "epochs": 2, **options}))
    return trainer, data, TaskInfo(0, "first", (0, 1), len(data))


def test_cosine99_is_the_official_schedule() -> None:
    options = TrainingOptions(epochs=20)
    factors = [rate_factor(options, epoch) for epoch in range(20)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(math.cos(99 * math.pi / 200))
    assert factors[-1] == pytest.approx(0.0157, abs=1e-4)
    assert factors == sorted(factors, reverse=True)
    assert rate_factor(TrainingOptions(epochs=1), 0) == 1.0


def test_other_schedules() -> None:
    steps = TrainingOptions(epochs=5, lr_schedule="steps", milestones=(4,))
    assert [rate_factor(steps, epoch) for epoch in range(5)] == [1, 1, 1, 1, pytest.approx(0.1)]
    assert rate_factor(TrainingOptions(epochs=4, lr_schedule="cosine"), 2) == pytest.approx(0.5)
    assert rate_factor(TrainingOptions(epochs=4, lr_schedule="constant"), 3) == 1


def test_head_and_adapters_have_their_own_rates() -> None:
    groups = {"adapter": [torch.nn.Parameter(torch.ones(1))], "head": [torch.nn.Parameter(torch.ones(1))]}
    optimizer = make_optimizer(TrainingOptions(lr=0.1, head_lr=0.5, optimizer="sgd"), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    assert isinstance(make_optimizer(TrainingOptions(optimizer="adamw"), groups), torch.optim.AdamW)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_magnitudes_have_a_rate_of_their_own_and_no_decay(kind: str) -> None:
    groups = {name: [torch.nn.Parameter(torch.ones(1))] for name in ("adapter", "magnitudes", "head")}
    options = TrainingOptions(lr=0.1, head_lr=None, alpha_lr_mult=3.0, optimizer=kind, weight_decay=0.5)
    made = make_optimizer(options, groups).param_groups
    assert [group["lr"] for group in made] == [0.1, pytest.approx(0.3), 0.1]
    assert [group["weight_decay"] for group in made] == [0.5, 0.0, 0.5]


def test_an_epoch_sees_every_row_once_in_random_batches(folder: Path) -> None:
    trainer, data, task = _trainer(folder)
    orders = [Epochs(trainer, task, data, None).order(epoch) for epoch in range(2)]
    for batches in orders:
        assert sorted(torch.cat(batches).tolist()) == list(range(len(data)))
        assert [len(batch) for batch in batches] == [8] * 5
    assert [b.tolist() for b in orders[0]] != [b.tolist() for b in orders[1]]


def test_without_gradients_texts_of_like_length_share_a_batch(folder: Path) -> None:
    trainer, data, _ = _trainer(folder, eval_batch_size=8)
    lengths = torch.as_tensor(trainer.backbone.lengths(data.encoded))
    batches = [rows for rows, _ in trainer.encode(data, "pass")]
    assert sorted(torch.cat(batches).tolist()) == list(range(len(data)))
    assert torch.cat([lengths[rows] for rows in batches]).tolist() == sorted(lengths.tolist())


def test_what_ran_before_does_not_matter(folder: Path) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer, data, task = _trainer(folder)
        state = torch.get_rng_state()
        report = trainer.learn(task, data)
        assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
        results.append((trainer.method.state()["tasks/000/head/weight"], report.log))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_report_counts_steps_and_trained_elements(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    trainer, data, task = _trainer(folder)
    trainer.progress = lambda *event: seen.append(event)
    report = trainer.learn(task, data)
    assert report.steps == 2 * 5 and report.trainable_parameters == 2 * (16 + 1)
    assert [row["epoch"] for row in report.log] == [0, 1] and report.peak_memory_bytes > 1e7
    assert ("train first", 10, 10) in seen


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(folder: Path) -> None:
    trainer, data, task = _trainer(folder)
    trainer.method.loss = lambda batch: Loss(torch.tensor(torch.nan, requires_grad=True))  # type: ignore[method-assign]
    with pytest.raises(NumericError, match=r"task 'first' is nan at step 0 \(learning rate 0.01\)"):
        trainer.learn(task, data)


def test_fixed_features_are_computed_once_and_agree_with_the_encoder(folder: Path) -> None:
    trainer, data, task = _trainer(folder, epochs=3)
    calls = []
    encode = trainer.backbone.features
    trainer.backbone.features = lambda batch: calls.append(1) or encode(batch)  # type: ignore[method-assign]
    trainer.learn(task, data)
    assert len(calls) == 1, "40 rows fit one evaluation batch; training asks for no more"
    features = trainer.features(data, "again")
    torch.testing.assert_close(trainer.method.logits(Batch({}, data.labels, features)).shape, torch.Size([40, 2]))


def test_unknown_labels_and_empty_sets_are_refused(folder: Path) -> None:
    backbone = load_backbone(folder)
    with pytest.raises(DataError, match=r"label 'b' .* unknown"):
        TaskData.of(backbone, toy_texts(["a", "b"], 2), {"a": 0})
    with pytest.raises(DataError, match="no rows"):
        TaskData.of(backbone, toy_texts(["a"], 2).select([]), {"a": 0})


def test_images_are_augmented_by_key(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_model("vit", tmp_path))
    spec = method_spec("probe")
    method = spec.method_class(spec.options({}), backbone, seed=1)
    data = TaskData.of(backbone, toy_images(["a", "b"], 6), {"a": 0, "b": 1})
    trainer = TaskTrainer(backbone, method, TrainingOptions(augment="crop_flip"))
    rows = torch.arange(12)
    first, again, other = (trainer.batch(data, rows, epoch=e).inputs["pixel_values"] for e in (0, 0, 1))
    plain = trainer.batch(data, rows, epoch=None).inputs["pixel_values"]
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, plain)
    swapped = trainer.batch(data, rows.flip(0), epoch=0).inputs["pixel_values"]
    torch.testing.assert_close(swapped.flip(0), first, rtol=0, atol=1e-5)


def test_options_are_validated() -> None:
    with pytest.raises(OptionError, match="did you mean 'epochs'"):
        parse_options(TrainingOptions, {"epoch": 3}, "training")
    with pytest.raises(OptionError, match=r"'lr' of training: .*greater than 0"):
        parse_options(TrainingOptions, {"lr": 0}, "training")


def test_validation_rows_give_a_curve_from_before_the_first_epoch(folder: Path) -> None:
    trainer, data, task = _trainer(folder, epochs=3)
    report = trainer.learn(task, data, data)
    assert len(report.curve) == 4 and [row["validation"] for row in report.log] == [v for v, _ in report.curve[1:]]
    assert all(0 <= value <= 1 for value, _ in report.curve)
    seconds = [spent for _, spent in report.curve]
    assert seconds[0] == 0 and seconds == sorted(seconds) and report.step_seconds > 0


def test_validation_changes_nothing_unless_the_best_epoch_is_asked_for(folder: Path) -> None:
    weights = []
    for validation in (False, True):
        trainer, data, task = _trainer(folder)
        trainer.learn(task, data, data if validation else None)
        weights.append(trainer.method.state()["tasks/000/head/weight"])
    assert torch.equal(*weights)


def test_keep_best_goes_back_to_the_earliest_of_the_best_epochs(folder: Path) -> None:
    trainer, data, task = _trainer(folder, epochs=4, keep_best=True)
    snapshots: list[torch.Tensor] = []
    answers = iter([0.1, 0.4, 0.9, 0.9, 0.2])  # before the first epoch, and after each of four

    def logits(batch: Batch, given: int | None = None) -> torch.Tensor:
        snapshots.append(trainer.method.heads.linears[0].weight.detach().clone())
        right = torch.nn.functional.one_hot(batch.labels, 2).float()
        wrong = torch.arange(len(right)) >= round(next(answers) * len(right))
        return torch.where(wrong[:, None], 1 - right, right)

    trainer.method.logits = logits  # type: ignore[method-assign]
    report = trainer.learn(task, data, data)
    assert [round(value, 1) for value, _ in report.curve] == [0.1, 0.4, 0.9, 0.9, 0.2]
    assert torch.equal(trainer.method.heads.linears[0].weight, snapshots[2])
    assert not torch.equal(snapshots[2], snapshots[4])


def test_a_smaller_last_batch_can_be_left_out(folder: Path) -> None:
    trainer, data, task = _trainer(folder, batch_size=12, drop_last=True)
    batches = Epochs(trainer, task, data, None).order(0)
    assert [len(batch) for batch in batches] == [12, 12, 12]
    trainer, data, task = _trainer(folder, batch_size=12)
    assert [len(batch) for batch in Epochs(trainer, task, data, None).order(0)] == [12, 12, 12, 4]


def test_a_method_gets_the_rows_it_recalls_beside_each_batch(folder: Path) -> None:
    trainer, data, task = _trainer(folder, epochs=1)
    kept = Recalled(data.encoded.select([3, 5]), data.labels[[3, 5]], torch.tensor([0, 0]))
    seen: list[Batch] = []
    loss = trainer.method.loss
    trainer.method.recall = lambda count, generator: kept  # type: ignore[method-assign]
    trainer.method.loss = lambda batch: seen.append(batch) or loss(batch)  # type: ignore[method-assign, func-returns-value]
    trainer.learn(task, data)
    for batch in seen:
        assert batch.memory is not None and batch.memory.tasks is not None and batch.rows is not None
        assert torch.equal(batch.memory.labels, data.labels[[3, 5]]) and batch.memory.tasks.tolist() == [0, 0]
        assert torch.equal(batch.labels, data.labels[batch.rows])
    direct = trainer.backbone.collate(data.encoded, [3, 5])
    assert seen[0].memory is not None and torch.equal(seen[0].memory.inputs["input_ids"], direct["input_ids"])
