"""Rehearsal: what is kept, when it comes back, and what is minimised then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from everlora.errors import DataError
from everlora.methods import method_spec
from everlora.methods.base import Batch
from everlora.streams import concatenate
from tests.methods.tuned_builders import Bench, assert_goes_on_after_reopening, gradients, save_models, tasks
from tests.toy import toy_learner


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def _with_memory(bench: Bench, rows: list[int], old: list[int]) -> Batch:
    memory = replace(bench.batch(0, old), tasks=torch.zeros(len(old), dtype=torch.long), rows=None)
    return replace(bench.batch(1, rows), memory=memory)


def _second_task(model: Path, kind: str, **options: object) -> Bench:
    bench = Bench(model, kind, "replay", **options)
    bench.learn(0)
    bench.begin(1)
    return bench


def _features_by_hand(bench: Bench, batch: Batch, kind: str) -> torch.Tensor:
    assert batch.memory is not None
    if kind != "bert":
        both = torch.cat([batch.inputs["pixel_values"], batch.memory.inputs["pixel_values"]])
        return bench.backbone.features({"pixel_values": both})
    assert batch.inputs["input_ids"].shape[1] != batch.memory.inputs["input_ids"].shape[1]
    return torch.cat([bench.backbone.features(part.inputs) for part in (batch, batch.memory)])


def _rows(bench: Bench, kind: str) -> tuple[list[int], list[int]]:
    if kind != "bert":
        return [0, 13, 20], [1, 22]
    order = [bench.backbone.lengths(data.encoded).argsort().tolist() for data in bench.data]  # type: ignore[union-attr]
    return order[1][-3:], order[0][:2]  # long texts of the new task, short ones of the old


@pytest.mark.parametrize("loss", ["seen", "local"])
@pytest.mark.parametrize("kind", ["resnet", "vit", "bert"])
def test_one_cross_entropy_over_both_parts(kind: str, loss: str, models: dict[str, Path]) -> None:
    bench = _second_task(models[kind], kind, rank=2, loss=loss)
    batch = _with_memory(bench, *_rows(bench, kind))
    found = []
    statistics = {name: value.clone() for name, value in bench.backbone.named_buffers()}
    for by_hand in (False, True):
        for name, value in bench.backbone.named_buffers():
            value.copy_(statistics[name])
        bench.train_mode()
        bench.method.heads.zero_grad(set_to_none=True)
        bench.backbone.zero_grad(set_to_none=True)
        if by_hand:
            features = _features_by_hand(bench, batch, kind)
            scores = torch.cat([head(features) for head in bench.method.heads.linears], dim=1)
            labels = torch.cat([batch.labels, batch.memory.labels])  # type: ignore[union-attr]
            parts = [functional.cross_entropy(scores[i][None], labels[i][None]) for i in range(5)]
            if loss == "local":
                own = [scores[i][:2] if labels[i] < 2 else scores[i][2:] for i in range(5)]
                parts = [functional.cross_entropy(own[i][None], labels[i][None] % 2) for i in range(5)]
            torch.stack(parts).mean().backward()
        else:
            bench.method.loss(batch).value.backward()
        found.append(gradients(bench.method))
    assert {name: len(group) for name, group in found[0].items()}["head"] == 4, "all heads train"
    for name, group in found[0].items():
        for mine, theirs in zip(group, found[1][name], strict=True):
            if mine is None or theirs is None:
                assert mine is theirs
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_batch_norms_see_both_parts_at_once(models: dict[str, Path]) -> None:
    bench = _second_task(models["resnet"], "resnet")
    before = int(bench.backbone.model.bn1.num_batches_tracked)
    bench.train_mode()
    bench.method.loss(_with_memory(bench, [0, 1], [2, 3]))
    assert int(bench.backbone.model.bn1.num_batches_tracked) == before + 1


def test_nothing_is_recalled_before_there_is_an_older_task(models: dict[str, Path]) -> None:
    bench = Bench(models["vit"], "vit", "replay", rank=2, size=10, insert="online")
    recalled: list[object] = []
    ask = bench.method.recall
    bench.method.recall = lambda count, generator: recalled.append(ask(count, generator)) or recalled[-1]
    bench.learn(0)
    assert recalled and not any(recalled) and len(bench.method.buffer) == 10
    recalled.clear()
    bench.learn(1)
    assert all(part is not None and len(part.labels) == 8 for part in recalled)  # type: ignore[attr-defined]
    few = bench.method.recall(3, torch.Generator().manual_seed(1))
    assert few is None or len(few.labels) == 3
    bench.begin(1)
    bench.method.options = replace(bench.method.options, batch=2)
    again = bench.method.recall(8, torch.Generator().manual_seed(1))
    assert again is not None and len(again.labels) == len(again.tasks) == len(again.encoded) == 2


@pytest.mark.parametrize("insert", ["task_end", "online"])
def test_rows_go_by_once_and_are_kept_as_they_were(insert: str, models: dict[str, Path]) -> None:
    bench = Bench(models["vit"], "vit", "replay", training={"augment": "crop_flip", "epochs": 3}, size=9, insert=insert)
    bench.learn(0)
    bench.learn(1)
    buffer = bench.method.buffer
    assert buffer.num_seen == sum(map(len, bench.data)) and len(buffer) == 9
    images, labels, numbers = buffer.draw(9, torch.Generator())
    assert images.images.dtype == "uint8" and set(numbers.tolist()) == {0, 1}
    for image, row_id, label, task in zip(images.images, images.ids, labels, numbers, strict=True):
        data = bench.data[int(task)]
        place = data.encoded.ids.tolist().index(row_id)
        assert (image == data.encoded.images[place]).all() and label == data.labels[place]
    panels = bench.method.panels()
    assert sum(panels["buffer_rows"].values()) == 9 and panels["buffer_bytes"]["buffer"] == buffer.nbytes


def test_balanced_holds_as_many_rows_of_each_class(models: dict[str, Path]) -> None:
    bench = Bench(models["vit"], "vit", "replay", 3, rank=2, size=12, balanced=True, training={"epochs": 1})
    for index in range(3):
        bench.learn(index)
    assert torch.bincount(bench.method.buffer.labels).tolist() == [2] * 6


def test_frozen_encoders_replay_from_their_features(models: dict[str, Path]) -> None:
    bench = Bench(models["bert"], "bert", "replay", train="head")
    before = {key: value.clone() for key, value in bench.backbone.model.state_dict().items()}
    bench.learn(0)
    old = bench.method.heads.linears[0].weight.clone()
    bench.learn(1)
    assert not torch.equal(old, bench.method.heads.linears[0].weight)
    assert all(torch.equal(value, before[key]) for key, value in bench.backbone.model.state_dict().items())


def test_a_row_of_a_foreign_class_is_refused(models: dict[str, Path]) -> None:
    bench = _second_task(models["vit"], "vit", rank=2, loss="local")
    batch = _with_memory(bench, [0, 1], [2, 3])
    wrong = replace(batch.memory, labels=torch.tensor([0, 3]))  # type: ignore[type-var]
    with pytest.raises(DataError, match="said to be of"):
        bench.method.loss(replace(batch, memory=wrong))


@pytest.mark.slow
def test_it_beats_plain_fine_tuning_when_no_task_is_given(models: dict[str, Path], tmp_path: Path) -> None:
    rows = concatenate(tasks("vit"))
    found = {}
    for name in ("replay", "sequential"):
        learner = toy_learner(tmp_path / name, models["vit"], name, epochs=8, loss="seen")
        for task in tasks("vit"):
            learner.learn(task)
        found[name] = learner.evaluate(rows).accuracy
    assert found["replay"] > found["sequential"] + 0.3 and found["replay"] > 0.8, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [("resnet", {"insert": "online"}), ("bert", {"balanced": True, "loss": "local"})],
)
def test_a_learner_goes_on_after_reopening(kind: str, options: dict, models: dict[str, Path], tmp_path: Path) -> None:
    assert_goes_on_after_reopening(tmp_path, models[kind], kind, "replay", size=20, lr=1e-3, **options)


def test_the_short_name() -> None:
    assert method_spec("er").name == "replay"
