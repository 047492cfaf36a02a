"""A step in pieces: the gradient of the whole, whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everlora.errors import NumericError, UnsupportedError
from everlora.methods.base import Loss, Recalled
from everlora.streams.keyed import fold_key
from everlora.training.pieces import own_pieces, split_step
from tests.methods.conv_builders import save_resnet
from tests.toy import tiny_model
from tests.training.builders import Bench, distance, save_language_model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("llama"))


def _step(folder: Path, kind: str, count: int, *, recall: int = 0, **training: object) -> Bench:
    bench = Bench(folder, kind, training={"max_steps": 1, "dropout": False, "micro_batches": count, **training})
    if recall:
        bench.recall(recall)
        bench.method.loss = _with_memory(bench)
    bench.learn()
    return bench


def _with_memory(bench: Bench):  # type: ignore[no-untyped-def]
    """The loss over current and memory rows together, and a term over the memory alone."""
    method, plain = bench.method, bench.method.loss

    def loss(batch):  # type: ignore[no-untyped-def]
        if batch.memory is None:
            return plain(batch)
        parts = [(method.features(part), part.labels) for part in (batch, batch.memory)]
        if bench.backbone.modality == "language":
            places = [labels[:, 1:] != -100 for _, labels in parts]
            pairs = zip(parts, places, strict=True)
            scores = torch.cat([method.heads.logits(features[:, :-1][at]) for (features, _), at in pairs])
            wanted = torch.cat([labels[:, 1:][at] for (_, labels), at in zip(parts, places, strict=True)])
            mask = batch.memory.inputs["attention_mask"].bool()
            term = parts[1][0][mask].square().sum(dim=1).mean()
        else:
            scores = method.heads.row_logits(torch.cat([features for features, _ in parts]))
            wanted = torch.cat([labels for _, labels in parts])
            term = parts[1][0].square().sum(dim=1).mean()
        own = torch.nn.functional.cross_entropy(scores, wanted)
        return Loss(own + 0.5 * (batch.share.memory / batch.share.supervised) * term)

    return loss


@pytest.mark.parametrize("recall", [0, 5])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_any_number_of_pieces_gives_the_gradient_of_the_whole(kind: str, recall: int, vit: Path, bert: Path) -> None:
    folder = vit if kind == "image" else bert
    whole = _step(folder, kind, 1, recall=recall)
    for count in (2, 3, 4, 100):
        parts = _step(folder, kind, count, recall=recall)
        assert distance(whole.gradients[0], parts.gradients[0]) < 1e-6
        if not recall:
            assert [len(batch.labels) for batch in parts.batches] == {2: [4, 4], 3: [3, 3, 2], 4: [2] * 4}.get(
                count, [1] * 8
            )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("recall", [0, 5])
def test_tokens_and_not_rows_weigh_the_pieces_of_a_language_model(recall: int, packing: bool, llama: Path) -> None:
    whole = _step(llama, "language", 1, recall=recall)
    for count in (1, 2, 4):
        parts = _step(llama, "language", count, recall=recall, packing=packing)
        assert distance(whole.gradients[0], parts.gradients[0]) < (3e-6 if packing else 1e-6)
    if not recall:
        shares = [batch.share.supervised for batch in parts.batches]
        assert sum(shares) == pytest.approx(1, abs=1e-12) and max(shares) > 1.2 * min(shares), "the rows are ragged"
        labels = [int((batch.labels[:, 1:] != -100).sum()) for batch in parts.batches]
        assert shares == pytest.approx([count / sum(labels) for count in labels])


@pytest.mark.slow
def test_pieces_of_the_small_story_teller(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    whole, *others = (_step(folder, "language", count, recall=5) for count in (1, 2, 4))
    assert all(distance(whole.gradients[0], parts.gradients[0]) < 1e-6 for parts in others)


def test_packed_rows_take_fewer_lines_and_memory_rows_are_never_packed(llama: Path) -> None:
    bench = Bench(llama, "language", training={"max_steps": 1, "packing": True})
    bench.recall(4)
    bench.learn()
    batch = bench.batches[0]
    assert batch.memory is not None and batch.rows is not None
    assert "segments" in batch.inputs and len(batch.labels) < len(batch.rows) == 8
    assert "segments" not in batch.memory.inputs and len(batch.memory.labels) == 4


def test_labels_of_a_language_model_come_with_its_tokens(llama: Path) -> None:
    bench = Bench(llama, "language")
    batch = bench.trainer.batch(bench.data, torch.arange(3), epoch=None)
    assert batch.labels.shape == batch.inputs["input_ids"].shape and "labels" not in batch.inputs
    known = batch.labels != -100
    assert torch.equal(batch.labels[known], batch.inputs["input_ids"][known]) and 0 < int(known.sum()) < known.numel()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_begins_and_ends_once(count: int, vit: Path) -> None:
    bench = Bench(vit, "image", training={"micro_batches": count, "epochs": 2})
    seen: list[torch.Tensor] = []
    bench.method.before_step = lambda rows: seen.append(rows) or bench.events.append("before_step")
    report = bench.learn()
    assert report.steps == 6 and bench.events == ["before_step", *["loss"] * count, "after_step"] * 6
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(24)), "the rows of the whole step, not of a piece"


def test_a_step_without_pieces_is_not_touched(vit: Path) -> None:
    bench = Bench(vit, "image", training={"max_steps": 2})
    losses: list[float] = []
    plain = bench.method.loss
    bench.method.loss = lambda batch: losses.append(plain(batch).value.item()) or plain(batch)
    report = bench.learn()
    assert bench.batches[0].share.supervised == 1.0 == bench.batches[0].share.memory
    assert report.log[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)


def test_the_loss_in_the_log_is_that_of_the_whole_step(llama: Path) -> None:
    benches = (Bench(llama, "language", training={"max_steps": 1, "micro_batches": count}) for count in (1, 4))
    one, many = (bench.learn().log[0]["loss"] for bench in benches)
    assert one == pytest.approx(many, rel=1e-6)


def test_dropout_is_drawn_for_each_piece_by_its_own_key(vit: Path) -> None:
    seeds: list[int] = []
    for count in (1, 2):
        bench = Bench(vit, "image", training={"max_steps": 1, "micro_batches": count})
        plain = bench.method.loss
        bench.method.loss = lambda batch, plain=plain: seeds.append(torch.initial_seed()) or plain(batch)
        bench.learn()
    key = (1993, 0, 0, 0)
    assert seeds == [fold_key(*key), fold_key(*key, 0), fold_key(*key, 1)]


def test_rows_of_earlier_tasks_are_drawn_once_and_shared_out(vit: Path) -> None:
    bench = Bench(vit, "image", training={"max_steps": 1, "micro_batches": 4})
    rows, asked = torch.arange(6), []
    kept = Recalled(bench.data.encoded.select(rows), bench.data.labels[rows], torch.zeros(6, dtype=torch.long))
    bench.method.recall = lambda count, generator: asked.append(count) or kept
    bench.learn()
    assert asked == [8]
    memories = [batch.memory for batch in bench.batches]
    assert [0 if memory is None else len(memory.labels) for memory in memories] == [2, 2, 1, 1]
    assert sum(batch.share.memory for batch in bench.batches) == pytest.approx(1)
    assert [batch.share.supervised for batch in bench.batches] == pytest.approx([4 / 14, 4 / 14, 3 / 14, 3 / 14])
    pixels = torch.cat([memory.inputs["pixel_values"] for memory in memories if memory is not None])
    assert torch.equal(pixels, bench.backbone.collate(bench.data.encoded, rows)["pixel_values"])


def test_pieces_are_shared_out_among_processes(vit: Path) -> None:
    bench = Bench(vit, "image")
    pieces = split_step(bench.backbone, bench.data.encoded, torch.arange(8), None, 4)
    numbers = [[piece.number for piece in own_pieces(pieces, rank, 2)] for rank in range(2)]
    assert numbers == [[0, 1], [2, 3]]
    few = split_step(bench.backbone, bench.data.encoded, torch.arange(1), None, 4)
    assert [len(own_pieces(few, rank, 3)) for rank in range(3)] == [1, 0, 0] and few[0].share.supervised == 1


def test_moving_batch_norms_refuse_pieces_and_frozen_ones_do_not(tmp_path: Path) -> None:
    folder = save_resnet(tmp_path)
    options = {"training": {"micro_batches": 2, "max_steps": 1}, "train": "all"}
    with pytest.raises(UnsupportedError, match="found 1 processes with 2 micro-batches"):
        Bench(folder, "image", **options).learn()
    assert Bench(folder, "image", bn="affine_only", **options).learn().steps == 1


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(vit: Path) -> None:
    bench = Bench(vit, "image", training={"micro_batches": 2, "max_steps": 1})
    plain = bench.method.loss
    second = iter([1.0, torch.inf])
    bench.method.loss = lambda batch: Loss(plain(batch).value * next(second))
    before: dict[str, torch.Tensor] = {}
    bench.method.before_step = lambda rows: before.update(
        {k: v.clone() for k, v in bench.backbone.state_dict().items()}
    )
    with pytest.raises(NumericError, match="task 'first' is inf at step 0"):
        bench.learn()
    after = bench.backbone.state_dict()
    assert before and all(torch.equal(after[key], value) for key, value in before.items())
    assert "after_step" not in bench.events
