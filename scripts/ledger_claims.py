"""Which claims our results bear out: verdicts, made of results, tests and pages, each with what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ledger_records import REPOSITORY, Claim, Evidence, System, Verdict
from ledger_results import HEADS, Result, Row

from everlora.comparison.measures import measure
from everlora.errors import DataError
from everlora.experiments.claims import MIN_SEEDS, Finding, compared, joined, near

__all__ = ["Decision", "decisions", "judged_by_runs", "run_link"]

# A run says what it reproduced; what it cannot tell apart from chance is not confirmed.
_VERDICTS: Mapping[str, Verdict] = {
    "reproduced": "confirmed",
    "not reproduced": "not confirmed",
    "opposite": "not confirmed",
    "inconclusive": "open",
}
_NAMES = {"path_dip": "accuracy of old tasks below that of the worse end, as a fraction"}
# How close to a strict fall the ranks of values must be, 1 being one.
_FALLS = 0.9


@dataclass(frozen=True)
class Decision:
    """One line of a table of claims: `by` names the run, the tests or the page that decided, as Markdown."""

    claim: str
    source: str
    verdict: Verdict
    by: str
    found: str
    published: str = ""


def decisions(system: System, results: Mapping[str, Result]) -> list[Decision]:
    """Return a verdict for each claim of a system, and for those that the recipes of its runs make.

    Raises:
        DataError: a claim names a result, row, test or page that is not there.
    """
    return [_decision(claim, results) for claim in system.claims] + judged_by_runs(system.claims_of, results)


def judged_by_runs(sources: Mapping[str, str], results: Mapping[str, Result]) -> list[Decision]:
    """Return the claims that the recipes of these results make, as the runs judged them.

    Args:
        sources: who makes them, by the result's name.
        results: all of them.
    """
    return [one for name, source in sources.items() for one in _judged_by_the_run(_result(name, results), source)]


def run_link(name: str) -> str:
    """A link to a result's place on the page."""
    return f"[{name}](#run-{name.replace('/', '-')})"


def _judged_by_the_run(result: Result, source: str) -> list[Decision]:
    return [
        Decision(
            claim["claim"],
            f"{source} ({claim['id']})",
            _VERDICTS[claim["verdict"]],
            run_link(result.name),
            _also(claim["verdict"], claim["found"] or claim["reason"]),
            claim["published"],
        )
        for claim in result.claims
    ]


def _decision(claim: Claim, results: Mapping[str, Result]) -> Decision:
    by = claim.by
    if by is None:
        return Decision(claim.claim, claim.source, "open", "–", claim.open, claim.published)  # noqa: RUF001
    if by.result:
        verdict, found = _of_result(by, results)
        where = run_link(by.result) if by.result in results else f"`{by.result}`"
        return Decision(claim.claim, claim.source, verdict, where, found, claim.published)
    assert by.verdict is not None
    if by.tests:
        names = ", ".join(f"`{_existing_test(test)}`" for test in by.tests)
        return Decision(claim.claim, claim.source, by.verdict, f"tests: {names}", by.because, claim.published)
    page = by.read.partition("#")[0]
    if not (REPOSITORY / "docs" / page).is_file():
        raise DataError(f"claim '{claim.claim}' names the page {page}, which is not there; name another.")
    return Decision(claim.claim, claim.source, by.verdict, f"read: [{page}]({by.read})", by.because, claim.published)


def _existing_test(test: str) -> str:
    """The name of a test as given.

    Raises:
        DataError: its file has no such test.
    """
    file, _, name = test.partition("::")
    path = REPOSITORY / file
    if not path.is_file() or f"def {name}(" not in path.read_text(encoding="utf-8"):
        raise DataError(f"{test}: there is no such test; name the one that took its place.")
    return f"{Path(file).name}::{name}"


def _result(name: str, results: Mapping[str, Result]) -> Result:
    if name not in results:
        raise DataError(f"benchmarks/results holds no {name}; record it, or take the claim away.")
    return results[name]


def _of_result(by: Evidence, results: Mapping[str, Result]) -> tuple[Verdict, str]:
    if by.result.startswith(f"{HEADS}/") and not _is_measured(by, results):
        return "open", "not measured yet"
    result = _result(by.result, results)
    row = _row(result, by.row)
    if by.test == "falls":
        return _falls(row, by.panel)
    if by.test == "at_most":
        return _at_most(result, row, by)
    other = _row(result, by.against)
    found = [(name, _compared(by, row, other, name)) for name in by.figures]
    verdict = joined([finding["verdict"] for _, finding in found])
    said = "; ".join(_words(result, name, row, other, finding) for name, finding in found)
    return _VERDICTS[verdict], said if by.at_least else _also(verdict, said)


def _is_measured(by: Evidence, results: Mapping[str, Result]) -> bool:
    """Whether the comparison of heads, which is measured row by row, has the rows of a claim."""
    return by.result in results and {by.row, by.against} <= set(results[by.result].rows)


def _row(result: Result, name: str) -> Row:
    if name not in result.rows:
        raise DataError(f"result {result.name} has no row '{name}'; it has {', '.join(result.rows)}.")
    return result.rows[name]


def _compared(by: Evidence, row: Row, other: Row, figure: str) -> Finding:
    first, second = row.numbers(figure), other.numbers(figure)
    if by.test == "near":
        return near(first, second, margin=by.margin)
    # to exceed by so much is to exceed with a negative allowance
    return compared(first, second, wanted="less" if by.test == "less" else "greater", margin=by.margin - by.at_least)


def _words(result: Result, figure: str, row: Row, other: Row, finding: Finding) -> str:
    if not finding["n"]:
        return str(finding["reason"])
    unit = measure(figure, is_language=result.is_language)
    means = [f"{finding[side]['mean'] * unit.scale:.{unit.decimals}f}" for side in ("row", "against")]
    difference = f"{finding['difference'] * unit.scale:+.{unit.decimals}f}"
    if finding["low"] is not None:
        low, high = (f"{finding[end] * unit.scale:+.{unit.decimals}f}" for end in ("low", "high"))
        difference += f" [{low}, {high}]"
    seeds = f"{finding['n']} {'seed' if finding['n'] == 1 else 'seeds'}"
    return f"{unit.heading}: {row.label} {means[0]}, {other.label} {means[1]}, difference {difference}, {seeds}"


def _also(verdict: str, found: str) -> str:
    """What was found, with the word that a table of three verdicts has no room for."""
    return f"the opposite: {found}" if verdict == "opposite" else found


def _falls(row: Row, panel: str) -> tuple[Verdict, str]:
    """Whether the values fall from task to task in every seed, by the correlation of their ranks with the tasks'.

    The newest task's is left out: it has not been scaled like the others yet.
    """
    series = {seed: values[:-1] for seed, values in row.panels.get(panel, {}).items() if len(values) > 2}
    if not series:
        raise DataError(f"row {row.label} has no {panel}; record the run with --panel {panel}.")
    found = {seed: _rank_correlation(values) for seed, values in series.items()}
    said = "; ".join(
        f"seed {seed}: from {values[0]:.2f} to {values[-1]:.2f} over {len(values)} tasks, "
        f"rank correlation with the task's number {found[seed]:.2f}"
        for seed, values in series.items()
    )
    if len(found) < MIN_SEEDS:
        return "open", f"{said}; fewer than {MIN_SEEDS} seeds"
    return "confirmed" if all(one < -_FALLS for one in found.values()) else "not confirmed", said


def _at_most(result: Result, row: Row, by: Evidence) -> tuple[Verdict, str]:
    """Whether one figure stays below a bound in every seed."""
    (figure,) = by.figures
    numbers, unit = row.numbers(figure), measure(figure, is_language=result.is_language)
    said = f"{_NAMES.get(figure, unit.heading)}: " + ", ".join(
        f"{value:.{unit.decimals}f} (seed {seed})" for seed, value in numbers.items()
    )
    if len(numbers) < MIN_SEEDS:
        return "open", f"{said}; fewer than {MIN_SEEDS} seeds"
    return "confirmed" if max(numbers.values()) <= by.margin else "not confirmed", said


def _rank_correlation(values: list[float]) -> float:
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
