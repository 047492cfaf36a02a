"""Forgetting on request: no byte of what was to be forgotten stays, and all else is as it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everlora import Learner
from everlora.doctor import examine
from everlora.errors import OptionError
from everlora.forgetting import is_request
from everlora.status import read_status
from everlora.store import LearnerStore
from everlora.streams import Examples, concatenate
from tests.toy import tiny_model, toy_images, toy_learner, toy_tasks, toy_texts

PERSON = "lost red parcel green card blue where lost"
LANGUAGE: dict[str, Any] = {
    "scenario": "language",
    "rank": 2,
    "batch_size": 4,
    "lr": 1e-2,
    "epochs": 1,
    "max_length": 48,
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def llama(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def _found(folder: Path, pieces: Iterable[bytes]) -> list[str]:
    """Files of a directory, whatever their kind, that hold one of the pieces."""
    data = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = list(pieces)
    return [str(path) for path, content in data.items() if any(piece in content for piece in wanted)]


def _pieces(learner: Learner, examples: Examples) -> list[bytes]:
    """All forms in which rows may lie on the disk: as they came, and as they were encoded."""
    inputs = [x.encode() if isinstance(x, str) else np.ascontiguousarray(x).tobytes() for x in examples.inputs]
    encoded = learner.backbone.encode(examples.inputs, examples.ids)
    if hasattr(encoded, "images"):
        return inputs
    return inputs + [encoded.row(place).tobytes() for place in range(len(encoded))]


def _scores(learner: Learner, rows: Examples) -> list[dict[str, float]]:
    return [dict(prediction.scores) for prediction in learner.predict(rows)]


def _check(learner: Learner, digest: str) -> Learner:
    """What holds after every request that found something; returns the learner, opened again."""
    folder = learner.path
    opened = Learner.open(folder)
    assert opened.digest == learner.digest != digest
    assert [f for f in examine(folder) if f.severity == "broken"] == []
    assert not list(folder.rglob("*.tmp-*"))
    return opened


def test_images_of_a_class_leave_buffer_kept_rows_and_earlier_states(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "replay", size=16, balanced=True, keep_validation=3, keep_states="all")
    tasks = toy_tasks("image", 3)
    for task in tasks[:2]:
        learner.learn(task)
    gone = tasks[0].select(tasks[0].rows_by_label["class a"])
    pieces, others = _pieces(learner, gone), concatenate(tasks[:2])
    before, digest = _scores(learner, others), learner.digest
    assert len(_found(learner.path, pieces)) == 3  # the kept rows, and the buffer in both states
    done = learner.forget(label="class a", reason="asked for on paper")
    assert done.left["validation_rows"] == 3 and done.left["buffer_rows"] == 4
    assert done.left["earlier_buffer_rows"] == 8
    assert any("trained weights" in sentence for sentence in done.remaining)
    assert _found(learner.path, pieces) == []
    opened = _check(learner, digest)
    assert _scores(learner, others) == _scores(opened, others) == before  # trained rows of the head are no data
    [record] = read_status(learner.path)["forgotten"]
    assert record["left"] == dict(done.left) and record["reason"] == "asked for on paper"
    assert is_request(record, label="class a") and not is_request(record, label="class b")
    assert "class a" not in json.dumps(record)
    opened.learn(tasks[2])
    assert _found(learner.path, pieces) == [] and 0 not in opened.method.buffer.labels.tolist()  # type: ignore[attr-defined]
    assert opened.method.buffer.num_seen == 3 * 18  # type: ignore[attr-defined]
    opened.rollback(1)
    assert _found(learner.path, pieces) == [] and len(opened.method.buffer) == 8  # type: ignore[attr-defined]


def test_replay_never_draws_what_was_forgotten(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "replay", size=16)
    tasks = toy_tasks("image", 2)
    learner.learn(tasks[0])
    learner.forget(label="class a")
    drawn: list[torch.Tensor] = []
    buffer = learner.method.buffer  # type: ignore[attr-defined]
    draw = buffer.draw

    def watched(count: int, generator: torch.Generator) -> Any:
        rows = draw(count, generator)
        drawn.append(rows[1])
        return rows

    buffer.draw = watched
    learner.learn(tasks[1])
    assert drawn and not bool((torch.cat(drawn) == 0).any())


def test_a_text_of_a_person_leaves_though_only_its_tokens_were_kept(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "replay", size=100, keep_validation=4)
    first = toy_texts(["class a", "class b"])
    person = Examples("text", (PERSON,), np.array(["class a"], dtype=object), np.array([77]))
    learner.learn(concatenate([first, person]), validation=concatenate([toy_texts(["class a"], 3, seed=5), person]))
    pieces, digest = _pieces(learner, person), learner.digest
    assert len(_found(learner.path, pieces)) == 2
    rows = len(learner.method.buffer)  # type: ignore[attr-defined]
    done = learner.forget(where="RED parcel  green", task=0)
    assert done.left == {"buffer_rows": 1, "validation_rows": 1}
    assert _found(learner.path, pieces) == []
    opened = _check(learner, digest)
    assert len(opened.method.buffer) == rows - 1  # type: ignore[attr-defined]
    assert read_status(learner.path)["tasks"][0]["num_validation"] == 3
    opened.evaluate()
    opened.learn(toy_texts(["class c", "class d"], seed=2))


def test_words_the_tokenizer_does_not_know_are_no_reason_to_forget_others(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "replay", size=10)
    learner.learn(toy_texts(["class a", "class b"]))
    digest = learner.digest
    done = learner.forget(where="Zanzibar")
    assert not done.left and learner.digest == digest and read_status(learner.path)["forgotten"] == []
    assert any("does not know a word" in sentence for sentence in done.remaining)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_rows_that_are_given_leave(modality: str, vit: Path, bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit if modality == "image" else bert, "replay", size=100, keep_validation=2)
    [task] = toy_tasks(modality, 1)
    learner.learn(task)
    digest, data = learner.digest, task.select([0, 5, 20])
    before = len(learner.method.buffer)  # type: ignore[attr-defined]
    done = learner.forget(rows=data)
    assert sum(done.left.values()) >= 3
    if modality == "image":
        assert sum(done.left.values()) == 3 and _found(learner.path, _pieces(learner, data)) == []
    opened = _check(learner, digest)
    assert len(opened.method.buffer) == before - done.left["buffer_rows"]  # type: ignore[attr-defined]


def test_a_predicate_sees_kept_rows_and_buffer_rows(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "replay", size=100, keep_validation=2)
    for task in toy_tasks("image", 2):
        learner.learn(task, name=f"task {len(learner.tasks)}")
    seen: list[Any] = []

    def wanted(row: Any) -> bool:
        seen.append((row["task"], row["label"], row["image"].shape))
        return bool(row["task"] == "task 1" and row["row"] % 2 == 0)

    done = learner.forget(where=wanted)
    assert done.left["buffer_rows"] + done.left["validation_rows"] == 12
    assert {entry[0] for entry in seen} == {"task 0", "task 1"} and len({entry[1] for entry in seen}) == 4
    [record] = read_status(learner.path)["forgotten"]
    assert record["left"] == dict(done.left)


def test_rows_are_counted_from_one_and_columns_nobody_kept_are_said(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "probe", keep_validation=4)
    learner.learn(toy_tasks("text", 1)[0])
    kept = learner._kept_rows(0)
    assert kept is not None
    number, before = int(kept.ids[2]), len(kept)
    asked = learner.forget(where="customer=42")
    assert not asked.left
    expected = f"There is no column 'customer' to look at in {before} of the validation rows: they stay; give the rows."
    assert expected in asked.remaining
    assert not any("tokenizer" in sentence for sentence in asked.remaining)
    assert learner.forget(where=f"row={number + 1}").left == {"validation_rows": 1}
    left = learner._kept_rows(0)
    assert left is not None and sorted(left.ids) == sorted(set(kept.ids) - {number})
    status = read_status(learner.path)["tasks"][0]
    assert status["accuracy_now"] is None and status["accuracy_when_learned"] is not None


def test_rows_to_forget_need_no_labels(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "probe", keep_validation=4)
    learner.learn(toy_tasks("text", 1)[0])
    kept = learner._kept_rows(0)
    assert kept is not None
    (tmp_path / "gone.csv").write_text(f"\ntext\n{kept.inputs[1]}\n")
    assert learner.forget(rows=tmp_path / "gone.csv").left == {"validation_rows": 1}


def test_a_class_without_its_mean_is_not_predicted_any_more(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "ncm", keep_validation=2)
    tasks = toy_tasks("text", 2)
    for task in tasks:
        learner.learn(task)
    rows, digest = concatenate(tasks), learner.digest
    means = LearnerStore.open(learner.path).read_task(0).arrays("added.safetensors")["sums"]
    before = _scores(learner, rows)
    assert any(max(scores, key=scores.__getitem__) == "class a" for scores in before)
    done = learner.forget(label="class a")
    assert done.left == {"class_means": 1, "validation_rows": 2}
    assert _found(learner.path, [means[0].tobytes()]) == [] and _found(learner.path, [means[1].tobytes()])
    after = _scores(_check(learner, digest), rows)
    for was, now in zip(before, after, strict=True):
        rest = 1 - was["class a"]
        assert "class a" not in now and now == pytest.approx(
            {k: v / rest for k, v in was.items() if k in now}, abs=1e-5
        )
    learner.learn(toy_texts(["class a", "class h"], seed=7))  # it may be learned again
    assert "class a" in _scores(learner, rows)[0]


def test_rows_cannot_be_taken_out_of_a_mean_and_that_is_said(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "ncm", keep_validation=2)
    learner.learn(toy_texts(["class a", "class b"]))
    done = learner.forget(rows=learner._kept_rows(0), label="class a")
    assert set(done.left) == {"validation_rows"} and any("out of a sum" in sentence for sentence in done.remaining)


def test_when_all_are_forgotten_it_is_said(bert: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", bert, "ncm")
    learner.learn(toy_texts(["class a", "class b"]), name="one")
    learner.forget(task="one")
    with pytest.raises(ValueError, match="was forgotten on request"):
        learner.predict("where is my parcel")


def test_gaussians_of_a_class_leave(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "inflora", alignment=True, alignment_epochs=1)
    tasks = toy_tasks("image", 3)
    for task in tasks[:2]:
        learner.learn(task)
    rows, digest = concatenate(tasks[:2]), learner.digest
    arrays = LearnerStore.open(learner.path).read_task(0).arrays("added.safetensors")
    before = _scores(learner, rows)
    assert learner.forget(label="class a").left == {"gaussians": 1}
    assert _found(learner.path, [arrays["statistics/0/mean"].tobytes()]) == []
    assert _found(learner.path, [arrays["statistics/0/covariance"].tobytes()]) == []
    opened = _check(learner, digest)
    assert _scores(opened, rows) == before
    opened.learn(tasks[2])
    assert "class f" in opened.classes


@pytest.mark.parametrize("select", ["prototype", "mahalanobis"])
def test_prototypes_of_a_class_leave(select: str, vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "independent", select=select)
    tasks = toy_tasks("image", 3)
    for task in tasks[:2]:
        learner.learn(task)
    digest = learner.digest
    means = LearnerStore.open(learner.path).read_task(0).arrays("added.safetensors")["recognition/means"]
    done = learner.forget(label="class a")
    assert done.left == {"prototypes": 1}
    assert any("one sum over all classes" in sentence for sentence in done.remaining) == (select == "mahalanobis")
    assert _found(learner.path, [means[0].tobytes()]) == []
    opened = _check(learner, digest)
    opened.learn(tasks[2])
    assert opened.forget(label="class b").left == {"prototypes": 1}
    assert not opened.forget(label="class a").left  # once is enough
    names = {prediction.label for prediction in opened.predict(concatenate(tasks))}
    assert names and not names & {"class a", "class b"}  # a task none of whose classes is known is not recognised


@pytest.mark.slow
@pytest.mark.parametrize("method", ["replay", "i_lora"])
def test_rows_of_a_language_model_leave(method: str, llama: Path, tmp_path: Path) -> None:
    names = {"replay": "size", "i_lora": "ilora_buffer_size"}
    options = {**LANGUAGE, names[method]: 40, "keep_validation": 3, "keep_states": "all"}
    learner = Learner.create(tmp_path / "l", model=llama, method=method, **options)
    sums = [{"instruction": f"{i} and {j}", "output": f"{i + j} dogs"} for i in range(3) for j in range(3)]
    lily = {"instruction": "Where does Lily Brown live?", "output": "In the old mill by the sea.", "id": "u7"}
    learner.learn([*sums, lily], validation=[sums[0], lily], name="one")
    learner.learn([{"instruction": f"{i} less", "output": f"{i} cats"} for i in range(6)], name="two")
    row = json.dumps({**lily, "input": ""}, sort_keys=True)
    examples = Examples("language", (row,), None, np.array([0]))
    pieces, digest = _pieces(learner, examples), learner.digest
    assert len(_found(learner.path, pieces)) == 3
    before = learner.generate(["1 and 2"])
    assert learner.forget(where="id=u7").left == {"validation_rows": 1}  # tokens know no such column
    told = [sentence for sentence in learner.forget(where="id=u7").remaining if "no column 'id'" in sentence]
    assert len(told) == 2 and "of the rows in a buffer" in told[0] and "in 4 of the validation rows" in told[1]
    done = learner.forget(where="lily brown")
    assert done.left == {"buffer_rows": 1, "earlier_buffer_rows": 1}
    assert _found(learner.path, pieces) == []
    opened = _check(learner, digest)
    assert opened.generate(["1 and 2"]) == before
    assert opened.forget(where="output=2 dogs").left["buffer_rows"] == 3
    opened.learn([{"instruction": "again", "output": "yes"}] * 4, name="three")
    assert _found(learner.path, pieces) == []
    done = opened.forget(task="two")
    assert done.left["buffer_rows"] >= 3 and Learner.open(learner.path).digest == opened.digest


def test_given_rows_of_a_language_model_leave(llama: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=llama, method="i_lora", ilora_buffer_size=40, **LANGUAGE)
    rows = [
        {"instruction": f"{i} and {j}", "output": f"{i + j} dogs", "id": f"u{i}"} for i in range(3) for j in range(3)
    ]
    learner.learn(rows, validation=rows[4:6])
    done = learner.forget(rows=[{k: v for k, v in row.items() if k != "id"} for row in rows if row["id"] == "u1"])
    assert done.left == {"buffer_rows": 3, "validation_rows": 2}
    assert len(Learner.open(learner.path).method.rehearsal.buffer) == 6  # type: ignore[attr-defined]


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_an_unfinished_task_begins_anew(vit: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": 16, "insert": "online", "checkpoint_every": 1, "keep_validation": 2}
    tasks = toy_tasks("image", 2)
    learners = [toy_learner(tmp_path / name, vit, "replay", **options) for name in "ab"]
    for learner in learners:
        learner.learn(tasks[0], name="one")
    pieces = _pieces(learners[0], tasks[0].select(tasks[0].rows_by_label["class a"]))
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += stage.startswith("train")
        if calls == 3:
            raise _Stop

    with pytest.raises(_Stop):
        learners[0].learn(tasks[1], name="two", progress=stop)
    folder = learners[0].path
    assert any("checkpoint" in path for path in _found(folder, pieces))
    left = [Learner.open(learner.path).forget(label="class a").left for learner in learners]
    assert left[0]["checkpoints"] >= 1 and not (folder / "checkpoint").exists() and _found(folder, pieces) == []
    assert {k: v for k, v in left[0].items() if k != "checkpoints"} == left[1]
    digests = set()
    for learner in learners:
        opened = Learner.open(learner.path)
        opened.learn(tasks[1], name="two")
        digests.add(opened.digest)
    assert len(digests) == 1  # nothing of the interrupted attempt is in the result


def test_what_was_put_aside_before_is_looked_at_too(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "replay", size=16, keep_validation=2)
    tasks = toy_tasks("image", 2)
    for task in tasks:
        learner.learn(task)
    learner.rollback(1)
    gone = tasks[1].select(tasks[1].rows_by_label["class c"])
    pieces = _pieces(learner, gone)
    assert len(_found(learner.path / "removed", pieces)) == 2
    done = learner.forget(rows=gone)
    assert done.left == {"removed_files": 2} and _found(learner.path, pieces) == []
    assert Learner.open(learner.path).digest == learner.digest
    learner.learn(tasks[1])


def test_what_makes_no_sense_is_refused(vit: Path, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", vit, "replay", size=16)
    learner.learn(toy_images(["class a", "class b"]), name="one")
    digest = learner.digest
    with pytest.raises(OptionError, match="give label, where, task or rows"):
        learner.forget()
    with pytest.raises(OptionError, match="no label 'class z'; did you mean"):
        learner.forget(label="class z")
    with pytest.raises(OptionError, match="no task 'two'"):
        learner.forget(task="two")
    with pytest.raises(OptionError, match="says nothing to look for"):
        learner.forget(where="id= ")
    with pytest.raises(OptionError, match="the record keeps the reason"):
        learner.forget(where="Ada", reason="ada asked")
    assert learner.digest == digest == Learner.open(learner.path).digest
    done = learner.forget(where="Ada")
    assert not done.left and any("There is no text" in sentence for sentence in done.remaining)


def test_blocks_of_plain_text_are_looked_at_one_by_one(llama: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=llama, method="replay", size=40, **LANGUAGE)
    learner.learn([{"text": f"Once there was a dog with {number} bones. " * 4} for number in range(4)])
    before = len(learner.method.buffer)  # type: ignore[attr-defined]
    done = learner.forget(where="with 3 bones")
    assert 0 < done.left["buffer_rows"] < before
    assert any("blocks of tokens" in sentence for sentence in done.remaining)
