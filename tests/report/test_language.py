from __future__ import annotations

import html
import json
import math
import re

import numpy as np
import pytest

from everlora.errors import DataError
from everlora.experiments.claims import judge
from everlora.experiments.schema import ClaimSpec
from everlora.report import format_claims, render_report, tables
from everlora.report.language import language_rows, language_runs, language_values
from everlora.report.language_tables import BASE, paired, pairs_of_weights
from tests.report.language_results import BASE as BASE_NATS
from tests.report.language_results import BYTES, TOKENS, language_results, language_run


def by_label(results, number=0):
    """One table as a mapping from the first cell to the cells by heading."""
    table = tables(results)[number].table
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_the_figures_of_a_run_by_hand() -> None:
    run = language_run("one", 1, fall=0.5)
    nats = [[3.0, 4.7, 5.5], [3.5, 3.1, 5.4], [4.1, 3.6, 3.2]]
    for stage, row in zip(run["language"]["stages"], nats, strict=True):
        for task, value in enumerate(row):
            stage["measured"][0]["tests"][task]["nll"] = value * TOKENS[task]
    values = language_values({"format": 1, "runs": [run]})["one"][1]
    assert values["ce"] == pytest.approx((4.1 + 3.6 + 3.2) / 3)
    assert (values["ce_first"], values["ce_last"]) == pytest.approx((4.1, 3.2))
    assert values["ce_earlier"] == pytest.approx((4.1 + 3.6) / 2)
    assert values["learning_ce"] == pytest.approx((3.0 + 3.1 + 3.2) / 3)
    assert values["bwt_ce"] == pytest.approx(-((4.1 - 3.0) + (3.6 - 3.1)) / 2)
    assert values["forgetting_ce"] == pytest.approx(((4.1 - 3.0) + (3.6 - 3.1)) / 2)
    assert values["fwt_ce"] == pytest.approx(((BASE_NATS[1] - 4.7) + (BASE_NATS[2] - 5.4)) / 2)
    assert values["retention"] == pytest.approx(3 * 0.5)
    bits = [value * tokens / (math.log(2) * size) for value, tokens, size in zip(nats[-1], TOKENS, BYTES, strict=True)]
    assert values["bits_per_byte"] == pytest.approx(np.mean(bits))
    assert values["sec_task"] == pytest.approx(3.0)
    assert values["buffer_bytes"] is None and values["answer_acc"] is None and values["general_delta"] is None


def test_what_a_run_that_was_measured_once_lacks_is_not_zero() -> None:
    values = language_values(language_results())["together"][1]
    assert values["ce"] is not None and values["retention"] is not None
    assert [values[name] for name in ("learning_ce", "bwt_ce", "forgetting_ce", "fwt_ce")] == [None] * 4


def test_a_rows_name_alone_stands_for_the_weights_it_usually_has() -> None:
    values = language_values(language_results())
    assert set(values) == {"double", "double/stable", "double/plastic", "forgetful", "together", "varied"}
    assert values["double"] == values["double/stable"]
    assert values["double"][1]["ce"] < values["double/plastic"][1]["ce"]
    labels = [row.label for row in language_rows(language_results())]
    assert labels == ["Double stable", "Double plastic", "Forgetful", "Together", "Varied"]


def test_general_abilities_are_shares_of_right_answers_where_they_were_counted() -> None:
    run = language_run("one", 1)
    before, after = run["language"]["base"], run["language"]["stages"][-1]["measured"][0]
    run["language"]["general_sets"] = ["sums", "facts"]
    one = {"nll": 100.0, "tokens": 100, "num_bytes": 1, "rows": 1, "rouge_l": None}
    before["general"] = [one | {"correct": 6, "answers": 10}, one | {"correct": 8, "answers": 10}]
    after["general"] = [one | {"correct": 2, "answers": 10}, one | {"correct": 7, "answers": 10}]
    assert language_values({"format": 1, "runs": [run]})["one"][1]["general_delta"] == pytest.approx(-0.25)
    for cell in (*before["general"], *after["general"]):
        cell |= {"correct": None, "answers": 0}
    after["general"][0]["nll"] = 150.0
    assert language_values({"format": 1, "runs": [run]})["one"][1]["general_delta"] == pytest.approx(-0.25)


def test_tables_have_the_pretrained_model_first_and_a_row_for_each_of_the_weights() -> None:
    found = by_label(language_results())
    assert list(found) == [BASE, "Double stable", "Double plastic", "Forgetful", "Together", "Varied"]
    assert found[BASE]["plays"] == "4.900" and found[BASE]["Mean of domains"] == "5.100"
    assert found[BASE]["Own texts, above pretrained"] == "0.000"
    runs = {run.seed: run for run in language_runs(language_results()) if run.key == "forgetful"}
    ends = [run.curve(0)[-1] for run in runs.values()]
    assert found["Forgetful"]["plays"] == f"{np.mean(ends):.3f} ± {np.std(ends, ddof=1):.3f}"
    found = by_label(language_results(), 1)
    assert found["Together"]["BWT"] == "–"  # noqa: RUF001
    assert "FWT" in found["Forgetful"] and "General abilities" not in found["Forgetful"]


def test_costs_stand_once_for_all_weights_of_a_training() -> None:
    captions = [caption for caption, _ in tables(language_results())]
    found = by_label(language_results(), captions.index("What it costs"))
    assert list(found) == ["Double", "Forgetful", "Together", "Varied"]
    assert found["Double"]["Buffer, kB"] == "1.0 ± 0.0"
    assert found["Forgetful"]["Buffer, kB"] == "–"  # noqa: RUF001


def test_answers_get_a_table_where_they_were_counted() -> None:
    assert not any("Right answers" in caption for caption, _ in tables(language_results()))
    assert by_label(language_results(right=7), 2)["Forgetful"]["Mean of tasks"] == "70.0 ± 0.0"


def test_weights_are_compared_seed_by_seed() -> None:
    (pair,) = pairs_of_weights(language_rows(language_results()))
    assert pair.label == "Double: stable less plastic"
    found, low, high = paired(pair, lambda run: run.curve(0)[-1])
    assert found["mean"] == pytest.approx(-0.2) and found["n"] == 3
    assert low == pytest.approx(-0.2) and high == pytest.approx(-0.2)
    cells = by_label(language_results(), 2)["Double: stable less plastic"]
    assert cells["plays"] == "-0.200 [-0.200, -0.200]"


def claim(**fields):
    return ClaimSpec(**{"claim": "c", "figures": ["ce"], **fields})


@pytest.mark.parametrize(
    ("spec", "verdict"),
    [
        (claim(test="less", row="double/stable", against="double/plastic"), "reproduced"),
        (claim(test="greater", row="double", against="double/plastic"), "opposite"),
        (claim(test="less", row="double", against=("double/plastic", "forgetful", "absent")), "reproduced"),
        (claim(test="less", row="varied", against=("double", "forgetful")), "not reproduced"),
        (claim(test="near", row="double/stable", against="double/plastic", margin=0.2), "reproduced"),
        (claim(test="near", row="double/stable", against="double/plastic", margin=0.05), "opposite"),
        (claim(test="less", row="absent", against="double"), "inconclusive"),
        (claim(test="less", row="together", against="double", figures=["bwt_ce"]), "inconclusive"),
    ],
)
def test_claims_speak_of_weights_and_of_several_rows(spec, verdict) -> None:
    (judged,) = judge({"H": spec}, language_results())
    assert judged["verdict"] == verdict


def test_two_seeds_decide_nothing() -> None:
    spec = claim(test="near", row="double/stable", against="double/plastic", margin=0.2)
    assert judge({"H": spec}, language_results((1, 2)))[0]["verdict"] == "inconclusive"


def test_words_of_a_claim_name_the_other_rows_and_those_that_did_not_run() -> None:
    results = language_results()
    results["claims"] = judge(
        {"H": claim(test="less", row="double", against=("double/plastic", "forgetful", "absent"))}, results
    )
    (row,) = format_claims(results).rows
    assert "Double stable" in row[3] and "Double plastic" in row[3] and "Forgetful" in row[3]
    assert row[3].endswith("not run: absent")
    assert json.loads(json.dumps(results["claims"]))[0]["left_out"] == ["absent"]


def test_the_page_shows_the_numbers_of_the_results_and_loads_nothing() -> None:
    results = language_results()
    results["claims"] = judge({"H": claim(test="less", row="double", against="forgetful")}, results)
    page = render_report(results)
    assert "default-src 'none'" in page
    assert not re.search(r"src=|href=\"[^#]", page)
    text = html.unescape(re.sub(r"<[^>]+>", "\n", page))
    for caption, table in tables(results):
        assert caption in text
        for cell in (cell for row in table.rows for cell in row):
            assert cell in text
    for run in language_runs(results):
        for task in range(3):
            assert f"{run.tests[-1][task]['nll'] / TOKENS[task]:.3f}" in text


def test_the_page_has_all_that_belongs_to_language() -> None:
    page = render_report(language_results())
    for words in (
        "Cross-entropy over the stages",
        "Domain 3: sums",
        "Double: stable less plastic",
        "What is left of the pretrained model",
        "Bytes after sums",
        "Once upon &lt;a time&gt;",
        "double stable after 2 &lt;1&gt;",
        "before &lt;1&gt;",
        "Sample &lt;run&gt;",
    ):
        assert words in page, words
    charts = page.split('id="curves"')[1].split("</section>")[0].split("<details>")[0]
    assert "Forgetful" in charts and "Varied" not in charts  # a variation of a row would crowd the chart
    assert "<1>" not in page


def test_samples_show_their_line_ends() -> None:
    results = language_results((1,))
    written = results["runs"][1]["language"]["stages"][0]["measured"][0]["samples"]
    written[0], written[1] = "two\n\nlines", "\n"
    page = render_report(results)
    assert "two \u21b5  \u21b5 lines" in page and "<td>\u21b5</td>" in page


def test_charts_begin_at_the_pretrained_model_and_have_bands() -> None:
    page = render_report(language_results())
    assert "Forgetful, pretrained: 4.900 ± 0.000" in page
    assert "Together, pretrained" not in page  # no line through what was not measured
    assert page.count('class="band') > 8


def test_results_that_are_no_language_results_are_refused() -> None:
    results = language_results()
    del results["runs"][0]["language"]
    with pytest.raises(DataError, match="run the recipe again"):
        render_report(results)
    with pytest.raises(DataError, match="two runs with one seed"):
        language_rows({**language_results(), "runs": [language_run("one", 1)] * 2})


def test_an_empty_run_has_a_page() -> None:
    assert "No run has been recorded" in render_report({**language_results(), "runs": []})
