from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import everlora.sweep
from everlora.cli import main

RESULTS = {
    "first_task": True,
    "fraction": 0.2,
    "metric": "last",
    "is_lower_better": False,
    "trials": [],
    "best": {
        "probe": {"label": "Probe", "mean": 0.5, "set": "--set lr=0.001 --set 'template=a b'", "ties": [], "edges": []},
        "ncm": {"label": "NCM", "mean": 0.5, "set": "", "ties": [], "edges": []},
    },
    "folder": "o",
}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everlora.sweep, "sweep", lambda *_, **__: RESULTS, raising=False)


def _printed(call: Any, *words: str) -> list[str]:
    code, out, err = call("sweep", *words, "--methods", "probe,ncm", "--grid", "lr=1e-3", "--out", "o")
    assert (code, err) == (0, "")
    return [line.removeprefix("Run it: ") for line in out.splitlines() if line.startswith("Run it: ")]


@pytest.mark.usefixtures("searched")
def test_what_to_run_repeats_what_the_sweep_was_given(call: Any) -> None:
    common = ("--data", "my data", "--model", "m", "--setting", "full", "--set", "epochs=2", "--set", "note=a 'b'")
    probe, ncm = _printed(call, "my recipe.yaml", *common)
    best = ["--set", "lr=0.001", "--set", "template=a b"]
    assert shlex.split(probe) == ["everlora", "run", "my recipe.yaml", "--methods", "probe", *common, *best]
    assert shlex.split(ncm) == ["everlora", "run", "my recipe.yaml", "--methods", "ncm", *common]


@pytest.mark.usefixtures("searched")
def test_nothing_given_is_nothing_repeated(call: Any) -> None:
    probe, ncm = _printed(call, "digits")
    assert probe == "everlora run digits --methods probe --set lr=0.001 --set 'template=a b'"
    assert ncm == "everlora run digits --methods ncm"


@pytest.mark.usefixtures("searched")
def test_what_to_run_is_taken_by_run(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(recipe: str, **options: Any) -> dict[str, Any]:
        asked.update(options)
        raise KeyboardInterrupt

    import everlora.experiments

    monkeypatch.setattr(everlora.experiments, "run", run, raising=False)
    main(shlex.split(_printed(call, "digits", "--data", "my data", "--set", "epochs=2")[0])[1:])
    assert asked["data"] == "my data" and asked["options"] == {"epochs": 2, "lr": 0.001, "template": "a b"}
