"""What every method promises, whatever it does: one row per registered name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everlora import Learner
from everlora.errors import DataError, OptionError
from everlora.methods import list_methods, method_spec
from everlora.store import LearnerStore
from everlora.streams import concatenate
from tests.toy import tiny_model, toy_images, toy_learner, toy_tasks

# name, options; a new method adds one row
ROWS = [
    ("inflora", {}),
    ("inflora", {"alignment": True, "alignment_epochs": 1}),
    ("inflora_opt", {}),
    ("sequential", {}),
    ("sequential", {"train": "all", "lr": 1e-3}),
    ("joint", {}),
    ("probe", {}),
    ("probe", {"alignment": True, "alignment_epochs": 1}),
    ("ncm", {}),
    ("replay", {}),
    ("lwf", {}),
    ("ewc", {}),
    ("sd_lora", {}),
    ("sd_lora", {"preset": "official"}),
    ("sd_lora_rr", {"rank_schedule": {0: 3, 1: 2, 2: 1}}),
    ("sd_lora_kd", {}),
    ("convlora", {}),
    ("convlora", {"first_task": "full", "select": "mahalanobis"}),
    ("senacnn", {}),
    ("independent", {"select": "energy"}),
    ("independent", {"train": "all", "lr": 1e-3}),
    ("packnet", {"prune": 0.5}),
    ("pnn", {}),
    ("o_lora", {}),
    ("o_lora", {"orth_norm": "fro2", "lambda_2": 0.01}),
]
# those that run on causal language models, with other tests
LANGUAGE_ROWS: list[tuple[str, dict]] = [
    ("i_lora", {}),
    ("i_lora", {"selective_update": True, "buffer_insert": "online", "consistency_mode": "one_sided"}),
    ("i_lora", {"preset": "llmcl_effective"}),
    ("i_lora", {"preset": "easycl"}),
    ("i_lora", {"use_ilora": False}),
    ("o_lora", {}),
    ("sequential", {}),
    ("joint", {}),
    ("replay", {}),
    ("lwf", {"warmup_epochs": 1}),
    ("ewc", {}),
    ("inflora", {}),
    ("inflora_opt", {}),
    ("sd_lora", {}),
    ("sd_lora_rr", {"rank_schedule": {0: 3, 1: 2}}),
    ("sd_lora_kd", {}),
]


def _marked(kind: tuple[str, ...] = (), *, leave_out: str = "") -> list[Any]:
    """The rows, those of a class that came before marked as slow; with kinds, each of them, all but the first slow."""
    rows, seen = [], set()
    home = {entry.name: entry.module for entry in list_methods()}
    for name, options in ROWS:
        marks = [pytest.mark.slow] if home.get(name) in seen else []
        seen.add(home.get(name))
        if name == leave_out:
            continue
        rows += [
            pytest.param(name, options, one, marks=marks or ([pytest.mark.slow] if one != kind[0] else []))
            for one in kind
        ] or [pytest.param(name, options, marks=marks)]
    return rows


IN_TURN = _marked(leave_out="joint")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in ("vit", "bert")}


def _modality(kind: str) -> str:
    return "image" if kind == "vit" else "text"


def _learn(learner: Learner, kind: str, count: int) -> None:
    tasks = toy_tasks(_modality(kind), count)
    if learner.trains_on == "stream":
        learner.learn(concatenate(tasks), name="all")
        return
    for index, task in enumerate(tasks[len(learner.tasks) :], start=len(learner.tasks)):
        learner.learn(task, name=f"task {index}")


def _base_weights(learner: Learner) -> dict[str, torch.Tensor]:
    factors = {"up", "down", "past_up", "past_down", "past_scale", "past_ranks"}
    learner.method.activate(None)
    return {k: v for k, v in learner.model.state_dict().items() if k.rsplit(".", 1)[-1] not in factors}


def test_every_registered_name_has_a_row() -> None:
    assert {entry.name for entry in list_methods()} == {name for name, _ in [*ROWS, *LANGUAGE_ROWS]}


@pytest.mark.parametrize(("name", "options", "kind"), _marked(("bert", "vit")))
def test_learns_leaves_the_base_alone_and_reopens_to_the_same_answers(
    name: str, options: dict, kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    learner = toy_learner(tmp_path / "learner", models[kind], name, **options)
    before = {key: value.clone() for key, value in _base_weights(learner).items()}
    _learn(learner, kind, 2)
    if options.get("train") != "all":
        after = _base_weights(learner)
        assert len(before) > 10 and all(torch.equal(value, after[key]) for key, value in before.items())
    rows = concatenate(toy_tasks(_modality(kind), 2))
    answers = learner.predict(rows)
    again = Learner.open(tmp_path / "learner").predict(rows)
    assert [a.label for a in answers] == [b.label for b in again]
    # the working weight is summed once from all factors here and step by step there
    assert np.allclose([a.score for a in answers], [b.score for b in again], atol=1e-6)
    for answer in answers:
        assert answer.label == next(iter(answer.scores)) and sum(answer.scores.values()) == pytest.approx(1, abs=1e-5)
    log = LearnerStore.open(tmp_path / "learner").read_task(0).log()
    assert (name == "ncm") == (not log)


@pytest.mark.parametrize(("name", "options"), _marked())
def test_learns_what_can_be_learned(name: str, options: dict, models: dict[str, Path], tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], name, **{**options, "epochs": 15, "rank": 2})
    rows = toy_images(["dark", "bright"], 16)
    learner.learn(rows)
    assert learner.evaluate(rows).accuracy > 0.9


@pytest.mark.parametrize(("name", "options"), IN_TURN)
def test_a_new_process_goes_on_as_if_uninterrupted_and_what_a_task_added_never_changes(
    name: str, options: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    whole = toy_learner(tmp_path / "whole", models["bert"], name, **options)
    _learn(whole, "bert", 1)
    early = {key: value for key, value in whole.method.state().items() if key.startswith("tasks/000/")}
    early = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in early.items()}
    _learn(whole, "bert", 3)
    late = whole.method.state()
    for key, value in early.items():
        if key in late:  # a method may keep only the newest of something
            same = torch.equal(value, late[key]) if isinstance(value, torch.Tensor) else value == late[key]
            assert same, key
    parts = toy_learner(tmp_path / "parts", models["bert"], name, **options)
    _learn(parts, "bert", 1)
    _learn(Learner.open(tmp_path / "parts"), "bert", 2)
    torch.manual_seed(99)  # whatever ran before must not matter
    last = Learner.open(tmp_path / "parts")
    _learn(last, "bert", 3)
    assert last.digest == whole.digest


@pytest.mark.parametrize(("name", "options"), IN_TURN)
def test_rollback_and_learning_again_gives_the_same_learner(
    name: str, options: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], name, **options)
    _learn(learner, "vit", 2)
    digest = learner.digest
    dropped = learner.rollback(1)
    assert [entry.name for entry in dropped] == ["task 1"] and len(learner.tasks) == 1
    _learn(learner, "vit", 2)
    assert learner.digest == digest


@pytest.mark.parametrize(("name", "options"), IN_TURN)
def test_known_labels_mixed_with_new_ones(name: str, options: dict, models: dict[str, Path], tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], name, **options)
    learner.learn(toy_images(["a", "b"], seed=1))
    result = learner.learn(toy_images(["b", "c"], seed=2))
    assert (result.known_labels, result.new_labels) == (("b",), ("c",))
    assert learner.classes == ["a", "b", "c"]
    competing = set(learner.predict(toy_images(["b"], 1))[0].scores)
    # networks of their own: only the classes of the task that a row is taken to be of
    assert competing in ([{"a", "b"}, {"b", "c"}] if learner.method.isolated else [{"a", "b", "c"}])


@pytest.mark.parametrize(("name", "options"), IN_TURN)
def test_a_given_task_lets_only_its_classes_compete(
    name: str, options: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], name, scenario="task_incremental", **options)
    _learn(learner, "vit", 2)
    for answer in learner.predict(toy_images(["class a"], 4), task="task 1"):
        assert set(answer.scores) == {"class c", "class d"}
    with pytest.raises(OptionError, match="task 0, task 1"):
        learner.predict(toy_images(["class a"], 1))


def test_an_upper_bound_learns_once(models: dict[str, Path], tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], "joint")
    _learn(learner, "vit", 2)
    with pytest.raises(OptionError, match="learns all tasks at once"):
        learner.learn(toy_images(["e", "f"]))


@pytest.mark.parametrize("name", ["inflora", "sequential", "probe"])
def test_one_class_is_refused_by_locally_trained_heads_and_nothing_changes(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], name)
    _learn(learner, "vit", 1)
    digest = learner.digest
    with pytest.raises(DataError, match="loss=seen"):
        learner.learn(toy_images(["alone"]), name="single")
    assert Learner.open(tmp_path / "learner").digest == digest
    assert learner.learn(toy_images(["e", "f"]), name="next").index == 1, "usable after the refusal"
    assert learner.classes == ["class a", "class b", "e", "f"]


def test_one_class_works_over_seen_classes_and_with_means(models: dict[str, Path], tmp_path: Path) -> None:
    for name, options in (("inflora", {"loss": "seen"}), ("ncm", {})):
        learner = toy_learner(tmp_path / name, models["vit"], name, **options)
        _learn(learner, "vit", 1)
        learner.learn(toy_images(["alone"]), name="single")
        assert "alone" in learner.predict(toy_images(["alone"], 1))[0].scores


def test_option_names_are_checked(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'rank'"):
        toy_learner(tmp_path / "learner", models["vit"], "inflora", rnak=3)
    with pytest.raises(OptionError, match="'rank' of method 'inflora'"):
        toy_learner(tmp_path / "learner", models["vit"], "inflora", rank=0)
    with pytest.raises(OptionError, match="did you mean 'inflora'"):
        method_spec("infloar")
    assert method_spec("head-only").name == "probe" and method_spec("Seq").name == "sequential"
    assert not (tmp_path / "learner").exists()


def test_an_empty_learner_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "learner", models["vit"], "ncm")
    with pytest.raises(DataError, match="learned no task"):
        learner.predict(toy_images(["a"], 1))
