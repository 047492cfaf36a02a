"""Rows kept from training: the mean loss of a language model's tokens, and the way back to the best epoch."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from everlora.backbones import load_backbone
from everlora.errors import DataError, UnsupportedError
from everlora.training import TaskData
from everlora.training.validation import make_validation
from tests.backbones.language_builders import task, text
from tests.toy import tiny_model, toy_images
from tests.training.builders import Bench, language_rows, save_language_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("llama"))


def test_every_token_of_a_language_model_counts_alike(llama: Path) -> None:
    bench = Bench(llama, "language", training={"eval_batch_size": 5})
    whole = bench.trainer.batch(bench.data, torch.arange(len(bench.data)), epoch=None)
    with torch.no_grad():
        logits = bench.backbone.model(
            input_ids=whole.inputs["input_ids"], attention_mask=whole.inputs["attention_mask"]
        ).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), whole.labels[:, 1:].reshape(-1)
    )
    validation = make_validation(bench.trainer, bench.task, bench.data)
    assert validation is not None and validation.measure() == pytest.approx(float(expected), rel=1e-5)


def test_the_log_has_the_loss_of_kept_rows_and_the_best_epoch_comes_back(llama: Path) -> None:
    bench = Bench(llama, "language", training={"epochs": 3, "keep_best": True})
    measured, snapshots = iter([5.0, 4.0, 2.0, 3.0]), []
    kept = TaskData.of(bench.backbone, language_rows(3, seed=7), {})
    layer = next(iter(bench.method.layers().values()))

    def figures():  # type: ignore[no-untyped-def]
        snapshots.append(layer.up.detach().clone())
        yield next(measured) * 10, 10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("everlora.training.validation._TokenLoss._figures", lambda self: figures())
        report = bench.learn(kept)
    assert [row["validation_nll"] for row in report.log] == [4.0, 2.0, 3.0] and report.curve == []
    assert all("validation" not in row for row in report.log)
    assert torch.equal(layer.up, snapshots[2]) and not torch.equal(layer.up, snapshots[3])


def test_training_lowers_the_loss_of_the_rows_it_sees(llama: Path) -> None:
    bench = Bench(llama, "language", training={"epochs": 8, "lr": 3e-2})
    log = bench.learn(bench.data).log
    assert log[-1]["validation_nll"] < log[0]["validation_nll"] - 0.05


def test_it_is_measured_with_the_weights_that_predict(tmp_path: Path) -> None:
    bench = Bench(tiny_model("vit", tmp_path), "image")
    inside: list[bool] = []

    @contextmanager
    def predicting(variant: str | None = None):  # type: ignore[no-untyped-def]
        inside.append(True)
        yield
        inside.append(False)

    logits = bench.method.logits
    bench.method.predicting = predicting
    bench.method.logits = lambda batch, given: logits(batch, given) if inside[-1] else None
    bench.learn(TaskData.of(bench.backbone, toy_images("ab", 3, seed=4), {"a": 0, "b": 1}))
    assert inside == [True, False] * 2


def test_keep_best_is_refused_where_other_weights_predict(tmp_path: Path) -> None:
    bench = Bench(tiny_model("vit", tmp_path), "image", training={"keep_best": True})
    bench.method.variants = ("stable", "plastic")
    with pytest.raises(UnsupportedError, match="keep_best would bring back the trained weights alone"):
        bench.learn()


def test_rows_of_a_language_model_are_those_that_were_encoded(llama: Path) -> None:
    backbone = load_backbone(llama, kind="causal_lm", max_length=16)
    examples = language_rows(4)
    inputs = (task("say", "red"), task("say", ""), text("a" * 40))
    data = TaskData.of(backbone, examples.__class__("language", inputs, None, examples.ids[:3]), {})
    assert len(data) == len(data.encoded) == len(data.labels) == len(data.ids) > 3, "a long text becomes blocks"
    assert not data.labels.any() and data.ids.tolist() == data.encoded.ids.tolist()


def test_nothing_left_to_learn_is_an_error(llama: Path) -> None:
    backbone = load_backbone(llama, kind="causal_lm")
    examples = language_rows(4, plain=False)
    with pytest.MonkeyPatch.context() as patch:
        encoded = backbone.encode(examples.inputs, examples.ids).select([])
        patch.setattr(backbone, "encode", lambda inputs, ids: encoded)
        with pytest.raises(DataError, match="none of the 4 rows has a token to learn from"):
            TaskData.of(backbone, examples, {})


def test_a_classifier_needs_labels(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_model("vit", tmp_path))
    rows = toy_images("ab", 2)
    with pytest.raises(DataError, match="the rows carry no labels"):
        TaskData.of(backbone, rows.__class__("image", rows.inputs, None, rows.ids), {})
