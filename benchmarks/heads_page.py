"""The tables of `docs/which-head.md`, from what `heads.py` measured.

python benchmarks/heads_page.py            # writes the page
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from everlora.metrics import AccuracyMatrix

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results" / "heads"
PAGE = _ROOT / "docs" / "which-head.md"

STREAMS = ("digits", "digits-domains", "cifar100", "clinc150", "clinc150-domains")
HEADS = ("linear", "cosine", "ncm", "lda", "lda_drift", "ridge", "ridge_drift", "ridge_random_features")
REFERENCES = (("probe", "linear"), ("inflora", "linear"), ("sd_lora", "linear"))
"""Rows and heads that a recommendation must beat on every stream."""

FROZEN = ("probe", "probe_layers")
TRAINED = ("linear", "cosine")

Results = dict[str, Any]
Figures = dict[tuple[str, str], dict[str, list[float]]]
"""By row and head: `last` and `avg` in percent, one value a seed; no `avg` for what learns all at once."""


def read_results(folder: Path = RESULTS) -> Results:
    """What `heads.py --collect` wrote, the trainings of all streams together."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {**parts[0], "runs": [run for part in parts for run in part["runs"]]}


def filled(text: str, results: Results) -> str:
    """The page with what stands between its marks `<!-- figures: NAME -->` and `<!-- end -->` made anew."""
    blocks: dict[str, Callable[[Results], str]] = {
        "chosen": chosen_table,
        "gaps": gap_table,
        "ideas": ideas_table,
        "run": sentence,
    }
    blocks["full"] = lambda _: full_table(FULL)
    blocks["standard"] = lambda _: full_table(STANDARD)
    blocks |= {name: functools.partial(stream_table, stream=name) for name in STREAMS}
    pattern = r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{blocks[found[2]](results)}\n{found[3]}", text, flags=re.DOTALL)


def figures(results: Results, stream: str, *, validation: bool = False) -> Figures:
    """What was measured on a stream with the recipe's own options."""
    found: Figures = {}
    for run in results["runs"]:
        if run["stream"] != stream or run["validation"] != validation or run["options"] or run.get("idea"):
            continue
        for head, correct in run["correct"].items():
            add(found.setdefault((run["row"], head), {}), correct, run["sizes"])
    return found


def add(values: dict[str, list[float]], correct: list[list[int]], sizes: list[int]) -> None:
    """Append the figures of one seed."""
    if len(correct) == 1:  # all tasks learned at once
        values.setdefault("last", []).append(100 * mean(c / n for c, n in zip(correct[0], sizes, strict=True)))
        return
    for name, value in zip(("last", "avg"), _summary(tuple(map(tuple, correct)), tuple(sizes)), strict=True):
        values.setdefault(name, []).append(value)


@functools.cache
def _summary(correct: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> tuple[float, float]:
    """Last and average accuracy in percent; every table asks for the same ones."""
    padded = np.array([[*row, *[np.nan] * (len(sizes) - len(row))] for row in correct])
    summary = AccuracyMatrix.from_counts(padded, sizes).summary()
    return 100 * float(summary["last"] or 0), 100 * float(summary["avg"] or 0)


def stream_table(results: Results, *, stream: str) -> str:
    """Rows by heads: last and average accuracy."""
    found = figures(results, stream)
    heads = [head for head in HEADS if any(key[1] == head for key in found)]
    rows = list(dict.fromkeys(row for row, _ in found))
    rows.sort(key=_order)
    lines = [[f"`{row}`", *(_cell(found.get((row, head))) for head in heads)] for row in rows]
    return _table(["method", *(f"`{head}`" for head in heads)], lines)


def chosen(results: Results) -> tuple[str, str]:
    """Row and head of the largest mean last accuracy over the streams, of those measured on all with three seeds.

    What trains nothing is taken where what trains is not ahead by more than
    noise: the mean over streams of the larger deviation of the two.
    """
    found = [figures(results, stream) for stream in STREAMS]
    common = set.intersection(*(set(of) for of in found))
    complete = [key for key in common if all(len(of[key].get("avg", ())) >= 3 for of in found)]

    def height(key: tuple[str, str]) -> float:
        return mean(mean(of[key]["last"]) for of in found)

    best = max(complete, key=height)
    still = max((key for key in complete if key[0] in FROZEN and key[1] not in TRAINED), key=height)
    noise = mean(max(_deviation(of[key]["last"]) for key in (best, still)) for of in found)
    return best if height(best) - height(still) > noise else still


def chosen_table(results: Results) -> str:
    """On each stream the recommendation and what it has to beat."""
    choice = chosen(results)
    lines = []
    for stream in STREAMS:
        found = figures(results, stream)
        ours, others = found[choice], [found.get(key) for key in REFERENCES]
        lines.append([stream, _cell(ours), *(_cell(other) for other in others), _ahead(ours, others)])
    references = [f"`{row}`, published head" for row, _ in REFERENCES]
    return _table(["stream", f"`{choice[0]}`, `{choice[1]}`", *references, "ahead"], lines)


def gap_table(results: Results) -> str:
    """On each stream the best of what learns task after task, and how far it and the recommendation are from joint."""
    choice = chosen(results)
    lines = []
    for stream in STREAMS:
        every = figures(results, stream)
        found = {key: values for key, values in every.items() if "avg" in values}
        best = max(found, key=lambda key: mean(found[key]["last"]))
        joints = [every.get(("joint", head)) for head in TRAINED]
        ours, its = (" / ".join(_gap(joint, found[key]) for joint in joints) for key in (choice, best))
        lines.append([stream, *map(_cell, joints), ours, f"`{best[0]}`, `{best[1]}`", _cell(found[best]), its])
    joints_by_head = [f"joint, `{head}`" for head in TRAINED]
    return _table(["stream", *joints_by_head, "gap of the choice", "best measured", "its figures", "its gap"], lines)


def _gap(joint: dict[str, list[float]] | None, ours: dict[str, list[float]]) -> str:
    return "not measured" if joint is None else f"{mean(joint['last']) - mean(ours['last']):+.1f}"


def _ahead(ours: dict[str, list[float]], others: Iterable[dict[str, list[float]] | None]) -> str:
    """Whether means of last and average are above those of all others by more than the larger deviation."""
    if any(other is None for other in others):
        return "not measured"
    apart = [
        mean(ours[name]) - mean(other[name]) > max(_deviation(ours[name]), _deviation(other[name]))
        for other in others
        if other is not None
        for name in ("last", "avg")
    ]
    return "yes" if all(apart) else "no"


def ideas_table(results: Results) -> str:
    """What was tried on validation rows: last accuracy by stream, for trained heads and those of statistics."""
    runs = [run for run in results["runs"] if run["validation"]]
    streams = [name for name in STREAMS if any(run["stream"] == name for run in runs)]
    tried: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        named = {"squared_loss": "squared error as loss", "average": "factors averaged over tasks"}
        idea = run.get("idea")
        trained = [f"head={run['head']}"] * (run["head"] != "linear")
        key = (run["row"], ", ".join([*trained, *run["options"], *([named[idea]] if idea else [])]))
        for head, correct in run["correct"].items():
            column = "trained" if head in TRAINED else head
            values = tried.setdefault(key, {}).setdefault(run["stream"], {}).setdefault(column, [])
            values.append(100 * mean(c / n for c, n in zip(correct[-1], run["sizes"], strict=True)))
    lines = []
    for (row, options), by_stream in sorted(tried.items(), key=lambda item: (_order(item[0][0]), item[0][1])):
        cells = []
        for stream in streams:
            by_head = by_stream.get(stream, {})
            cells.append(" / ".join(f"{mean(by_head[h]):.1f}" if h in by_head else "-" for h in _IDEA_HEADS))
        lines.append([f"`{row}`", options or "", *cells])
    return _table(["row", "options", *streams], lines)


_IDEA_HEADS = ("trained", "lda", "lda_drift", "ridge", "ridge_random_features")


FULL = (
    (
        "clinc150-minilm-ridge_random_features-3-layers",
        "probe",
        "frozen encoder, three layers, `ridge_random_features`",
    ),
    ("clinc150-minilm-lda-3-layers", "probe", "frozen encoder, three layers, `lda`"),
    ("clinc150-minilm-ridge_random_features", "probe", "frozen encoder, `ridge_random_features`"),
    ("clinc150-minilm-lda", "probe", "frozen encoder, `lda`"),
    ("clinc150-minilm-standard", "ncm", "frozen encoder, nearest class mean"),
    ("clinc150-minilm-standard", "probe", "frozen encoder, trained heads"),
    ("clinc150-minilm-standard", "inflora", "InfLoRA, its published heads"),
    ("clinc150-minilm-standard", "joint", "joint training"),
)
"""File of record, row, and what to call it."""


STANDARD = (
    ("cifar100-vit-small-lda-3-layers", "probe", "frozen network, three layers, `lda`"),
    ("cifar100-vit-small-standard", "ncm", "frozen network, nearest class mean"),
    ("cifar100-vit-small-standard", "probe", "frozen network, trained heads"),
    ("cifar100-vit-small-standard", "inflora", "InfLoRA, its published heads"),
    ("cifar100-vit-small-standard", "joint", "joint training"),
)
"""The same of CIFAR-100 in its standard setting."""


def full_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Runs of record, and their distance to joint training, which comes last."""
    found = []
    for file, row, label in rows:
        seeds = json.loads((RESULTS.parent / f"{file}.json").read_text())["rows"][row]["seeds"].values()
        named = {name: [100 * one[name] for one in seeds if one.get(name) is not None] for name in ("last", "avg")}
        found.append((label, {name: values for name, values in named.items() if values}))
    joint = mean(found[-1][1]["last"])
    lines = [[label, _cell(values), f"{joint - mean(values['last']):.1f}"] for label, values in found]
    return _table(["row", "last / average", "gap to joint"], lines)


def sentence(results: Results) -> str:
    """When and on what it was measured."""
    dates = sorted({run["date"] for run in results["runs"]})
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"`{results['command']}`, {span}, {results['device']}; {versions}; {results['head_features']} random features; "
        f"{len(results['runs'])} trainings."
    )


def _order(row: str) -> tuple[int, str]:
    names = (
        "probe",
        "probe_layers",
        "inflora",
        "inflora_first",
        "inflora_first_layers",
        "sd_lora",
        "sd_lora_first",
        "sequential",
    )
    return (names.index(row) if row in names else len(names) + (row == "joint"), row)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _cell(values: dict[str, list[float]] | None) -> str:
    if not values:
        return "-"
    parts = [f"{mean(of):.1f}" + (f" ± {stdev(of):.1f}" if len(of) > 1 else "") for of in values.values()]
    seeds = len(values["last"])
    return " / ".join(parts) + ("" if seeds >= 3 else f" ({seeds} seed{'s' * (seeds > 1)})")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)])


def main() -> None:
    """Write the page anew, or say that it is not what it would be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), read_results()), encoding="utf-8")


if __name__ == "__main__":
    main()
