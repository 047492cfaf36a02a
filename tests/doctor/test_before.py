"""Before training: targets, ranks, what is trained, cost; nothing on disk changes, and the exit codes say it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from everlora.cli import main
from everlora.doctor import examine_data, examine_recipe
from everlora.doctor.cost import estimate
from everlora.doctor.dry_run import Measured, sample_of
from everlora.doctor.flags import Flags
from everlora.learner import Learner
from everlora.training import TrainingOptions
from tests.experiments.conftest import coloured, network, one_thread, recipe_file
from tests.store.builders import snapshot
from tests.tiny_models import save_tiny
from tests.toy import toy_texts

__all__ = ["network", "one_thread", "recipe_file"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("bert", tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(bert: Path, tmp_path: Path) -> Path:
    Learner.create(tmp_path / "learner", model=bert, method="inflora", rank=2, epochs=3, batch_size=4)
    return tmp_path / "learner"


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def rows(*classes: str, count: int = 9) -> list[tuple[str, str]]:
    examples = toy_texts(classes, count)
    found = [
        (f"{text} {number}", str(label))
        for number, (text, label) in enumerate(zip(examples.inputs, examples.labels, strict=True))
    ]
    return found


def lines(outlook: Any) -> list[str]:
    return [str(one) for one in outlook.findings]


def test_clean_data_has_a_price_and_no_finding_and_nothing_changes(folder: Path, tmp_path: Path) -> None:
    first, second = (
        write(tmp_path / "a.csv", rows("red", "green")),
        write(tmp_path / "b.csv", rows("blue", "card", count=5)),
    )
    before = snapshot(folder)
    outlook = examine_data(folder, [first, str(second)])
    assert lines(outlook) == [] and not outlook.is_broken
    assert [(one.task, one.rows, one.steps) for one in outlook.estimates] == [("a.csv", 18, 15), ("b.csv", 10, 9)]
    one = outlook.estimates[0]
    assert one.seconds > 0 and one.peak_memory_bytes > 2**20 and one.parameters == 4 * 16 * 2 + 2 * 17
    assert outlook.how[0].startswith("inflora, measured on 'a.csv' (cpu): 5 steps of up to 4 rows took")
    assert snapshot(folder) == before
    report = Learner.open(folder).learn(first)
    assert report.steps == one.steps, "the estimate counts the steps that learning makes"


def test_what_is_wrong_with_files_is_said_of_each(folder: Path, tmp_path: Path) -> None:
    clean = rows("red", "green")
    long = write(tmp_path / "long.csv", [*clean, ("red " * 40, "red"), ("  ", "green")])
    alone = write(tmp_path / "alone.csv", rows("blue"))
    odd = tmp_path / "odd.csv"
    odd.write_text("a,b,c\nx,y,z\n")
    outlook = examine_data(folder, [long, alone, odd, tmp_path / "nowhere.csv"])
    broken = [line for line in lines(outlook) if line.startswith("broken")]
    assert len(broken) == 3 and outlook.is_broken and lines(outlook)[:3] == broken
    assert "odd.csv has no label column among its columns ('a', 'b', 'c'); name it with --label-column" in broken[0]
    assert "nowhere.csv does not exist" in broken[1]
    assert "inflora, alone.csv cannot be trained: task 'alone.csv' has one class" in broken[2]
    assert any("has 1 of 20 rows (5.0%) longer than 24 tokens, which are cut" in line for line in lines(outlook))
    assert any("1 of 20 rows without text" in line for line in lines(outlook))
    assert len(outlook.estimates) == 2, "what can be tried out has a price all the same"


def test_rows_learned_and_kept_before_are_known_again(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "learner"
    learner = Learner.create(folder, model=bert, method="ncm", keep_validation=2)
    january = write(tmp_path / "january.csv", rows("red", "green"))
    learner.learn(january)
    more = [*rows("blue"), *rows("red", "green"), *rows("red", "green")]  # what is held out of these stands there twice
    outlook = examine_data(folder, [january, write(tmp_path / "new.csv", more)])
    found = "\n".join(lines(outlook))
    assert "warning: january.csv is what was learned already as task 'january'" in found
    assert (
        "broken: task 'january' (validation) has 4 of its 4 rows (100.0%) among the training rows of new.csv" in found
    )
    assert outlook.estimates[0].steps == 0 and "nothing is trained" in outlook.how[0]


def test_the_command_line_and_its_exit_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = write(tmp_path / "a.csv", rows("red", "green"))
    assert main(["doctor", str(folder), str(clean)]) == 0
    shown = capsys.readouterr().out
    assert "What each task will cost" in shown and "Nothing was found that stands in the way." in shown
    few = write(tmp_path / "few.csv", rows("blue", "card", count=3))
    assert main(["doctor", str(folder), str(few), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["findings"][0]["severity"] == "warning" and report["estimates"][0]["steps"] == 6
    assert main(["doctor", str(folder), str(clean), str(tmp_path / "no.csv")]) == 1
    capsys.readouterr()
    (folder / "learner.json").write_text("{")
    assert main(["doctor", str(folder), str(clean)]) == 1
    assert "learner.json" in capsys.readouterr().out
    for words in (
        [],
        [str(folder), "--recipe", "x"],
        [str(folder), "--methods", "ncm"],
        [str(folder), str(clean), "--repair"],
    ):
        assert main(["doctor", *words]) == 2


@pytest.fixture
def look(recipe_file: Path, network: Path) -> Any:
    def go(**changes: Any) -> Any:
        splits = {"train": coloured(10, seed=1), "test": coloured(5, seed=2)}
        return examine_recipe(recipe_file, model=network, **{"methods": ["inflora"], "data": splits, **changes})

    return go


def test_a_recipe_is_tried_out_row_by_row(look: Any) -> None:
    outlook = look(methods=["inflora", "joint", "ncm"])
    assert lines(outlook) == []
    assert [(one.row, one.task, one.steps) for one in outlook.estimates] == [
        *(("inflora", f"task-0{number}", 2) for number in (1, 2, 3)),
        ("joint", "all tasks", 6),
        *(("ncm", f"task-0{number}", 0) for number in (1, 2, 3)),
    ]


def test_targets_and_ranks_that_do_not_fit(look: Any) -> None:
    outlook = look(options={"targets": ["k_prj", "v_proj", "quarry"]})
    assert [line.partition(";")[0] for line in lines(outlook)] == [
        "broken: inflora cannot be trained: target 'k_prj' matches no layer",
        "broken: inflora cannot be trained: target 'quarry' matches no layer",
    ]
    assert "did you mean 'k_proj'" in lines(outlook)[0] and outlook.estimates == []
    [line] = lines(look(options={"rank": 40}))
    assert line.startswith("broken: inflora asks for rank 40, above the width of 2 of 2 layers: ")
    assert line.endswith("set rank to 16 or less")
    [line] = lines(look(options={"rank": 12}))
    assert line.startswith("note: inflora asks for rank 12, at which branches are larger") and line.endswith(
        "rank 8 is the largest at which none is"
    )


def test_leaks_and_missing_data_of_a_recipe(look: Any, tmp_path: Path) -> None:
    train = coloured(10, seed=1)
    outlook = look(data={"train": train, "test": train.select(range(12))}, methods=["ncm"])
    assert outlook.is_broken and "has 4 of its 4 rows (100.0%) among the training rows" in lines(outlook)[0]
    [line] = lines(look(data=tmp_path / "nowhere"))
    assert line.startswith("broken: the data cannot be")


def test_what_a_method_trains_and_what_it_must_not_touch(network: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "learner", model=network, method="inflora", rank=2)
    backbone, method = learner.backbone, learner.method
    layer = next(iter(method.layers().values()))
    branch, base = layer.up, layer.base.weight

    def check(parameters: list[nn.Parameter], touch: nn.Parameter | None = None) -> list[str]:
        method.parameters = lambda: {"adapter": parameters}  # type: ignore[method-assign]
        flags = Flags(backbone, method)
        if touch is not None:
            touch.data.add_(0) if touch.requires_grad else touch.add_(0)
        return [str(one).partition(":")[0] + ":" + str(one).partition(" ")[2] for one in flags.check("row")]

    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter is branch)
    assert check([branch]) == []
    [line] = check([branch], touch=base)
    assert line.startswith("broken:row changed 1 frozen weights of the network")
    [line] = check([])
    assert line.startswith("warning:row leaves 1 parameters open that it does not train")
    found = check([branch, base])
    assert found[0].startswith("broken:row trains what is frozen") and found[1].startswith(
        "note:row trains 256 weights"
    )


def test_an_estimate_is_steps_passes_and_the_rest() -> None:
    measured = Measured(
        [],
        rows=10,
        width=2.0,
        steps=5,
        step_seconds=0.5,
        pass_seconds=1.0,
        fixed_seconds=3.0,
        peak_memory_bytes=7,
        parameters=9,
    )
    found = estimate("row", "task", measured, TrainingOptions(epochs=2, batch_size=10), rows=40, width=4.0)
    assert found.steps == 8 and found.seconds == pytest.approx(2 * (8 * 0.5 + 1.0 * 4) + 3.0)
    assert (found.peak_memory_bytes, found.parameters) == (7, 9)


def test_a_sample_has_every_class_and_whole_batches() -> None:
    examples = toy_texts([f"class {number}" for number in range(5)], 20)
    sample = sample_of(examples, batch_size=4)
    assert len(sample) == 10 and set(sample.classes) == set(examples.classes)
    assert len(sample_of(examples, batch_size=500)) == 100
