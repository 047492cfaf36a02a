"""Every method with every head, over several streams and seeds: which one forgets least.

    python benchmarks/heads.py --streams digits --rows inflora,sequential --seeds 1993
    python benchmarks/heads.py --work runs/heads                    # everything, for hours; a stopped one goes on
    python benchmarks/heads.py --work runs/heads --collect benchmarks/results/heads

A head of statistics leaves a method's training as it is, so one training judges `linear` and all of these: after each
task the features of its training rows enter the statistics that a learner with that head would have, and the features
of all tests so far are scored by each. `_drift` stands for `head_drift=linear`. Only `cosine` heads are trained apart.
Streams, options and rows are those of the recipes' settings `heads`; with `--validation` examples held out of the
training rows take the place of the tests, which are then not read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from heads_ideas import IDEAS, AverageOfTasks, squared_loss
from processor import processor
from torch import Tensor

from everlora import Learner
from everlora.cli.parameters import parse_settings
from everlora.experiments.data import build_stream, read_splits
from everlora.experiments.plan import make_plan, row_options
from everlora.experiments.recipe import Recipe, load_recipe, recipe_text, stream_of
from everlora.heads import DriftSums, HeadOptions, StatisticalHead, held_out
from everlora.methods.base import Batch
from everlora.streams import Examples, Stream, concatenate

STREAMS: dict[str, tuple[str, str]] = {
    "digits": ("digits", "heads"),
    "digits-domains": ("digits-domains", "heads"),
    "cifar100": ("cifar100-vit-small", "heads"),
    "clinc150": ("clinc150-minilm", "heads"),
    "clinc150-domains": ("clinc150-minilm", "heads-domains"),
}
"""Name of a stream to recipe and setting."""

STATISTICAL = ("ncm", "lda", "ridge", "ridge_random_features")
DRIFTING = ("lda_drift", "ridge_drift")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "probe": ("probe", {}),
    "probe_layers": ("probe", {"feature_layers": 3}),
    "inflora_first": ("inflora", {"head": "ridge", "adapt_tasks": 1}),
    "inflora_first_layers": ("inflora", {"head": "ridge", "adapt_tasks": 1, "feature_layers": 3}),
    "sd_lora_first": ("sd_lora", {"head": "ridge", "adapt_tasks": 1}),
    "sequential_first": ("sequential", {"head": "ridge", "adapt_tasks": 1}),
    "inflora": ("inflora", {}),
    "sd_lora": ("sd_lora", {}),
    "sequential": ("sequential", {}),
    "joint": ("joint", {}),
    "replay": ("replay", {}),
    "lwf": ("lwf", {}),
    "ewc": ("ewc", {}),
    "o_lora": ("o_lora", {}),
    "sd_lora_rr": ("sd_lora_rr", {}),
    "sd_lora_kd": ("sd_lora_kd", {}),
    "inflora_opt": ("inflora_opt", {}),
}
"""Name of a row to the recipe's row, or a method that the recipe has no row for, and further options."""

RANDOM_FEATURES = 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: `head` is what it trains, `linear` or `cosine`."""

    stream: str
    row: str
    head: str
    seed: int
    options: tuple[str, ...] = ()
    validation: bool = False
    idea: str = ""

    @property
    def name(self) -> str:
        """A file name."""
        parts = [self.stream, self.row, self.head, *self.options, *([self.idea] if self.idea else [])]
        parts += ["validation"] if self.validation else []
        return "--".join([*parts, str(self.seed)]).replace("=", "-")


class Streams:
    """Streams by name and seed; each data set is read once."""

    def __init__(self) -> None:
        self._read: dict[str, Any] = {}

    def __call__(self, job: Job) -> tuple[Recipe, Stream]:
        """The recipe and the stream of a job."""
        name, setting_name = STREAMS[job.stream]
        recipe = load_recipe(name)
        if name not in self._read:
            self._read[name] = read_splits(recipe.data, recipe=name)[0]
        setting = recipe.settings[setting_name]
        if job.validation:
            setting = setting.model_copy(update={"evaluate_on": "validation"})
        parts = [(name, self._read[name])]
        return recipe, build_stream(recipe, setting, stream_of(recipe, setting), parts, seed=job.seed)


class Judges:
    """Heads of statistics over the features of one learner, and their right answers after each task."""

    def __init__(self, feature_dim: int, seed: int, *, heads: Sequence[str]) -> None:
        options = {name: _head_options(name) for name in heads}
        self.heads = {name: StatisticalHead(option, feature_dim, seed=seed) for name, option in options.items()}
        self.correct: dict[str, list[list[int]]] = {}

    def learn(self, features: Tensor, labels: Tensor, classes: Sequence[int], before: Tensor | None) -> None:
        """Add a task's rows `(n, d)` with class indices `(n,)`; `before` are their features before its training."""
        rows = torch.arange(len(labels))
        for head in self.heads.values():
            part = head.gathering()
            part.update(features, labels, rows)
            if before is not None and head.options.head_drift == "linear":
                moved = DriftSums(head.expand.dim)
                moved.update(head.expand(before), head.expand(features), held_out(rows))
                head.map(moved.fit().matrix)
            head.add_task(classes, part)

    def judge(self, trained: Mapping[str, list[Tensor]], tests: list[tuple[Tensor, Tensor]]) -> None:
        """Count right answers on features and labels of each test; `trained` holds scores of other heads."""
        scores = {name: [head.class_logits(features) for features, _ in tests] for name, head in self.heads.items()}
        for name, found in {**trained, **scores}.items():
            row = [int((s.argmax(1).cpu() == labels).sum()) for s, (_, labels) in zip(found, tests, strict=True)]
            self.correct.setdefault(name, []).append(row)


def _head_options(name: str) -> HeadOptions:
    return HeadOptions(
        head=name.removesuffix("_drift"),  # type: ignore[arg-type]
        head_features=RANDOM_FEATURES,
        head_drift="linear" if name.endswith("_drift") else "none",
    )


def features(learner: Learner, rows: Examples) -> Tensor:
    """Features `(n, d)` of rows by the model as it is now."""
    backbone = learner.backbone.eval()
    encoded = backbone.encode(rows.inputs)
    lengths = backbone.lengths(encoded)
    order = torch.arange(len(rows)) if lengths is None else torch.as_tensor(lengths).argsort(stable=True)
    result = torch.zeros(len(rows), backbone.feature_dim)
    with torch.no_grad(), learner.method.predicting(None):
        for numbers in torch.split(order, 128):
            result[numbers] = backbone.features(backbone.collate(encoded, numbers)).cpu()
    return result


def indices(learner: Learner, rows: Examples) -> Tensor:
    """Class index `(n,)` of each row."""
    assert rows.labels is not None
    return torch.tensor([learner.classes.index(str(label)) for label in rows.labels])


def measure(job: Job, streams: Streams) -> dict[str, Any]:
    """Train one row on one stream; return right answers by head, and what was measured how."""
    recipe, stream = streams(job)
    row, extra = ROWS[job.row]
    given = parse_settings(job.options)
    plan = make_plan(
        recipe_text(recipe.name), file=recipe.name, setting=STREAMS[job.stream][1], methods=[row], seeds=[job.seed]
    )
    method = recipe.methods[row].method if row in recipe.methods else row
    options: dict[str, Any] = row_options(plan, row, job.seed, len(stream)) | extra | given
    if job.head == "cosine":
        options |= {"head": "cosine"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner.create(
            Path(folder) / "learner", model=plan.model, method=method, scenario=stream.scenario, device="cpu", **options
        )
        with squared_loss() if job.idea == "squared_loss" else contextlib.nullcontext():
            correct = _learn_and_judge(learner, stream, job)
    sizes = [len(task.test) for task in stream.tasks if task.test is not None]
    return {
        **dataclasses.asdict(job),
        "method": method,
        "given": extra | given,
        "correct": correct,
        "sizes": sizes,
        "seconds": round(time.monotonic() - begun, 1),
        "date": datetime.date.today().isoformat(),
    }


def _learn_and_judge(learner: Learner, stream: Stream, job: Job) -> dict[str, list[list[int]]]:
    adapted = learner.settings.head.adapt_tasks
    moves = adapted is None and not learner.method.fixed_features and learner.trains_on == "task"
    heads = () if job.head == "cosine" else (*STATISTICAL, *(DRIFTING if moves else ()))
    judges = Judges(learner.backbone.feature_dim, job.seed, heads=heads)
    computed: dict[int, Tensor] = {}
    average = AverageOfTasks(learner) if job.idea == "average" else None

    def once(rows: Examples) -> Tensor:
        """Features of rows, computed again only after the encoder may have changed."""
        if id(rows) not in computed:
            computed[id(rows)] = current(rows)
        return computed[id(rows)]

    def current(rows: Examples) -> Tensor:
        with average.in_place() if average else contextlib.nullcontext():
            return features(learner, rows)

    for index, (name, rows, tests) in enumerate(_lessons(learner, stream)):
        before = current(rows) if index and moves and heads else None
        learner.learn(rows, name=name)
        if average:
            average.add_task()
        if not learner.method.fixed_features and (adapted is None or index < adapted):
            computed.clear()
        seen = sorted({learner.classes.index(label) for label in rows.classes})
        if heads:
            judges.learn(once(rows), indices(learner, rows), seen, before)
        judged = [(once(test), indices(learner, test)) for test in tests]
        trained = {}
        if adapted is None:
            batches = [Batch({}, labels, features=found) for found, labels in judged]
            with torch.no_grad(), learner.method.predicting(None):
                trained = {job.head: [learner.method.logits(batch) for batch in batches]}
        judges.judge(trained, judged)
        print(f"  {job.name}: {index + 1} of {len(stream)}", file=sys.stderr, flush=True)
    return judges.correct


def _lessons(learner: Learner, stream: Stream) -> Iterator[tuple[str, Examples, list[Examples]]]:
    """Name, training rows and tests so far of each task; all of them at once where the method wants that."""
    tests = [task.test for task in stream.tasks if task.test is not None]
    if learner.trains_on == "stream":
        yield "all-tasks", concatenate([task.train for task in stream.tasks]), tests
        return
    for index, task in enumerate(stream.tasks):
        yield task.name, task.train, tests[: index + 1]


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """All trainings that are wanted, the cheap and telling ones first."""
    streams, rows = arguments.streams or list(STREAMS), arguments.rows or list(ROWS)
    made = []
    for head in arguments.heads:
        for row in rows:
            if head == "cosine" and "adapt_tasks" in ROWS[row][1]:
                continue
            made += [
                Job(stream, row, head, seed, tuple(arguments.set), arguments.validation, arguments.idea)
                for seed in arguments.seeds
                for stream in streams
            ]
    return made


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    names = ("everlora", "torch", "transformers", "numpy", "scikit-learn")
    return {
        "device": f"CPU ({processor()}), {torch.get_num_threads()} thread",
        "versions": {name: metadata.version(name) for name in names},
        "head_features": RANDOM_FEATURES,
    }


def collect(work: Path, folder: Path) -> None:
    """Put the files of all finished trainings together, one file for each stream, one line for each training."""
    runs = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    head = json.dumps({"command": "python benchmarks/heads.py", **environment()})
    for stream in sorted({run["stream"] for run in runs}):
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs if run["stream"] == stream)
        (folder / f"{stream}.json").write_text(f'{head[:-1]}, "runs": [\n{lines}\n]}}\n')


def main() -> None:
    """Train what is missing, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--streams", type=names, default=[], help=f"of {', '.join(STREAMS)}")
    parser.add_argument("--rows", type=names, default=[], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--heads", type=names, default=["linear", "cosine"], help="what is trained")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1993, 1994, 1995]
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the learner")
    parser.add_argument("--idea", choices=IDEAS, default="", help="try what is no option; see heads_ideas.py")
    parser.add_argument("--validation", action="store_true", help="judge on validation rows; tests are not read")
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="one file for each finished training")
    parser.add_argument("--shard", default="0/1", help="I/N: only every N-th training, from the I-th on")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only put together what is there")
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.work, arguments.collect)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    arguments.work.mkdir(parents=True, exist_ok=True)
    first, step = (int(part) for part in arguments.shard.split("/"))
    streams = Streams()
    for job in jobs(arguments)[first::step]:
        path = arguments.work / f"{job.name}.json"
        if path.exists():
            continue
        result = measure(job, streams)
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)
        last = {name: 100 * sum(rows[-1]) / sum(result["sizes"]) for name, rows in result["correct"].items()}
        figures = " ".join(f"{name} {value:.1f}" for name, value in last.items())
        print(f"{job.name}: {figures} ({result['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
