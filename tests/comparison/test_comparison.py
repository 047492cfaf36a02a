from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everlora
from everlora.comparison import Comparison, compare
from everlora.errors import DataError, OptionError
from everlora.experiments import load_recipe, recipe_text
from everlora.metrics import PROJECTS, AccuracyMatrix
from everlora.report import summarise
from tests.comparison.results import CLAIM, COUNTS, SIZES, folder, results, run
from tests.report.language_results import language_results


def _labels(found: Comparison) -> list[list[str]]:
    return [[row.label for row in table.rows] for table in found.tables]


def _second_half(seeds: tuple[int, ...] = (4, 5), **more: Any) -> dict[str, Any]:
    return results({"ours": {seed: (90, 70 + seed, 40) for seed in seeds}}, **more)


def test_means_deviations_and_paired_test_by_hand(tmp_path: Path) -> None:
    found = everlora.compare(folder(tmp_path / "a")).to_json()["tables"][0]
    ours, naive = found["rows"]
    # (0.80 + 0.90) / 2, (0.82 + 0.92) / 2, (0.84 + 0.94) / 2; over samples 125, 128 and 131 of 150
    assert ours["metrics"]["last"] == {"mean": pytest.approx(0.87), "sd": pytest.approx(0.02), "n": 3}
    assert ours["metrics"]["last_samples"]["mean"] == pytest.approx(128 / 150)
    assert ours["metrics"]["last_samples"]["sd"] == pytest.approx(3 / 150)
    assert ours["metrics"]["avg"]["mean"] == pytest.approx((0.92 + 0.87) / 2)
    assert ours["metrics"]["avg_samples"]["mean"] == pytest.approx((0.92 + 128 / 150) / 2)
    assert ours["metrics"]["forgetting"]["mean"] == pytest.approx(0.10)
    assert (found["baseline"], ours["against_baseline"]) == ("ours", {})
    test = naive["against_baseline"]["last"]
    differences = np.array([-0.10, -0.095, -0.095])  # (0.75, 0.775, 0.795) - (0.85, 0.87, 0.89)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert test["difference"] == pytest.approx(differences.mean()) and test["statistic"] == pytest.approx(t)
    assert test["p"] == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t)) == test["p_holm"]
    assert (test["seeds"], test["wins"], test["reason"]) == ((1, 2, 3), 0, "")
    assert test["low"] <= test["difference"] <= test["high"]


def test_the_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    content = results()
    names = list(summarise(content)[0]["metrics"])
    table = compare(folder(tmp_path / "a", content), metrics=names).to_json()["tables"][0]
    for row, reported in zip(table["rows"], summarise(content), strict=True):
        assert row["metrics"] == reported["metrics"]


@pytest.mark.parametrize("project", PROJECTS)
def test_printing_modes_are_means_of_what_the_metrics_print(project: str, tmp_path: Path) -> None:
    table = compare(folder(tmp_path / "a"), printed_as=project).to_json()["tables"][0]
    for row in table["rows"]:
        by_seed = []
        for seed, counts in COUNTS[row["row"]].items():
            one = run(row["row"], seed, counts)
            matrix = AccuracyMatrix.from_counts(one["correct"], SIZES, one["task_aware"], one["task_correct"])
            by_seed.append(matrix.as_printed_by(project, classes_per_task=[2, 1]))
        assert set(row["printed"]) == set(by_seed[0]) != set()
        for name, found in row["printed"].items():
            values = [one[name] for one in by_seed if one[name] is not None]
            assert found["n"] == len(values)
            assert found["mean"] == (pytest.approx(np.mean(values)) if values else None)
    [(_, tables, notes)] = compare(folder(tmp_path / "b"), printed_as=project.upper()).sections()
    assert tables[0].table.columns == ["Printed", "OURS", "NAIVE"] and "Published numbers" in notes[0]


def test_seeds_of_one_row_from_two_folders_make_one_row(tmp_path: Path) -> None:
    found = compare([folder(tmp_path / "a"), folder(tmp_path / "b", _second_half())])
    assert _labels(found) == [["OURS", "NAIVE"]] and found.tables[0].rows[0].seeds == [1, 2, 3, 4, 5]
    assert "OURS: seeds 1, 2, 3 from a; 4, 5 from b." in found.tables[0].notes
    assert any("different seeds" in note for note in found.tables[0].notes)
    assert found.tables[0].tests["last"]["naive"].seeds == (1, 2, 3)


def test_a_repetition_counts_once_and_another_outcome_stands_apart(tmp_path: Path) -> None:
    again = results()
    for one in again["runs"]:
        one["cost"][0]["seconds"] = 99.0  # another machine
    other = copy.deepcopy(results())
    other["runs"][0]["correct"][1][0] -= 1
    first, second, third = (
        folder(tmp_path / name, content) for name, content in [("a", None), ("b", again), ("c", other)]
    )
    found = compare([first, second])
    assert _labels(found) == [["OURS", "NAIVE"]] and found.tables[0].rows[0].n == 3
    assert "b repeats runs of OURS; NAIVE with the same numbers; they count once." in found.tables[0].notes
    assert _labels(compare([first, third])) == [["OURS (in a)", "NAIVE", "OURS (in c)"]]
    assert _labels(compare([first, first / "results.json"])) == [["OURS", "NAIVE"]]


def test_rows_are_named_by_what_differs(tmp_path: Path) -> None:
    changed = results({"ours": COUNTS["ours"]})
    for one in changed["runs"]:
        one["options"] = {"lr": 0.5, "gate": True, "seed": one["seed"]}
    paths = [folder(tmp_path / "a"), folder(tmp_path / "b", changed)]
    assert _labels(compare(paths)) == [["OURS (lr=0.1, gate by default)", "NAIVE", "OURS (lr=0.5, gate=true)"]]
    with pytest.raises(OptionError, match=r"'ours' may be one of 2 rows; name one as 'ours \(lr=0.1"):
        compare(paths, baseline="ours")
    assert compare(paths, baseline="ours (lr=0.5, gate=true)").tables[0].baseline == "ours (lr=0.5, gate=true)"
    larger = folder(tmp_path / "c", results({"naive": COUNTS["naive"]}, model="large"))
    assert _labels(compare([paths[0], larger])) == [
        ["OURS (model=tiny)", "NAIVE (model=tiny)", "NAIVE (model=large)"],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"num_tasks": 2, "name": "cars"},
        {"train_sizes": [100, 200]},
        {"task_labels": [["cat", "dog"], ["owl"]]},
        {"scenario": "task_incremental"},
    ],
)
def test_streams_are_never_mixed(change: dict[str, Any], tmp_path: Path) -> None:
    other = results()
    other["stream"] |= change
    found = compare([folder(tmp_path / "a"), folder(tmp_path / "b", other)])
    assert _labels(found) == [["OURS", "NAIVE"]] * 2
    assert [table.rows[0].n for table in found.tables] == [3, 3]


def test_the_same_seed_with_another_order_is_another_stream(tmp_path: Path) -> None:
    other = results()
    other["streams"]["2"]["order_hash"] = "shuffled"
    found = compare([folder(tmp_path / "a"), folder(tmp_path / "b", other)])
    assert len(found.tables) == 2 and "another order" in found.tables[1].notes[0]


def test_the_same_stream_of_other_rows_has_a_table_of_its_own(tmp_path: Path) -> None:
    paths = [folder(tmp_path / name, results() | {"data_hash": name[0]}) for name in ("a", "a2", "b")]
    before = folder(tmp_path / "c")  # results of an earlier version do not say which rows they read
    found = compare([*paths, before])
    assert [[one.name for one in table.folders] for table in found.tables] == [["a", "a2", "c"], ["b"]]
    assert found.tables[1].notes[0] == "b read other rows than a, so the two have tables of their own."
    found = compare([before, *paths])  # not `c`, which says nothing of its rows
    assert found.tables[1].notes[0] == "b read other rows than a, so the two have tables of their own."


def test_single_rows_of_one_stream_with_other_seeds_are_one_row(tmp_path: Path) -> None:
    whole, part = (results({"ours": COUNTS["ours"]}) for _ in range(2))
    whole["runs"], part["runs"] = whole["runs"][:2], part["runs"][2:]
    [found] = compare([folder(tmp_path / "a", whole), folder(tmp_path / "b", part)]).tables
    assert [row.n for row in found.rows] == [3]


def test_runs_without_anything_in_common_are_refused(tmp_path: Path) -> None:
    one, other = (results({"ours": COUNTS["ours"]}) for _ in range(2))
    other["stream"]["name"] = "cars"
    with pytest.raises(DataError, match=r"nothing in common: .*pets.*cars"):
        compare([folder(tmp_path / "a", one), folder(tmp_path / "b", other)])


def test_sorting_and_choice_of_numbers(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    found = compare(path, metrics=["forgetting", "sec_task", "fwt"], sort="forgetting", baseline="Naive")
    [table] = found.tables
    assert [one.name for one in table.measures] == ["forgetting", "sec_task", "fwt"]
    assert [row.key for row in table.rows] == ["ours", "naive"] and table.baseline == "naive"
    assert [row.key for row in compare(path, sort="worst-task").tables[0].rows] == ["ours", "naive"]
    assert [row.key for row in compare(path, sort="bwt", baseline="naive").tables[0].rows] == ["ours", "naive"]
    lower_first = compare(path, sort="last").tables[0].rows[0].statistic("last")["mean"]
    assert lower_first == pytest.approx(0.87)
    assert any(note.startswith("FWT (points): ") for note in table.notes)
    for wrong, words in (
        ({"metrics": ["lats"]}, "no number called 'lats'; did you mean 'last'"),
        ({"sort": "lats"}, "no number called 'lats'"),
        ({"baseline": "oures"}, "no row is called 'oures'; did you mean 'ours'"),
        ({"printed_as": "pilots"}, "no way of printing called 'pilots'; did you mean 'pilot'"),
        ({"test": "f"}, "no paired test 'f'"),
    ):
        with pytest.raises(OptionError, match=words):
            compare(path, **wrong)  # type: ignore[arg-type]


def test_language_models_have_both_means_and_no_printing_without_answers(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", language_results())
    [table] = compare(path, metrics=["ce", "ce_tokens", "ce:1"]).tables
    row, run_ = table.rows[0], table.rows[0].runs[0]
    cells = run_.folder.results["runs"][0]["language"]["stages"][-1]["measured"][0]["tests"]
    assert row.key == "double/stable" and table.measures[2].heading == "Cross-entropy, news"
    assert run_.values["ce"] == pytest.approx(sum(cell["nll"] / cell["tokens"] for cell in cells) / 3)
    assert run_.values["ce_tokens"] == pytest.approx(
        sum(cell["nll"] for cell in cells) / sum(cell["tokens"] for cell in cells)
    )
    with pytest.raises(OptionError, match="none of these runs has any"):
        compare(path, printed_as="trace")
    answers = compare(folder(tmp_path / "b", language_results(right=7)), printed_as="trace").tables[0]
    assert answers.printed["forgetful"]["OP"]["mean"] == pytest.approx(70.0)


def test_published_figures_stand_beside_both_means_and_say_what_differs(tmp_path: Path) -> None:
    figures = [
        {"source": "A paper", "method": "ours", "last": 86.0, "last_sd": 0.5, "setting": "standard"},
        {"source": "A paper", "method": "ours", "last": 50.0, "setting": "large"},
        {"source": "B", "method": "unseen", "label": "Unseen", "avg": 91.0, "setting": "standard"},
        {"source": "B", "method": "naive", "last": 40.0, "setting": "large"},
    ]
    given = {"setting": "standard", "options": {"rank": 4}}
    lines = compare(folder(tmp_path / "a", results(published=figures, settings=given))).tables[0].published
    assert [(line.label, line.figure, line.published) for line in lines] == [
        ("OURS", "last", 86.0),
        ("Unseen", "avg", 91.0),
        ("NAIVE", "last", 40.0),
    ]
    assert lines[0].difference("tasks") == pytest.approx(1.0)
    assert lines[0].difference("samples") == pytest.approx(100 * 128 / 150 - 86.0)
    assert lines[0].differs == ("options given: rank=4",) and lines[1].difference("tasks") is None
    assert lines[2].differs[0] == "published for setting large, ours is standard"


def test_claims_with_a_source_stand_there_with_their_verdict(tmp_path: Path) -> None:
    found = compare(folder(tmp_path / "a"))
    [(_, tables, _)] = found.sections()
    assert tables[-1].caption == "Claims of pets, held against the runs in a"
    [row] = tables[-1].table.rows
    assert (row[0], row[2], row[4]) == ("C1", "reproduced", "They say 91 % against 80 %.") and "87.0" in row[3]
    assert found.to_json()["tables"][0]["claims"][0]["verdict"] == "reproduced"
    without = results(claims=[{**CLAIM, "published": ""}])
    assert not compare(folder(tmp_path / "b", without)).tables[0].claims


def test_published_figures_come_from_the_recipe_that_was_run(tmp_path: Path) -> None:
    name = "inflora-cifar100-vit-b16"
    recipe = load_recipe(name)
    figure = recipe.published[0]
    about = {"name": name, "title": recipe.title, "text": recipe_text(name)}
    content = results({figure.method: COUNTS["ours"]}, recipe=about, settings={"setting": figure.setting})
    [line, *_] = compare(folder(tmp_path / "a", content)).tables[0].published
    assert line.difference("tasks") == pytest.approx(87.0 - line.published)
    assert line.differs == ("other model: tiny",)


@pytest.mark.slow
def test_no_torch_is_imported(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    script = (
        "import sys, everlora; "
        f"found = everlora.compare({str(path)!r}, printed_as='pilot'); "
        "[found.render(form) for form in ('markdown', 'latex', 'csv', 'json', 'html')]; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; run the recipe again with --out"),
        ('{"format": 1, "stream"', "is not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"format": 2}', "has format 2 where 1 is expected"),
        ("{}", "has no format number where 1 is expected"),
        ('{"format": 1}', "damaged: 'stream' must be an object, found NoneType"),
        ('{"format": 1, "stream": {}, "runs": []}', "holds no finished run"),
        ('{"format": 1, "stream": {}, "runs": [1]}', "damaged"),
        ('{"format": 1, "stream": {}, "runs": [{}]}', "must have the field"),
        ('{"format": 1, "stream": {"task_labels": [3]}, "runs": [{}]}', "its stream cannot be read"),
        ('{"format": 1, "stream": {}, "recipe": [], "runs": [{}]}', "'recipe' must be an object, found list"),
    ],
)
def test_damaged_results_are_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        compare(tmp_path)
    assert words in str(caught.value) and str(tmp_path / "results.json") in str(caught.value)


def test_folders_without_results_are_one_sentence(tmp_path: Path) -> None:
    folder(tmp_path / "runs" / "a")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "plan.json").write_text("{}")
    (tmp_path / "file.txt").write_text("")
    for path, words in (
        ("absent", "no such folder"),
        ("runs", "its folders a do"),
        ("half", "not finished"),
        ("file.txt", "is a file"),
    ):
        with pytest.raises(DataError, match=words):
            compare(tmp_path / path)
    with pytest.raises(DataError, match="nothing to compare"):
        compare([])


@pytest.mark.slow
def test_any_lost_field_is_a_sentence_or_does_no_harm(tmp_path: Path) -> None:
    whole = results({"ours": {1: (90, 80, 45)}})
    path = folder(tmp_path / "a", whole)

    def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [at] * bool(at) + [found for key, item in items for found in places(item, (*at, key))]

    for place in places(whole):
        for wrong in ("text", None):
            broken = copy.deepcopy(whole)
            inner = broken
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = wrong
            (path / "results.json").write_text(json.dumps(broken))
            try:
                compare(path, printed_as="pilot").to_json()
            except (DataError, OptionError) as error:
                assert str(error)
