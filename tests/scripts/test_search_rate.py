"""The search of learning rates: what it looks at, and which rate it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import search_rate

from everlora import Learner
from tests.experiments.conftest import TINY, coloured


def curve(*accuracies: float) -> list[list[float]]:
    return [[accuracy, float(epoch)] for epoch, accuracy in enumerate(accuracies)]


def test_the_best_epoch_wins_then_the_mean_then_the_smaller_rate() -> None:
    assert search_rate.choose({0.1: curve(0.1, 0.5, 0.6), 0.2: curve(0.1, 0.7, 0.2)}) == 0.2
    assert search_rate.choose({0.1: curve(0.1, 0.5, 0.7), 0.2: curve(0.1, 0.6, 0.7)}) == 0.2
    assert search_rate.choose({0.2: curve(0.1, 0.6, 0.7), 0.1: curve(0.1, 0.6, 0.7)}) == 0.1


@pytest.mark.slow
def test_each_row_that_trains_gets_every_rate(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "tiny.yaml"
    text = TINY.replace("epochs: 1,", "epochs: 1, keep_validation: 3,").replace(
        "{method: joint, set", "{method: ncm, #"
    )
    file.write_text(text.replace("#: {rank: 2}}", "label: Means}"), encoding="utf-8")
    parts = {"train": coloured(10, seed=1), "test": coloured(5, seed=2)}
    monkeypatch.setattr("everlora.experiments.plan.read_splits", lambda *given, **more: (parts, None))
    seen = []
    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, rows, **more: seen.append(rows) or learn(self, rows, **more))
    words = [str(file), "--methods", "probe,joint", "--rates", "0.001,0.1", "--model", "packaged", "--json"]
    search_rate.main(words)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["probe"], "a row that trains nothing has no rate"
    assert found["probe"]["chosen"] in (0.001, 0.1)
    assert [len(points) for points in found["probe"]["rates"].values()] == [2, 2]
    tests = {image.tobytes() for image in parts["test"].inputs}
    assert len(seen) == 4 and not any(image.tobytes() in tests for rows in seen for image in rows.inputs)
    assert {len(rows) for rows in seen} == {20}, "the first task alone"
    search_rate.main(words[:-1])
    assert capsys.readouterr().out.startswith("probe")


def test_no_run_uses_the_order_of_the_search() -> None:
    from everlora.experiments import load_recipe

    recipe = load_recipe("convlora-vs-senacnn")
    used = {seed for setting in recipe.settings.values() for seed in setting.seeds or ()} | set(recipe.seeds)
    assert search_rate.ORDER_SEED not in used


@pytest.mark.parametrize("row", ["convlora", "senacnn", "independent", "sequential", "replay"])
def test_rows_of_the_recipe_were_searched_equally(row: str) -> None:
    from everlora.experiments import load_recipe

    methods = load_recipe("convlora-vs-senacnn").methods
    assert methods[row].trials == len(search_rate.RATES)
    assert methods["ncm"].trials is None
