"""Every file of a learner directory damaged in every way: found before it is used, in one sentence."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.doctor import examine
from everlora.errors import StoreError
from everlora.store import LearnerStore
from tests.durability.damage import flip
from tests.methods.conv_builders import save_resnet
from tests.methods.language_builders import language_task
from tests.store.builders import snapshot
from tests.toy import toy_learner, toy_tasks

Damage = tuple[str, dict[str, bytes | None]]
"""What is done, and the new content of each file; None deletes it."""


@dataclass
class Subject:
    """A learner of three tasks, what it answers, and ways to ask for more of it."""

    folder: Path
    model: Path
    ask: Callable[[Learner], Any]
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.content = snapshot(self.folder)
        self.answers = self.ask(self.open())

    def open(self) -> Learner:
        return Learner.open(self.folder, model=self.model)

    def put(self, files: dict[str, bytes | None]) -> None:
        for name, data in files.items():
            if data is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(data)


def damages(content: dict[str, bytes], name: str) -> Iterator[Damage]:
    """All damages to one file: bits at the first, middle and last byte, cut short, gone, swapped with its like."""
    data = content[name]
    for where, position in (("first", 0), ("middle", len(data) // 2), ("last", -1)):
        yield f"flip the {where}", {name: flip(data, position, bit=len(data) % 7)}
    yield "cut", {name: data[: len(data) // 2]}
    yield "cut the last byte", {name: data[:-1]}
    yield "delete", {name: None}
    parts = name.split("/")
    for other in content:
        alike = other.split("/")
        if len(parts) > 2 and other > name and (alike[0], alike[2:]) == (parts[0], parts[2:]):
            if content[other] != data:
                yield f"swap with {other}", {name: content[other], other: data}


def sentence(error: BaseException) -> None:
    """An error must say what is wrong and what to do, in one sentence."""
    assert type(error) is StoreError
    text = str(error)
    assert "\n" not in text and 20 < len(text) < 400 and "Traceback" not in text


def use(subject: Subject, name: str) -> str:
    """Use the damaged learner in the order a user would; return what noticed the damage."""
    try:
        learner = subject.open()
    except StoreError as error:
        sentence(error)
        return "open"
    assert subject.ask(learner) == subject.answers, "never a silently different answer"
    last = name.rpartition("/")[2]
    with pytest.raises(StoreError) as caught:
        if last == "validation.safetensors":
            learner.evaluate()
        elif name.startswith("state/"):
            learner.rollback(int(name.split("/")[1]) + 1)
        elif last == "log.jsonl":
            LearnerStore.open(subject.folder).read_task(int(name[6:9])).log()
        else:
            LearnerStore.open(subject.folder).read_task(int(name[6:9])).document(name.split("/", 2)[2])
    sentence(caught.value)
    return {"validation.safetensors": "evaluate", "log.jsonl": "log"}.get(last, name.split("/")[0])


def ruin_everything(subject: Subject) -> None:
    """Damage every file in every way, one at a time; each must be noticed by whoever uses it, and by the doctor."""
    for name in subject.content:
        for what, files in damages(subject.content, name):
            subject.put(files)
            found = [one for one in examine(subject.folder, base=False) if one.severity == "broken"]
            assert found, f"the doctor found nothing: {what} {name}"
            assert any(one.file in files for one in found), f"{what} {name}: {found}"
            assert all(one.what and one.mend and "\n" not in str(one) for one in found)
            subject.counts[use(subject, name)] += 1
            subject.put({file: subject.content[file] for file in files})
    assert snapshot(subject.folder) == subject.content
    assert not [one for one in examine(subject.folder, base=False) if one.severity == "broken"]
    total = sum(subject.counts.values())
    print(f"{subject.folder.name}: {total} damages to {len(subject.content)} files, noticed by {dict(subject.counts)}")
    assert total > 5 * len(subject.content)


def classes(folder: Path, model: Path, method: str, kind: str, tasks: int = 2, **options: Any) -> Subject:
    learner = toy_learner(folder, model, method, epochs=1, keep_validation=2, **options)
    for number, task in enumerate(toy_tasks(kind, tasks)):
        learner.learn(task, name=f"task {number}")
    rows = toy_tasks(kind, 1)[0].select(range(4))
    return Subject(folder, model, lambda opened: [list(one.scores.items()) for one in opened.predict(rows)])


METHODS = {
    "inflora": ("bert", {}),
    "sd_lora": ("bert", {}),
    "replay": ("vit", {}),
    "convlora": ("resnet", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_every_file_of_a_learner(method: str, tiny_bert: Path, tiny_vit: Path, tmp_path: Path) -> None:
    kind, options = METHODS[method]
    (tmp_path / "resnet").mkdir()
    models = {"bert": tiny_bert, "vit": tiny_vit, "resnet": tmp_path / "resnet"}
    if kind == "resnet":
        save_resnet(tmp_path / "resnet")
    modality = "text" if kind == "bert" else "image"
    ruin_everything(classes(tmp_path / method, models[kind], method, modality, **options))


@pytest.mark.slow
def test_every_file_of_a_learner_of_language(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories260K"
    options = {"epochs": 1, "batch_size": 4, "max_length": 64, "max_new_tokens": 4, "rank": 2, "keep_validation": 2}
    learner = Learner.create(tmp_path / "i_lora", model=model, method="i_lora", scenario="language", **options)
    for number in range(2):
        learner.learn(language_task(number), name=f"task {number}")
    rows = language_task(0).select(range(2))
    ruin_everything(Subject(tmp_path / "i_lora", model, lambda opened: opened.evaluate(rows).cross_entropy))


def test_one_damage_to_each_file(tiny_bert: Path, tmp_path: Path) -> None:
    subject = classes(tmp_path / "learner", tiny_bert, "sequential", "text")
    kinds = itertools.cycle(range(6))
    for name in subject.content:
        what, files = list(damages(subject.content, name))[next(kinds)]
        subject.put(files)
        found = [one for one in examine(subject.folder, base=False) if one.severity == "broken"]
        assert any(one.file in files for one in found), f"{what} {name}"
        use(subject, name)
        subject.put({file: subject.content[file] for file in files})
    assert snapshot(subject.folder) == subject.content


def test_learning_on_refuses_damaged_kept_rows_and_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    subject = classes(tmp_path / "learner", tiny_bert, "sequential", "text", tasks=1)
    subject.put({"tasks/000-task-0/validation.safetensors": None})
    before = snapshot(subject.folder)
    with pytest.raises(StoreError, match=r"validation\.safetensors is missing"):
        subject.open().learn(toy_tasks("text", 2)[1], name="task 1")
    after = {name: data for name, data in snapshot(subject.folder).items() if not name.startswith("checkpoint/")}
    assert after == before


def test_whole_folders_swapped_or_gone(tiny_bert: Path, tmp_path: Path) -> None:
    subject = classes(tmp_path / "learner", tiny_bert, "sequential", "text")
    pairs = (("tasks/000-task-0", "tasks/001-task-1"), ("state/000", "state/001"))
    for first, second in pairs:
        one, other = subject.folder / first, subject.folder / second
        one.rename(tmp_path / "aside")
        with pytest.raises(StoreError, match=r"is missing|no longer|wrong checksum"):
            subject.open().rollback(1)
        other.rename(one)
        (tmp_path / "aside").rename(other)
        with pytest.raises(StoreError, match="wrong checksum"):
            subject.open()
        other.rename(tmp_path / "aside")
        one.rename(other)
        (tmp_path / "aside").rename(one)
    assert subject.ask(subject.open()) == subject.answers


def test_the_lock_may_be_lost(tiny_bert: Path, tmp_path: Path) -> None:
    subject = classes(tmp_path / "learner", tiny_bert, "sequential", "text", tasks=1)
    for change in (lambda lock: lock.unlink(missing_ok=True), lambda lock: lock.write_bytes(b"anything")):
        change(subject.folder / ".lock")
        assert subject.ask(subject.open()) == subject.answers
        assert not [one for one in examine(subject.folder, base=False) if one.severity != "note"]
    shutil.rmtree(subject.folder / ".lock", ignore_errors=True)
