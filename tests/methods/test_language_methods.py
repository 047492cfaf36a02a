"""Every method for causal language models, on a small real one: training, memory, folders, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from everlora import Learner
from everlora.adapters import adopt_at_start
from everlora.earlier_models import continue_earlier
from everlora.errors import (
    EverloraError,
    ModelError,
    OptionError,
    ShapeError,
    StoreError,
    TargetError,
    UnsupportedError,
)
from everlora.methods import list_methods, method_spec
from everlora.methods.lwf import Teacher
from everlora.store import LearnerStore
from everlora.streams import concatenate
from tests.methods.language_builders import FAST, LanguageBench, language_task, same
from tests.methods.test_contract import LANGUAGE_ROWS, ROWS

TINY: dict[str, Any] = {**FAST, "epochs": 1, "max_length": 64, "max_new_tokens": 6}
# methods of one network per task, or of frozen features, which a language model has no use for
REFUSED = tuple(dict.fromkeys(name for name, _ in ROWS if name not in {row for row, _ in LANGUAGE_ROWS}))
# rows that go the ways of others, which only the slow tests go again
VARIANTS = ("inflora_opt", "sd_lora_rr", "sd_lora_kd")
ALIKE = ("sequential", "lwf", "inflora", "sd_lora")


def _rows(slow: Collection[str]) -> list[Any]:
    """The methods, those named and all but two variants of one marked as slow."""
    rows = []
    for place, (name, options) in enumerate(LANGUAGE_ROWS):
        late = name in slow or (name == "i_lora" and place > 1)
        rows.append(pytest.param(name, options, marks=[pytest.mark.slow] if late else []))
    return rows


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def _learner(folder: Path, stories: Path, method: str, **options: Any) -> Learner:
    return Learner.create(folder, model=stories, method=method, scenario="language", **{**TINY, **options})


def _learn(learner: Learner, count: int, **training: Any) -> None:
    for index in range(len(learner.tasks), count):
        learner.learn(language_task(index), name=f"task {index}", **training)


def _logits(learner: Learner, variant: str | None = None) -> Tensor:
    """Scores of all tokens of some prompts."""
    prompts = learner.backbone.inputs.collate_prompts([[1, 403, 407, 261], [1, 378]], device=torch.device("cpu"))
    learner.backbone.eval()
    with torch.no_grad(), learner.method.predicting(variant):
        return learner.model(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"]).logits


# what all of them promise


@pytest.mark.parametrize(("name", "options"), _rows(VARIANTS))
def test_learns_leaves_the_base_alone_and_reopens_to_the_same_answers(
    name: str, options: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    learner = _learner(tmp_path / "learner", stories, name, **options)
    factors = {"up", "down", "past_up", "past_down", "past_scale", "past_ranks"}

    def base() -> dict[str, Tensor]:
        state = learner.model.state_dict().items()
        return {k: v.clone() for k, v in state if k.rpartition(".")[2] not in factors}

    before, start = base(), _logits(learner)
    if learner.trains_on == "stream":
        learner.learn(concatenate([language_task(0), language_task(1)]), name="all")
    else:
        _learn(learner, 2)
    assert same(before, base()) and not torch.equal(start, _logits(learner))
    again = Learner.open(tmp_path / "learner")
    torch.testing.assert_close(_logits(again), _logits(learner), rtol=1e-4, atol=1e-4)
    assert again.generate(["once upon a"]) == learner.generate(["once upon a"])
    assert LearnerStore.open(tmp_path / "learner").read_task(0).log()


@pytest.mark.parametrize(("name", "options"), [row for row in _rows({*VARIANTS, *ALIKE}) if row.values[0] != "joint"])
def test_a_new_process_goes_on_as_if_uninterrupted(
    name: str, options: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    whole = _learner(tmp_path / "whole", stories, name, **options)
    _learn(whole, 2)
    parts = _learner(tmp_path / "parts", stories, name, **options)
    _learn(parts, 1)
    torch.manual_seed(99)  # whatever ran before must not matter
    last = Learner.open(tmp_path / "parts")
    _learn(last, 2)
    assert last.digest == whole.digest
    assert [entry.name for entry in last.rollback(1)] == ["task 1"]
    _learn(last, 2)
    assert last.digest == whole.digest


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_here_is_refused_in_a_sentence(name: str, stories: Path, tmp_path: Path) -> None:
    with pytest.raises(EverloraError, match=r"language") as refusal:
        _learner(tmp_path / "learner", stories, name)
    assert "\n" not in str(refusal.value) and not (tmp_path / "learner").exists()


def test_every_method_is_for_language_or_refused() -> None:
    for entry in list_methods():
        suits = "language" in method_spec(entry.name).method_class.suits
        assert suits == (entry.name not in REFUSED) or entry.name == "probe", entry.name
    assert method_spec("i_lora").method_class.suits == {"language"}


# losses


def test_fisher_information_of_each_row(stories: Path) -> None:
    bench = LanguageBench(stories, "ewc", 1, training={"epochs": 1}, normalize_fisher=False, fisher_samples=None)
    bench.learn(0)
    bench.backbone.eval()
    trained = bench.method.tuned.named_parameters()
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row in range(8):
        batch = bench.batch(0, [row])
        scores = bench.method.logits(batch)[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(scores, batch.labels[:, 1:].flatten())  # the mean over the row's tokens
        for total, gradient in zip(sums.values(), torch.autograd.grad(loss, list(trained.values())), strict=True):
            total += gradient.square() / 8
    for name, value in bench.method.importance.items():
        torch.testing.assert_close(value, sums[name], rtol=1e-3, atol=1e-7)
    normal = LanguageBench(stories, "ewc", 1, training={"epochs": 1}, fisher_samples=3)
    normal.learn(0)
    assert float(torch.cat([v.flatten() for v in normal.method.importance.values()]).mean()) == pytest.approx(
        1, rel=1e-4
    )


def test_distillation_over_supervised_tokens(stories: Path) -> None:
    bench = LanguageBench(stories, "lwf", 2, training={"epochs": 1}, temperature=2.0, lwf_lambda=1.0)
    bench.learn(0)
    batch = bench.batch(1, [0, 1, 2])
    bench.backbone.eval()
    with torch.no_grad():
        old = bench.method.logits(batch)
    bench.begin(1)
    for layer in bench.method.layers().values():
        with torch.no_grad():
            layer.up.add_(0.05)
    bench.backbone.eval()
    new = bench.method.logits(batch)
    places = batch.labels[:, 1:] != -100
    teacher, student = old[:, :-1][places], new[:, :-1][places]
    own = functional.cross_entropy(student, batch.labels[:, 1:][places])
    p, q = (z.div(2).softmax(dim=1) for z in (teacher, student))
    kept = 4 * (p * (p.log() - q.log())).sum(dim=1).mean()
    loss = bench.method.loss(batch)
    assert isinstance(bench.method.teacher, Teacher)
    assert loss.terms["distillation"] == pytest.approx(float(kept.detach()), rel=1e-4) and float(kept.detach()) > 0
    assert float(loss.value.detach()) == pytest.approx(float((own + kept).detach()), rel=1e-5)


def test_replay_balances_tasks_and_sees_both_parts(stories: Path) -> None:
    bench = LanguageBench(stories, "replay", training={"epochs": 1}, size=10, balanced=True)
    bench.learn(0, 1, 2)
    assert sorted(bench.method.panels()["buffer_rows"].values()) == [3.0, 3.0, 4.0]
    assert bench.method.buffer.state()["rows/token_ids"].dtype == torch.uint16


@pytest.mark.slow
def test_all_rows_at_once_is_better_than_in_turn(stories: Path) -> None:
    data = [language_task(index, 8) for index in range(3)]
    every = LanguageBench(stories, "joint", 1, data=[concatenate(data)], training={"epochs": 4})
    every.learn(0)
    turn = LanguageBench(stories, "sequential", 3, data=data, training={"epochs": 4})
    turn.learn(0, 1, 2)

    def loss(bench: LanguageBench) -> float:
        bench.backbone.eval()
        batch = turn.batch(0, list(range(8)))
        with torch.no_grad():
            return float(bench.method.heads.loss(bench.method.features(batch), batch.labels))

    assert loss(every) < loss(turn)


# folders


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_each_folder_loads_with_plain_peft_and_gives_the_same_scores(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora", epochs=2)
    _learn(learner, 2)
    folder = sorted((tmp_path / "learner" / "tasks").iterdir())[-1]
    assert not (folder / "adapter_config.json").exists(), "neither adapter is the one of the folder itself"
    scores = {}
    prompts = learner.backbone.inputs.collate_prompts([[1, 403, 407, 261], [1, 378]], device=torch.device("cpu"))
    for name in ("stable", "plastic"):
        plain = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(stories), folder / name
        )
        with torch.no_grad():
            scores[name] = plain.eval()(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"]).logits
        torch.testing.assert_close(scores[name], _logits(learner, name), rtol=1e-4, atol=1e-4)
        opened = Learner.open(tmp_path / "learner")
        assert torch.equal(_logits(opened, name), _logits(learner, name)), "bit for bit"
        assert {file.name for file in (folder / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not torch.allclose(scores["stable"], scores["plastic"], atol=1e-3)


def test_a_changed_byte_is_noticed(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora")
    _learn(learner, 1)
    for file in ("tasks/000-task-0/stable/adapter_model.safetensors", "state/000/arrays.safetensors"):
        path = tmp_path / "learner" / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StoreError):
            Learner.open(tmp_path / "learner")
        path.write_bytes(content)
    Learner.open(tmp_path / "learner")


def test_without_its_buffer_a_learner_predicts_and_learns_no_more(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora", save_buffer=False)
    _learn(learner, 2)  # in one go it has its memory
    names = [
        file
        for path in (tmp_path / "learner" / "state").iterdir()
        for file in json.loads((path / "state.json").read_text())["files"]
    ]
    arrays, values = LearnerStore.open(tmp_path / "learner").read_state()
    assert names and not any("buffer" in key or "token" in key for key in (*arrays, *values))
    again = Learner.open(tmp_path / "learner")
    assert again.generate(["once"]) == learner.generate(["once"])
    with pytest.raises(UnsupportedError, match="save_buffer=False"):
        _learn(again, 3)


def test_no_adapter_folder_holds_rows(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora")
    _learn(learner, 2)
    store = LearnerStore.open(tmp_path / "learner")
    for entry in store.tasks:
        files = store.read_task(entry.index).files
        assert not any(
            "buffer" in name or "token" in name
            for file in files
            if "adapter_model" in file
            for name in store.read_task(entry.index).arrays(file)
        )
    assert any(name == "buffer/rows/token_ids" for name in store.read_state()[0])
    assert store.read_state()[0]["buffer/rows/token_ids"].dtype == np.uint16


def test_an_unsaved_stable_adapter_is_remembered_all_the_same(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora", save_ema_adapter=False, ema_alpha=0.5)
    _learn(learner, 2)
    assert [
        path.name for path in sorted((tmp_path / "learner" / "tasks" / "001-task-1").iterdir()) if path.is_dir()
    ] == ["plastic"]
    assert torch.equal(_logits(Learner.open(tmp_path / "learner")), _logits(learner))
    named = _learner(tmp_path / "named", stories, "i_lora", ema_adapter_path="slow")
    _learn(named, 1)
    assert (tmp_path / "named" / "tasks" / "000-task-0" / "slow" / "adapter_config.json").is_file()
    assert torch.equal(_logits(Learner.open(tmp_path / "named")), _logits(named))


def test_the_optimiser_goes_on_where_asked(stories: Path, tmp_path: Path) -> None:
    whole = _learner(tmp_path / "whole", stories, "i_lora", reset_optimizer=False)
    _learn(whole, 2)
    parts = _learner(tmp_path / "parts", stories, "i_lora", reset_optimizer=False)
    _learn(parts, 1)
    assert any(key.startswith("optimizer/") for key in parts.method.state())
    parts = Learner.open(tmp_path / "parts")
    _learn(parts, 2)
    assert parts.digest == whole.digest
    anew = _learner(tmp_path / "anew", stories, "i_lora")
    _learn(anew, 2)
    assert not same(*(dict(x.model.named_parameters()) for x in (anew, whole)))


def test_the_buffer_forgets_and_filters(stories: Path, tmp_path: Path) -> None:
    learner = _learner(tmp_path / "learner", stories, "i_lora")
    decode = learner.backbone.inputs.decode
    learner.method.rehearsal.buffer.buffer_filter = lambda row: "dog" not in decode(row.token_ids)
    _learn(learner, 1)
    buffer = learner.method.rehearsal.buffer
    texts = [decode(buffer.draw(8, torch.Generator())[0].row(i)) for i in range(len(buffer))]
    assert 0 < len(texts) < 8 and not any("dog" in text for text in texts)
    before = len(buffer)
    gone = buffer.forget(lambda row, place: " a" in decode(row.token_ids))
    assert gone == sum(" a" in text for text in texts) and len(buffer) == before - gone
    assert 0 < gone < before and len(buffer.state()["rows/ids"]) == len(buffer)


# going on from an earlier run


def _method(stories: Path, **options: Any) -> LanguageBench:
    return LanguageBench(stories, "i_lora", 2, training={"epochs": 1}, **options)


@pytest.fixture(scope="module")
def earlier(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "learner"
    learner = _learner(folder, shared / "models" / "stories260K", "i_lora", ema_alpha=0.5)
    _learn(learner, 2)
    return folder


def test_goes_on_from_a_learner_with_all_it_remembers(stories: Path, earlier: Path) -> None:
    before = Learner.open(earlier).method
    bench = _method(stories, ema_alpha=0.5, previous_task_model=str(earlier), prev_task_id="task-001")
    assert continue_earlier(bench.method)
    assert bench.method.average.updates == before.average.updates == 4
    assert bench.method.rehearsal.buffer.state().keys() == before.rehearsal.buffer.state().keys()
    for mine, theirs in zip(bench.method.stable.factors().values(), before.stable.factors().values(), strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    bench.begin(0)
    assert len(bench.method.recall(8, torch.Generator()).labels) == 8, "rows of the earlier run come back"
    bench = _method(stories, ema_alpha=0.5, previous_task_model=str(earlier), prev_task_id="task-001")
    continue_earlier(bench.method)
    bench.learn(0)
    assert [entry["id"] for entry in bench.method.history.entries] == ["task-000", "task-001", "task-002"]
    assert bench.method.panels()["buffer_rows"] == {"task 0": 8.0, "task 1": 8.0, "task 2": 8.0}
    fresh = _method(stories, ema_alpha=0.5, previous_task_model=str(earlier), prev_task_id="task-001")
    fresh.method.load_state(bench.method.state())
    assert same(fresh.stable(), bench.stable()) and same(fresh.factors(), bench.factors())


def test_one_task_of_a_learner_and_plain_folders(stories: Path, earlier: Path, tmp_path: Path) -> None:
    first = _method(stories, previous_task_model=str(earlier / "tasks" / "000-task-0"), prev_task_id="task-000")
    continue_earlier(first.method)
    assert first.method.average.updates == 2 and len(first.method.history.entries) == 1
    task = earlier / "tasks" / "001-task-1"
    folder = tmp_path / "copied"
    for name, target in (("plastic", "plastic"), ("stable", "ema")):
        (folder / target).mkdir(parents=True)
        for file in (task / name).iterdir():
            (folder / target / file.name).write_bytes(file.read_bytes())
    pair = _method(stories, previous_task_model=str(folder), prev_task_id="anything")
    with pytest.warns(UserWarning, match="adapters alone"):
        continue_earlier(pair.method)
    assert not same(pair.stable(), pair.factors()) and pair.method.average.updates == 0
    elsewhere = _method(
        stories, previous_task_model=str(task / "plastic"), ema_adapter_path=str(task / "stable"), prev_task_id="x"
    )
    with pytest.warns(UserWarning, match="adapters alone"):
        continue_earlier(elsewhere.method)
    assert same(elsewhere.stable(), pair.stable()) and same(elsewhere.factors(), pair.factors())
    bare = _method(stories, previous_task_model=str(task / "plastic"))
    with pytest.warns(UserWarning, match="adapters alone"):
        continue_earlier(bare.method)
    assert same(bare.stable(), bare.factors()) and same(bare.factors(), pair.factors())
    # how old the stable adapter is, nobody knows: it is no copy to begin a warm-up with
    known = {name: value.clone() for name, value in pair.stable().items()}
    with pytest.warns(UserWarning, match="will hardly know the task"):
        pair.learn(0)
    copied = _method(stories, previous_task_model=str(folder), prev_task_id="anything")
    copied.method.load_state(pair.method.state())
    assert copied.method.average.settled and pair.method.average.updates > 0
    for name, value in pair.stable().items():
        assert float((value - known[name]).norm()) < 0.01 * float((value - pair.factors()[name]).norm()), name


def test_what_does_not_fit_is_refused(stories: Path, earlier: Path, tmp_path: Path) -> None:
    def refuse(error: type[Exception], match: str, base: str | None = None, **options: Any) -> None:
        named = {"previous_task_model": str(earlier), "prev_task_id": "task-001", **options}
        with pytest.raises(error, match=match):
            continue_earlier(_method(stories, **named).method, base_sha256=base)

    refuse(OptionError, "prev_task_id", prev_task_id=None)
    refuse(OptionError, "found 'task-001'", prev_task_id="task-000")
    refuse(OptionError, "alpha / rank", alpha=4)
    refuse(OptionError, "kept 16 rows of its tasks, more than ilora_buffer_size=4", ilora_buffer_size=4)
    refuse(ShapeError, "rank", rank=4, alpha=8)
    refuse(TargetError, "targets", targets=("q_proj",))
    refuse(StoreError, "no folder", previous_task_model=str(tmp_path / "none"))
    refuse(StoreError, "adapter", previous_task_model=str(tmp_path))
    refuse(ModelError, "another base model", base="0" * 64)
    only = tmp_path / "only"
    (only / "plastic").mkdir(parents=True)
    for file in (earlier / "tasks" / "001-task-1" / "plastic").iterdir():
        (only / "plastic" / file.name).write_bytes(file.read_bytes())
    refuse(StoreError, "only/stable, .*only/ema, .*only/ema_adapter", previous_task_model=str(only))
    unread = _method(stories, previous_task_model=str(earlier), prev_task_id="task-001")
    with pytest.raises(OptionError, match="was not read"):
        unread.begin(0)


def test_a_learner_made_for_it_reads_the_folder_when_it_is_opened(stories: Path, earlier: Path, tmp_path: Path) -> None:
    options = {"previous_task_model": os.path.relpath(earlier), "prev_task_id": "task-001", "ema_alpha": 0.5}
    made = _learner(tmp_path / "next", stories, "i_lora", **options)
    assert made.settings.method_options.previous_task_model == str(earlier.resolve())
    learner = Learner.open(tmp_path / "next")
    assert learner.method.average.updates == 4
    _learn(learner, 1)
    assert Learner.open(tmp_path / "next").method.history.entries[-1]["id"] == "task-002"
    both = copy.deepcopy(learner.settings)
    object.__setattr__(both.learner, "start_from", str(earlier / "tasks" / "001-task-1" / "plastic"))
    with pytest.raises(OptionError, match="name one of them"):
        adopt_at_start(both, _method(stories, **options).method, learner.model)


def test_rows_of_an_earlier_run_are_cut_to_what_the_model_takes_now(
    stories: Path, earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"previous_task_model": str(earlier), "prev_task_id": "task-001", "ema_alpha": 0.5, "max_length": 24}
    _learner(tmp_path / "next", stories, "i_lora", **options, batch_size=2)
    learner = Learner.open(tmp_path / "next")
    assert "are cut" in caplog.text and len(learner.method.rehearsal.buffer) == 16
    _learn(learner, 1)
    lengths = learner.method.rehearsal.buffer.state()["rows/offsets"].diff()
    assert int(lengths.max()) == 24


def test_a_plain_adapter_starts_both(stories: Path, earlier: Path, tmp_path: Path) -> None:
    start = str(earlier / "tasks" / "001-task-1" / "plastic")
    learner = _learner(tmp_path / "learner", stories, "i_lora", start_from=start)
    assert torch.equal(_logits(learner, "stable"), _logits(learner, "plastic"))
    torch.testing.assert_close(_logits(learner), _logits(Learner.open(earlier), "plastic"), rtol=1e-4, atol=1e-4)
    _learn(learner, 1)
    assert not torch.equal(_logits(learner, "stable"), _logits(learner, "plastic"))
