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
from everlora.errors import DataError, NumericError, OptionError, UnsupportedError
from everlora.methods.base import Loss
from everlora.store import LearnerStore
from everlora.streams import Examples, concatenate
from everlora.training import Interval
from everlora.training.epochs import Epochs
from tests.methods.conv_builders import save_resnet
from tests.methods.test_contract import LANGUAGE_ROWS, ROWS
from tests.toy import tiny_model, toy_images, toy_learner, toy_tasks, toy_texts
from tests.training.builders import Bench, language_rows, save_language_model
from tests.training.courses import Course, Killed

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
    ("replay", {"size": 10, "insert": "online"}, "bert"),
    ("lwf", {"warmup_epochs": 1}, "resnet"),
    ("i_lora", {"selective_update": True, "buffer_insert": "online", "ilora_buffer_size": 6}, "language"),
]
SLOW = [
    ("ewc", {"fisher_samples": 20}, "vit"),
    *[(name, options, kind) for name, options in ROWS for kind in ("vit", "bert")],
    *[(name, options, "resnet") for name, options in RESNET_ROWS],
    *[(name, options, "vit") for name, options in MORE_ROWS],
    *[(name, options, "language") for name, options in LANGUAGE_ROWS],
    ("i_lora", {"selective_update": True, "buffer_insert": "online", "ilora_buffer_size": 6}, "language"),
    ("i_lora", {"reset_optimizer": False, "buffer_insert": "every_step", "micro_batches": 2}, "language"),
    ("i_lora", {"ema_update": "task_end", "lora_dropout": 0.2, "packing": True, "keep_validation": 2}, "language"),
    ("replay", {"insert": "online", "size": 5, "checkpoint_gradients": True, "max_steps": 5}, "language"),
]


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
        {k: v for k, v in row.items() if k != "seconds"}
        for row in LearnerStore.open(folder / "whole").read_task(-1).log()
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


def _cut_off(learner: Learner, rows: Examples, after: int, **options: Any) -> None:
    """Learn until so many steps are made and saved."""
    course = Course(places=[("train", after, "after")])
    with course._armed(), pytest.raises(Killed):
        learner.learn(rows, **options)
    assert course.met


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_only_the_same_task_is_gone_on_with(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "learner"
    rows, kept = toy_texts(["a", "b"]), toy_texts(["a", "b"], 3, seed=5)
    learner = toy_learner(path, models["bert"], "sequential", checkpoint_every=1, device="cpu")
    _cut_off(learner, rows, 2, name="first", validation=kept)
    before = _contents(path)
    other = toy_texts(["a", "b"], seed=3)
    with pytest.raises(DataError, match=r"begun with other data; .*--discard-unfinished") as error:
        learner.learn(other, name="first", validation=kept)
    assert "\n" not in str(error.value)
    moved = Examples("text", rows.inputs, rows.labels, rows.ids + 1)
    with pytest.raises(DataError, match="begun with other data;"):
        learner.learn(moved, name="first", validation=kept)
    with pytest.raises(DataError, match="unfinished task 'first', begun with other validation rows;"):
        learner.learn(rows, name="first")
    with pytest.raises(OptionError, match="unfinished task 'first', begun with another name;"):
        learner.learn(rows, name="second", validation=kept)
    with pytest.raises(
        OptionError, match=r"with other training options \(epochs=2, lr=0.01\); .*discard_unfinished=True"
    ):
        learner.learn(rows, name="first", validation=kept, epochs=3, lr=1e-3)
    assert _contents(path) == before
    result = learner.learn(other, name="second", discard_unfinished=True)
    assert (result.name, result.index, result.steps) == ("second", 0, 6)
    after = _contents(path)
    for name, data in before.items():
        assert name == "learner.json" or after[f"removed/0000/{name}"] == data
    assert not (path / "checkpoint").exists()
    whole = toy_learner(tmp_path / "whole", models["bert"], "sequential", device="cpu")
    whole.learn(other, name="second")
    assert Learner.open(path).digest == whole.digest, "how often checkpoints are written decides nothing"


def test_another_version_or_more_threads(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = toy_texts(["a", "b"])
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=1, device="cpu")
    _cut_off(learner, rows, 2)
    with monkeypatch.context() as patch:
        patch.setattr("everlora.__version__", "999")
        with pytest.raises(OptionError, match="another version of everlora"):
            learner.learn(rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with caplog.at_level(logging.WARNING, "everlora"):
        assert learner.learn(rows).steps == 6
    assert "begun with threads=" in caplog.text and "goes on with 99" in caplog.text


@pytest.mark.parametrize("harm", ["cut", "flip", "json", "huge", "gone", "both"])
def test_a_broken_checkpoint_is_passed_over(
    harm: str, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = toy_texts(["a", "b"])
    whole = toy_learner(tmp_path / "whole", models["bert"], "sequential", device="cpu")
    whole.learn(rows)
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=1, device="cpu")
    _cut_off(learner, rows, 4)
    older, newest = sorted((tmp_path / "learner" / "checkpoint").iterdir())
    arrays, document = newest / "arrays.safetensors", newest / "checkpoint.json"
    if harm in ("cut", "both"):
        arrays.write_bytes(arrays.read_bytes()[:-100])
        if harm == "both":
            (older / "checkpoint.json").write_text("{}")
    elif harm == "flip":
        data = bytearray(arrays.read_bytes())
        data[-40] ^= 1
        arrays.write_bytes(bytes(data))
    elif harm == "json":
        document.write_text(document.read_text().replace('"epoch"', '"epoca"'))
    elif harm == "huge":
        document.write_bytes(b"[" * (64 * 2**20 + 1))
    else:
        arrays.unlink()
    course = Course(places=[])
    with course._armed(), caplog.at_level(logging.WARNING, "everlora"):
        learner.learn(rows)
    assert course.steps == (6 if harm == "both" else 3)
    assert caplog.text.count("a checkpoint is passed over") == (2 if harm == "both" else 1)
    assert learner.digest == whole.digest


def test_a_loss_that_is_not_finite_says_where_and_keeps_the_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    rows = toy_texts(["a", "b"])
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=1, device="cpu")
    loss, calls = learner.method.loss, iter(range(9))

    def breaking(batch: Any) -> Loss:
        value = loss(batch)
        return Loss(value.value * float("nan")) if next(calls) == 4 else value

    learner.method.loss = breaking  # type: ignore[method-assign]
    message = r"'task-1' is nan at step 4 \(learning rate 0\.\d+\), batch 1 of epoch 1; lower lr"
    with pytest.raises(NumericError, match=message):
        learner.learn(rows)
    newest = sorted((tmp_path / "learner" / "checkpoint").iterdir())[-1]
    assert json.loads((newest / "checkpoint.json").read_text())["values"]["training/epoch"] == 1
    whole = toy_learner(tmp_path / "whole", models["bert"], "sequential", device="cpu")
    whole.learn(rows)
    assert learner.learn(rows).steps == 6 and learner.digest == whole.digest, "with the cause gone it goes on"


def test_weights_that_are_not_finite_are_neither_saved_nor_kept(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=1, device="cpu")
    steps = iter(range(9))

    def poison(stepped: bool) -> None:
        if next(steps) == 5:  # the last one, so that no loss tells
            with torch.no_grad():
                learner.method.parameters()["head"][0].fill_(float("inf"))

    learner.method.after_step = poison  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "everlora"), pytest.raises(NumericError, match="weights that are not finite"):
        learner.learn(toy_texts(["a", "b"]))
    assert "no checkpoint is written" in caplog.text
    assert [path.name for path in sorted((tmp_path / "learner" / "checkpoint").iterdir())] == ["000004", "000005"]
    assert not LearnerStore.open(tmp_path / "learner").tasks


def test_a_disk_that_refuses_a_checkpoint_stops_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=2, device="cpu")
    real = os.rename

    def refuse(source: Any, target: Any) -> None:
        if "checkpoint" in str(target):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with caplog.at_level(logging.WARNING, "everlora"):
        assert learner.learn(toy_texts(["a", "b"])).steps == 6
    assert caplog.text.count("no checkpoint could be written") >= 3 and "No space left" in caplog.text
    assert not (tmp_path / "learner" / "checkpoint").exists() and len(learner.tasks) == 1


def test_saving_draws_nothing(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every=1, device="cpu")
    progress, seen = Epochs.progress, []

    def looked_at(epochs: Epochs) -> Any:
        before = torch.get_rng_state()
        state = progress(epochs)
        seen.append(torch.equal(before, torch.get_rng_state()))
        return state

    monkeypatch.setattr(Epochs, "progress", looked_at)
    outside = torch.get_rng_state()
    learner.learn(toy_texts(["a", "b"]))
    assert seen == [True] * 7 and torch.equal(outside, torch.get_rng_state())


def test_how_often() -> None:
    assert Interval.of("200") == Interval(steps=200) == Interval.of(200)
    assert Interval.of(" 300s ") == Interval(seconds=300.0)
    assert Interval.of("0").never and Interval.of("0s").never and not Interval.of(1).never
    assert Interval(steps=3).is_over(3, 0) and not Interval(steps=3).is_over(2, 1e9)
    assert Interval(seconds=3).is_over(0, 3) and not Interval(seconds=3).is_over(10**9, 2.9)
    for wrong in ("often", "-1", "1.5s", "", "5m", True, None):
        with pytest.raises(OptionError, match="300s"):
            Interval.of(wrong)  # type: ignore[arg-type]


def test_how_often_is_an_option_of_learner_and_task(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'checkpoint_every' of the learner: expected steps as in 200"):
        toy_learner(tmp_path / "wrong", models["bert"], "sequential", checkpoint_every="often")
    learner = toy_learner(tmp_path / "learner", models["bert"], "sequential", checkpoint_every="0", device="cpu")
    rows = toy_texts(["a", "b"])
    _cut_off(learner, rows, 3)
    assert not (tmp_path / "learner" / "checkpoint").exists()
    _cut_off(learner, rows, 3, checkpoint_every="2")
    assert [path.name for path in (tmp_path / "learner" / "checkpoint").iterdir()] == ["000001"]
    assert learner.learn(rows).steps == 6


def test_a_step_without_memory_is_begun_anew_in_more_pieces(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(narrow: bool, **training: Any) -> tuple[Bench, list[int]]:
        bench = Bench(models["vit"], "image", training={"batch_size": 8, **training})
        loss, sizes = bench.method.loss, []

        def loss_in_little_memory(batch: Any) -> Any:
            if narrow and len(batch.labels) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
            sizes.append(len(batch.labels))
            return loss(batch)

        bench.method.loss = loss_in_little_memory
        assert bench.learn().steps == 3
        return bench, sizes

    with caplog.at_level(logging.WARNING, "everlora"):
        narrow, sizes = run(True)
    assert caplog.text.count("out of memory at step 0") == 2 and "in 4 pieces" in caplog.text
    assert sizes == [2] * 12, "once narrow, narrow until the end of the task"
    asked, _ = run(False, micro_batches=4)
    for one, other in zip(narrow.gradients, asked.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_that_is_never_enough(models: dict[str, Path]) -> None:
    bench = Bench(models["vit"], "image", training={"batch_size": 4})

    def never(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    bench.method.loss = never
    with pytest.raises(UnsupportedError, match="a step of 4 rows needs more memory than there is"):
        bench.learn()


@pytest.mark.slow
def test_a_step_begun_anew_counts_once(models: dict[str, Path], tmp_path: Path) -> None:
    """A method that notes things in the pieces of a step must forget those of the attempt that failed."""
    digests = []
    for failing in (True, False):
        path = tmp_path / str(failing)
        learner = _create(
            path,
            models,
            "i_lora",
            "language",
            {"selective_update": True, "buffer_insert": "every_step", "ilora_buffer_size": 6, "micro_batches": 2},
        )
        learner.learn(language_rows(10, seed=0), name="first")
        loss, calls = learner.method.loss, []

        def sometimes(batch: Any, loss: Any = loss, calls: list = calls, failing: bool = failing) -> Any:
            calls.append(len(batch.labels))
            value = loss(batch)
            if failing and len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return value

        learner.method.loss = sometimes
        learner.learn(language_rows(10, seed=1), name="second", micro_batches=2 if failing else 4)
        figures = learner.method.panels()
        digests.append({name: values for name, values in figures.items() if name != "consistency"})
    assert digests[0] == digests[1]
