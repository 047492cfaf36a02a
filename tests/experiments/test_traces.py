"""What a run notes beside its answers, and the choices a recipe makes for who gives none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from everlora import Learner, run
from everlora.errors import OptionError
from everlora.experiments import runner
from everlora.experiments.plan import make_plan
from everlora.experiments.traces import bytes_on_disk, pretrained_digest, reference_parameters, tensor_digests
from everlora.streams import Examples

Start = Callable[..., dict[str, Any]]
CLAIM = """\
claims:
  same: {claim: it stays, test: unchanged, row: probe}
  better: {claim: it learns, test: greater, row: inflora, against: probe, figures: [til]}
reference: inflora
"""


@pytest.fixture
def start(tiny: str, network: Path, splits: dict[str, Examples], tmp_path: Path) -> Start:
    """Run the small recipe with claims."""

    def go(text: str = tiny + CLAIM, **changes: Any) -> dict[str, Any]:
        file = tmp_path / "tiny.yaml"
        file.write_text(text, encoding="utf-8")
        return run(file, **{"data": splits, "model": network, "out": tmp_path / "out", "seeds": [3], **changes})

    return go


def test_a_run_notes_size_bytes_and_tensors(start: Start, tmp_path: Path) -> None:
    results = start(methods=["probe", "sequential"], options={"keep_validation": 2})
    learner = Learner.open(tmp_path / "out" / "probe-3" / "learner")
    probe, sequential = (next(one for one in results["runs"] if one["method"] == n) for n in ("probe", "sequential"))
    alone = sum(parameter.numel() for parameter in learner.backbone.model.parameters())
    assert probe["reference_parameters"] == sequential["reference_parameters"] == alone + 17 * 2
    assert [len(entry["curve"]) for entry in probe["cost"]] == [2, 2, 2]
    assert probe["cost"][-1]["state_bytes"] == bytes_on_disk(learner) > 0
    kept = sum(file.stat().st_size for file in learner.path.rglob("validation.safetensors"))
    newest = learner.path / "state" / "002"
    folders = [*(learner.path / "tasks").iterdir(), newest]
    assert bytes_on_disk(learner) + kept == sum(f.stat().st_size for d in folders for f in d.rglob("*") if f.is_file())
    assert len(probe["digests"]) == 3
    assert [len(entry["tasks"]) for entry in probe["digests"]] == [1, 2, 3]
    assert all(entry["pretrained"] == probe["pretrained_digest"] for entry in probe["digests"])
    found = {claim["id"]: claim for claim in results["claims"]}
    assert found["same"]["findings"][0]["pretrained_unchanged"] == 1
    assert (found["same"]["verdict"], found["better"]["reason"]) == ("inconclusive", "not run: inflora")


def test_tensors_are_hashed_only_where_a_claim_asks(start: Start, tiny: str) -> None:
    assert "digests" not in start(tiny, methods=["probe"])["runs"][0]


@pytest.mark.slow
def test_a_changed_tensor_is_seen(start: Start, tmp_path: Path) -> None:
    start(methods=["probe", "sequential"])
    for row in ("probe", "sequential"):  # one network as it is, one with wrapped layers
        learner = Learner.open(tmp_path / "out" / f"{row}-3" / "learner")
        before = tensor_digests(learner)
        assert before["pretrained"] == pretrained_digest(learner)
        assert before == tensor_digests(learner)
        own = dict(learner.model.named_parameters())
        name = next(name for name in own if name.endswith(("k_proj.weight", "k_proj.base.weight")))
        with torch.no_grad():
            own[name].view(-1)[0] += 1e-3
        assert tensor_digests(learner)["pretrained"] != before["pretrained"]
        with torch.no_grad():
            learner.method.heads.heads[0].weight[0, 0] += 1e-3
        after = tensor_digests(learner)["tasks"]
        assert [one == other for one, other in zip(after, before["tasks"], strict=True)] == [False, True, True]
        assert reference_parameters(learner, 5) - reference_parameters(learner, 2) == 17 * 3


def test_an_interrupted_run_notes_the_same(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(methods=["probe"], out=tmp_path / "whole")["runs"][0]
    learn, calls = Learner.learn, []

    def stop(self: Learner, *given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            start(methods=["probe"])
    resumed = start(methods=["probe"])["runs"][0]
    for name in ("reference_parameters", "pretrained_digest", "digests"):
        assert resumed[name] == whole[name]


def test_only_the_first_tasks_are_learned(start: Start, tiny: str) -> None:
    full = start(tiny, methods=["probe"])
    text = tiny.replace("  order: seed\n", "  order: seed\n  tasks: 2\n")
    cut = start(text, methods=["probe"], out=Path(full["folder"]).parent / "cut")
    assert cut["stream"]["num_tasks"] == 2
    assert cut["stream"]["task_labels"] == full["stream"]["task_labels"][:2]
    assert cut["stream"]["order_hash"] == full["stream"]["order_hash"]


def test_all_stands_for_every_row(tiny: str) -> None:
    plan = make_plan(tiny, file="tiny", methods=["ncm", "all"], model="m")
    assert plan.rows == ("ncm", "inflora", "free", "sequential", "probe", "joint")
    assert make_plan(tiny, file="tiny", methods=["All"], model="m").rows == plan.rows[1:]


def test_a_recipe_chooses_its_setting_seeds_and_model(tiny: str) -> None:
    text = tiny.replace("settings:\n", "default_setting: short\nsettings:\n").replace(
        "{source: nobody,", "{source: nobody, setting: short,"
    )
    text = text.replace("  standard: {}\n", "")
    text = text.replace("  short:\n", "  short:\n    seeds: [8]\n    model: [nowhere/at-all, packaged]\n")
    plan = make_plan(text, file="tiny", methods=["probe"])
    assert (plan.setting_name, plan.seeds, plan.model) == ("short", (8,), "packaged")
    assert make_plan(text, file="tiny", methods=["probe"], seeds=[1], model="m").seeds == (1,)
    with pytest.raises(OptionError, match="settings has no 'shrot'"):
        make_plan(text.replace("default_setting: short", "default_setting: shrot"), file="tiny")


@pytest.mark.parametrize(("cores", "jobs", "expected"), [(8, 4, 3), (2, 4, 2), (8, 1, 1), (None, 4, 1)])
def test_a_recipe_chooses_its_workers(tiny: str, monkeypatch, cores, jobs, expected) -> None:
    monkeypatch.setattr(runner.os, "cpu_count", lambda: cores)
    text = tiny.replace("seeds: [3, 4]", f"seeds: {list(range(jobs))}\nworkers: 3")
    plan = make_plan(text, file="tiny", methods=["probe"], model="m")
    assert runner._number_of_workers(None, plan) == expected
    assert runner._number_of_workers(5, plan) == 5
    in_memory = make_plan(text, file="tiny", methods=["probe"], model="m", data={"train": None})
    assert runner._number_of_workers(None, in_memory) == 1


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("{claim: c, test: greater, row: probe}", "needs both against and figures"),
        ("{claim: c, test: unchanged, row: probe, against: joint}", "neither against nor figures"),
        (
            "{claim: c, test: unchanged, row: prope}",
            "claims.a names 'prope', which methods lacks; did you mean 'probe'",
        ),
        ("{claim: c, test: less, row: probe, against: joint, figures: [tli]}", "claims.a.figures"),
        ("{claim: c, tset: unchanged, row: probe}", "claims.a.tset'; did you mean 'test'?"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(tiny: str, claim: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_plan(f"{tiny}claims:\n  a: {claim}\n", file="tiny.yaml")
    assert words in str(caught.value)
    with pytest.raises(OptionError, match="reference names 'prope'"):
        make_plan(f"{tiny}reference: prope\n", file="tiny.yaml")
