"""Tables of a run as Markdown."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import results_markdown

from everlora.report import format_table, summarise
from tests.report.conftest import sample_results


def test_every_row_of_the_table_is_there() -> None:
    results = sample_results()
    results["runs"][0]["label"] = "Fall|ing"
    lines = results_markdown.markdown(results).splitlines()
    table = format_table(summarise(results))
    assert len(lines) == 2 + 2 + len(table.rows)
    assert lines[2] == f"| {' | '.join(table.columns)} |"
    assert lines[3].count("---") == len(table.columns)
    assert lines[4].startswith("| Fall\\|ing |")
