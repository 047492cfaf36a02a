"""Statements that a run is held against: what was found, and whether it bears them out.

Numbers are compared seed by seed. A claim with several numbers is reproduced when all of them are, and opposite when
all of them are. Fewer than three seeds decide nothing.

Source: section 12 of the reference on convolutional networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from everlora.experiments.schema import ClaimSpec
from everlora.metrics import mean_and_deviation, paired_difference
from everlora.report.language import is_language, language_values
from everlora.report.table import run_values

__all__ = ["MIN_SEEDS", "Verdict", "compared", "joined", "judge", "near", "only_zero", "unchanged"]

MIN_SEEDS = 3

Verdict = Literal["reproduced", "not reproduced", "opposite", "inconclusive"]
Numbers = Mapping[int | None, float]
Finding = dict[str, Any]


def judge(claims: Mapping[str, ClaimSpec], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold a run against claims.

    Args:
        claims: by id.
        results: the content of `results.json`, as far as it is known.

    Returns:
        For each claim `id`, `claim`, `published`, `row`, `against`, `verdict`, `reason` (why nothing can be said, else
        empty), `left_out` (rows to compare with that were not run, where others were) and `findings`: for each number
        and other row its `figure`, `other`, `decides`, `n`, means of both rows and their `ratio`, `difference` with
        the ends of its 95 % bootstrap interval `low` and `high`, `margin` and `verdict`.
    """
    if not claims:
        return []
    values = language_values(results) if is_language(results) else run_values(results)
    return [_judged(name, claim, values, results) for name, claim in claims.items()]


def compared(first: Numbers, second: Numbers, *, wanted: Literal["greater", "less"], margin: float = 0.0) -> Finding:
    """Compare one number of two rows over the seeds that both have.

    The claim is reproduced when the whole 95 % interval of the mean difference lies on its side, `margin` allowed for,
    and opposite when the whole interval lies on the other.
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return {"n": 0, "verdict": "inconclusive", "reason": "no seed has the number in both rows"}
    left, right = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    found = paired_difference(left, right)
    finding = _means(left, right) | {"difference": found.mean, "low": found.low, "high": found.high, "margin": margin}
    low, high = (found.low, found.high) if wanted == "greater" else (_negative(found.high), _negative(found.low))
    if len(seeds) < MIN_SEEDS or low is None or high is None:
        return finding | {"verdict": "inconclusive", "reason": _too_few(len(seeds))}
    if low > -margin:
        return finding | {"verdict": "reproduced"}
    return finding | {"verdict": "opposite" if high < -margin else "not reproduced"}


def near(first: Numbers, second: Numbers, *, margin: float) -> Finding:
    """Check that a number of two rows is the same within `margin`, over the seeds that both have.

    The claim is reproduced when the whole 95 % interval of the mean difference lies within the margin, and opposite
    when the whole interval lies outside of it.
    """
    finding = compared(first, second, wanted="greater")
    low, high = finding.get("low"), finding.get("high")
    if finding["verdict"] == "inconclusive" or low is None or high is None:
        return finding
    inside = -margin <= low and high <= margin
    outside = low > margin or high < -margin
    verdict = "reproduced" if inside else ("opposite" if outside else "not reproduced")
    return finding | {"margin": margin, "verdict": verdict}


def only_zero(first: Numbers, second: Numbers, *, margin: float) -> Finding:
    """Check that a number is exactly 0 in every run of one row, while the other row's mean lies above `margin`.

    Where the other row stays below it there was nothing to avoid, and nothing is decided.
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return {"n": 0, "verdict": "inconclusive", "reason": "no seed has the number in both rows"}
    left, right = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    found = paired_difference(left, right)
    finding = _means(left, right) | {"difference": found.mean, "low": found.low, "high": found.high, "margin": margin}
    if len(seeds) < MIN_SEEDS:
        return finding | {"verdict": "inconclusive", "reason": _too_few(len(seeds))}
    if finding["against"]["mean"] <= margin:
        return finding | {"verdict": "inconclusive", "reason": "the other row does not exceed the margin either"}
    if not any(left):
        return finding | {"verdict": "reproduced"}
    worse = found.low is not None and found.low > 0
    return finding | {"verdict": "opposite" if worse else "not reproduced"}


def unchanged(runs: Sequence[Mapping[str, Any]]) -> Finding:
    """Check in every run that the pretrained tensors, and each task's own after it was learned, stayed bit for bit."""
    if not runs or any(not run.get("digests") for run in runs):
        return {"n": 0, "verdict": "inconclusive", "reason": "no run of the row recorded its tensors"}
    base = sum(_base_stays(run) for run in runs)
    tasks = sum(_tasks_stay(run) for run in runs)
    finding: Finding = {"n": len(runs), "pretrained_unchanged": base, "tasks_unchanged": tasks}
    if len(runs) < MIN_SEEDS:
        return finding | {"verdict": "inconclusive", "reason": _too_few(len(runs))}
    if base == tasks == len(runs):
        return finding | {"verdict": "reproduced"}
    return finding | {"verdict": "opposite" if base == tasks == 0 else "not reproduced"}


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of a claim from those of the numbers that decide it."""
    if "inconclusive" in verdicts:
        return "inconclusive"
    return verdicts[0] if len(set(verdicts)) == 1 else "not reproduced"


def _judged(
    name: str,
    claim: ClaimSpec,
    values: Mapping[str, Mapping[int | None, Mapping[str, float | None]]],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    left_out: list[str] = []
    if claim.test == "unchanged":
        runs = [run for run in results["runs"] if run["method"] == claim.row]
        findings = [{"figure": "unchanged", "decides": True, **unchanged(runs)}]
    else:
        others = [other for other in claim.others if other in values]
        left_out = [other for other in claim.others if others and other not in values]
        pairs = [(figure, other) for other in others or claim.others for figure in (*claim.figures, *claim.shown)]
        findings = [_finding(claim, figure, other, values) for figure, other in pairs]
    deciding = [finding for finding in findings if finding["decides"]]
    verdict = joined([finding["verdict"] for finding in deciding])
    reasons = dict.fromkeys(finding["reason"] for finding in deciding if finding.get("reason"))
    return {
        "id": name,
        "claim": claim.claim,
        "published": claim.published,
        "row": claim.row,
        "against": claim.against if not isinstance(claim.against, tuple) else list(claim.against),
        "verdict": verdict,
        "reason": "; ".join(reasons) if verdict == "inconclusive" else "",
        "left_out": left_out,
        "findings": findings,
    }


def _finding(
    claim: ClaimSpec,
    figure: str,
    other: str,
    values: Mapping[str, Mapping[int | None, Mapping[str, float | None]]],
) -> Finding:
    head = {"figure": figure, "other": other, "decides": figure in claim.figures}
    absent = [row for row in (claim.row, other) if row not in values]
    if absent:
        return {**head, "n": 0, "verdict": "inconclusive", "reason": f"not run: {', '.join(absent)}"}
    first, second = (_numbers(values[row], figure) for row in (claim.row, other))
    if claim.test == "only_zero":
        return {**head, **only_zero(first, second, margin=claim.margin)}
    if claim.test == "near":
        return {**head, **near(first, second, margin=claim.margin)}
    assert claim.test != "unchanged"  # has no numbers
    return {**head, **compared(first, second, wanted=claim.test, margin=claim.margin)}


def _numbers(runs: Mapping[int | None, Mapping[str, float | None]], figure: str) -> dict[int | None, float]:
    return {seed: value for seed, run in runs.items() if (value := run.get(figure)) is not None}


def _means(left: Sequence[float], right: Sequence[float]) -> Finding:
    pairs = {"row": mean_and_deviation(left), "against": mean_and_deviation(right)}
    ratio = pairs["row"][0] / pairs["against"][0] if pairs["against"][0] else None
    return {"n": len(left), "ratio": ratio} | {name: {"mean": mean, "sd": sd} for name, (mean, sd) in pairs.items()}


def _base_stays(run: Mapping[str, Any]) -> bool:
    return all(entry["pretrained"] == run["pretrained_digest"] for entry in run["digests"])


def _tasks_stay(run: Mapping[str, Any]) -> bool:
    """Whether each task's tensors are at the end, and always were, what they were when it was learned."""
    rows = [entry["tasks"] for entry in run["digests"]]
    return all(earlier == later[: len(earlier)] for earlier, later in itertools.pairwise(rows))


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _too_few(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}, fewer than {MIN_SEEDS}"
