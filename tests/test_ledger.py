"""The ledger: it is what the records give, the records name what exists, and verdicts follow from the figures."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import ledger
import ledger_claims
import record_results
from ledger_records import Evidence, Figure, System, all_figures, read_systems, recipe
from ledger_results import Measured, Result, Row, read_results

from everlora.errors import DataError
from everlora.experiments import list_recipes
from everlora.methods.sd_lora import SDLoRAOptions
from tests.comparison.results import folder, results, run

SYSTEMS = read_systems()
EVERY = [(system, figure) for system in SYSTEMS.values() for figure in all_figures(system)]


def test_the_page_is_what_the_records_give() -> None:
    assert ledger.PAGE.read_text(encoding="utf-8") == ledger.page(), "run: make ledger"


def test_a_page_that_differs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(ledger, "page", lambda: "one\n")
    assert ledger.main(["--check"]) == 1 and not ledger.PAGE.exists()
    assert ledger.main([]) == 0 == ledger.main(["--check"])
    ledger.PAGE.write_text("another\n", encoding="utf-8")
    assert ledger.main(["--check"]) == 1


def test_recipes_settings_rows_and_sources_exist() -> None:
    for system, figure in EVERY:
        assert figure.source in system.sources, figure
        if figure.recipe:
            assert figure.recipe in system.recipes, figure
            assert figure.setting in recipe(figure.recipe).settings and figure.row in recipe(figure.recipe).methods
    for system in SYSTEMS.values():
        for name, settings in system.recipes.items():
            assert set(settings) <= set(recipe(name).settings), name
        assert {claim.source for claim in system.claims} <= set(system.sources)


def test_every_recipe_of_the_papers_is_in_the_ledger() -> None:
    ours = [name for system in SYSTEMS.values() for name in system.recipes]
    not_run = [info.name for info in list_recipes() if info.status == "not-run-here"]
    assert sorted(ours) == sorted(not_run)
    assert all(recipe(info.name).published == () for info in list_recipes() if info.name not in ours)


def test_no_figure_is_recorded_twice() -> None:
    seen = [(figure.source, figure.what, name) for _, figure in EVERY for name in figure.values]
    assert len(set(seen)) == len(seen)


def test_rows_and_figures_of_smaller_runs_exist() -> None:
    found = read_results()
    for entry in (entry for system in SYSTEMS.values() for entry in system.smaller if entry.result in found):
        result = found[entry.result]
        if not entry.result.startswith("heads/"):
            assert set(entry.rows) <= set(result.rows), entry.result
        for figure in entry.figures:
            assert any(row.numbers(figure) for row in result.rows.values()), (entry.result, figure)
        assert entry.differs and (not entry.page or (ledger.PAGE.parent / entry.page).is_file())


def test_result_files_say_how_they_were_measured_and_hold_no_paths() -> None:
    for name, result in read_results().items():
        assert all(one.command and one.date and one.device and one.versions["torch"] for one in result.measured), name
        told = json.dumps([dataclasses.asdict(row) for row in result.rows.values()])
        told += "".join(one.command for one in result.measured)
        assert not re.search(r"[\"' =]/\w", told), name


# --- what stands beside a published figure ---


def _of_the_paper(options: dict[str, Any] | None = None, model: str = "google/vit-base-patch16-224") -> Result:
    plan = ledger._plan("sd-lora-cifar100-vit-b16", "standard")
    given = options or ledger.row_options(plan, "sd_lora", 1, 10)
    row = Row("SD-LoRA", {"1": {"last": 0.5}, "2": {"last": 0.6}}, {k: v for k, v in given.items() if k != "seed"})
    measured = [Measured(command="everlora run it", date="2030-01-02", device="GPU", versions={"torch": "9"})]
    return Result("it", "sd-lora-cifar100-vit-b16", "standard", model, 10, False, measured, {"sd_lora": row})


def _cells(result: Result) -> list[str]:
    system = SYSTEMS["sd-lora"]
    figure = next(one for one in all_figures(system) if (one.recipe, one.row) == (result.recipe, "sd_lora"))
    return ledger._line(figure, system, {"it": result})


def test_a_run_of_the_recipe_stands_beside_the_published_figure() -> None:
    cells = _cells(_of_the_paper())
    assert cells[5] == "last: 55.00 ± 7.07 (n = 2); average: –"  # noqa: RUF001
    assert cells[6:] == ["`everlora run it`", "2030-01-02", "GPU", "torch 9"]


@pytest.mark.parametrize("change", ["options", "model", "setting"])
def test_another_network_option_or_setting_never_does(change: str) -> None:
    other = _of_the_paper({"rank": 3}) if change == "options" else _of_the_paper(model="packaged")
    if change == "setting":
        other = dataclasses.replace(_of_the_paper(), setting="smoke")
    assert _cells(other)[5] == ledger.NOT_RUN


def test_a_figure_needs_a_recipe_or_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Figure(source="x", what="y", values={"last": 1.0})


# --- verdicts ---


def _result(**rows: list[float]) -> dict[str, Result]:
    made = {
        name: Row(name, {str(seed): {"last": value} for seed, value in enumerate(values)})
        for name, values in rows.items()
    }
    return {"run": Result("run", "", "", "", 2, False, [], made)}


@pytest.mark.parametrize(
    ("ours", "more", "verdict"),
    [
        ([0.50, 0.52, 0.51], {}, "confirmed"),
        ([0.50, 0.52], {}, "open"),
        ([0.30, 0.32, 0.31], {}, "not confirmed"),
        ([0.50, 0.52, 0.51], {"at_least": 0.05}, "confirmed"),
        ([0.50, 0.52, 0.51], {"at_least": 0.18}, "not confirmed"),
        ([0.41, 0.40, 0.42], {"test": "near", "margin": 0.03}, "confirmed"),
        ([0.50, 0.52, 0.51], {"test": "near", "margin": 0.03}, "not confirmed"),
    ],
)
def test_claims_are_judged_seed_by_seed(ours: list[float], more: dict[str, Any], verdict: str) -> None:
    by = Evidence(
        **{"result": "run", "test": "greater", "row": "ours", "against": "theirs", "figures": ["last"]} | more
    )
    found, said = ledger_claims._of_result(by, _result(ours=ours, theirs=[0.40, 0.41, 0.42]))
    assert found == verdict
    assert f"{len(ours)} seeds" in said


@pytest.mark.parametrize(("seeds", "verdict"), [(3, "confirmed"), (2, "open")])
def test_falling_needs_every_seed(seeds: int, verdict: str) -> None:
    row = Row("x", {}, panels={"magnitude": {str(seed): [1.0, 0.8, 0.5, 0.4, 0.9] for seed in range(seeds)}})
    assert ledger_claims._falls(row, "magnitude")[0] == verdict
    row.panels["magnitude"]["0"] = [1.0, 0.4, 0.9, 0.8, 0.7]
    assert ledger_claims._falls(row, "magnitude")[0] != "confirmed"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.0, 0.01, -0.02], "confirmed"), ([0.0, 0.02, 0.0], "not confirmed"), ([0.0, 0.0], "open")],
)
def test_a_bound_holds_in_every_seed(values: list[float], verdict: str) -> None:
    by = Evidence(result="run", test="at_most", row="ours", figures=("last",), margin=0.01)
    assert ledger_claims._of_result(by, _result(ours=values))[0] == verdict


def test_what_a_claim_names_must_be_there() -> None:
    claim = {"claim": "c", "source": "s"}
    for by in (
        {"result": "none", "test": "less", "row": "a", "against": "b", "figures": ["last"]},
        {"tests": ["tests/test_ledger.py::test_that_was_renamed"], "verdict": "confirmed"},
        {"read": "no-page.md", "verdict": "confirmed"},
    ):
        system = System.model_validate(
            {"title": "t", "about": "", "recipes": {}, "sources": {}, "claims": [claim | {"by": by}]}
        )
        with pytest.raises(DataError):
            ledger_claims.decisions(system, {})


def test_smaller_ranks_save_what_is_claimed() -> None:
    options = SDLoRAOptions(rank_schedule={0: 10, 4: 8, 8: 6})
    assert sum(options.rank_at(task) for task in range(10)) == 84
    assert sum(options.rank_at(task) for task in range(20)) == 144


# --- recording runs ---


def _record(tmp_path: Path, *contents: dict[str, Any]) -> dict[str, Any]:
    folders = [folder(tmp_path / str(place), content) for place, content in enumerate(contents)]
    out = tmp_path / "kept.json"
    assert record_results.main([*map(str, folders), "--out", str(out), "--panel", "magnitude"]) == 0
    return dict(json.loads(out.read_text(encoding="utf-8")))


def _digits(**runs: dict[str, Any]) -> dict[str, Any]:
    return results(recipe={"name": "digits", "text": "name: digits"}, **runs)


def test_folders_of_several_seeds_make_one_file(tmp_path: Path) -> None:
    panels = {"magnitude": {"task 0": [1.0, 0.9], "task 1": [None, 0.5]}}
    one = _digits(runs=[run("probe", 1, (90, 80, 45), panels=panels)], seeds=[1])
    two = _digits(runs=[run("probe", 2, (92, 82, 46)), run("ncm", 2, (90, 60, 45))], seeds=[2])
    kept = _record(tmp_path, one, two)
    assert {name: list(row["seeds"]) for name, row in kept["rows"].items()} == {"ncm": ["2"], "probe": ["1", "2"]}
    probe = kept["rows"]["probe"]
    assert probe["seeds"]["1"]["last"] == pytest.approx((0.8 + 0.9) / 2)
    assert probe["after_last_task"]["magnitude"] == {"1": [0.9, 0.5]}
    assert [entry["command"] for entry in kept["measured"]] == [
        "everlora run digits --methods probe --seeds 1",
        "everlora run digits --methods probe,ncm --seeds 2",
    ]
    assert (
        kept["measured"][0]["device"] == "CPU, 1 thread a process" and len(kept["measured"][0]["recipe_sha256"]) == 64
    )


def test_the_fall_between_two_models_is_recorded(tmp_path: Path) -> None:
    counts = {"before": 90, -0.5: 10, 0.0: 90, 0.5: 70, 1.0: 80, 1.5: 10}
    places = [{"at": at, "correct": [0, 0], "task_aware": [count, 0]} for at, count in counts.items()]
    paths = [{"first": 0, "second": 1, "points": 5, "places": places}]
    kept = _record(tmp_path, _digits(runs=[run("probe", 1, (90, 80, 45), paths=paths), run("ncm", 1, (90, 80, 45))]))
    assert kept["rows"]["probe"]["seeds"]["1"]["path_dip"] == pytest.approx(0.1)
    assert "path_dip" not in kept["rows"]["ncm"]["seeds"]["1"]


def test_runs_that_contradict_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder(tmp_path / "a", _digits(runs=[run("probe", 1, (90, 80, 45))]))
    for name, other in (
        ("lr", _digits(runs=[run("probe", 2, (90, 80, 45), options={"lr": 0.2})])),
        ("two folders", _digits(runs=[run("probe", 1, (90, 80, 45))])),
        ("setting", _digits(settings={"setting": "smoke"})),
    ):
        two = folder(tmp_path / name, other)
        assert record_results.main([str(one), str(two), "--out", str(tmp_path / "out.json")]) == 1
        assert name in capsys.readouterr().err


def test_the_comparison_of_heads_is_read_by_stream(tmp_path: Path) -> None:
    runs = [
        {"stream": "digits", "row": "probe", "seed": 1, "sizes": [10, 10], "date": "2030-01-02"}
        | {"correct": {"linear": [[9], [5, 8]], "ridge": [[9], [9, 8]]}, "options": [], "validation": False},
        {"stream": "digits", "row": "joint", "seed": 1, "sizes": [10, 10], "date": "2030-01-02"}
        | {"correct": {"linear": [[7, 8]]}, "options": []},
    ]
    aside = [runs[0] | {"validation": True, "seed": 2}, runs[0] | {"options": ["rank=4"], "seed": 3}]
    content = {"command": "python benchmarks/heads.py", "device": "CPU", "versions": {}, "runs": runs + aside}
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "digits.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    found = read_results(tmp_path)
    assert list(found) == ["heads/digits"]
    rows = found["heads/digits"].rows
    assert rows["probe/linear"].numbers("last") == {1: pytest.approx(0.65)}
    assert rows["probe/ridge"].numbers("forgetting") == {1: pytest.approx(0.0)}
    assert rows["joint/linear"].numbers("last") == {1: pytest.approx(0.75)} and not rows["joint/linear"].numbers("avg")
