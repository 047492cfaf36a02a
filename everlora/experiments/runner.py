"""`run`: rows times seeds of a recipe, into one folder with results and a report."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import everlora
from everlora import __version__
from everlora.errors import OptionError, UnsupportedError
from everlora.experiments.claims import judge
from everlora.experiments.commits import commits
from everlora.experiments.data import Progress
from everlora.experiments.execution import execute
from everlora.experiments.paths import has_path, path_positions
from everlora.experiments.plan import DATA_HASH, Plan, Streams, changes, make_plan, method_row
from everlora.experiments.pool import run_jobs
from everlora.experiments.recipe import recipe_text
from everlora.experiments.records import is_fresh, read_json, write_json
from everlora.experiments.schema import PublishedFigure
from everlora.report import write_report
from everlora.tracking import check_trackers
from everlora.training import Interval
from everlora.training.processes import processes

__all__ = ["run"]

logger = logging.getLogger("everlora.experiments")

FORMAT = 1
_LIBRARIES = ("torch", "transformers", "datasets", "numpy", "peft", "accelerate", "scikit-learn", "safetensors")
# Rows and seeds may be added to a folder later; these must stay as they are.
_FIXED = ("text", "setting", "model", "data", "options", DATA_HASH)
_COPIED = (
    "method",
    "label",
    "seed",
    "correct",
    "task_aware",
    "task_correct",
    "task_confusion",
    "sizes",
    "cost",
    "panels",
    "options",
    "resolved",
    "paths",
    "reference_parameters",
    "recognition",
    "pretrained_digest",
    "digests",
    "language",
)


def run(
    recipe: str | Path,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    data: Any = None,
    model: str | Path | None = None,
    setting: str | None = None,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    path_points: int = 0,
    checkpoint_every: str | int | None = None,
    discard_unfinished: bool = False,
    track: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Run a recipe: every method with every seed, measured after each task.

    Rows already complete in `out` are not run again, and a row that was interrupted goes on where it was, also within
    a task; so the same call resumes, and a call with more methods or seeds adds to the folder.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        methods: rows to run, exactly these; a registered method without a row in the recipe runs with its defaults.
            `None` takes the recipe's default rows, which include the baselines that a table needs, and `["all"]`
            every row of the recipe.
        seeds: one run for each; `None` takes the recipe's.
        data: folder or file that replaces the recipe's data, or splits in memory (a mapping of `Examples`).
        model: base model that replaces the recipe's.
        setting: which of the recipe's settings; `None` takes its default.
        out: folder for results; `None` makes `runs/<recipe>-<time>`.
        options: method, training and backbone options that win over the recipe's. A method option reaches the rows
            whose method has it.
        progress: called as `progress(stage, done, total)`.
        workers: processes, of one thread each, that share rows and seeds. The numbers equal those of one process
            with one thread. `None` takes the recipe's number, at most one for each core, and one for data in memory.
        path_points: measure accuracy on the test rows also at this many weights on the straight line from half a step
            before each task's model to half a step after the next one's; 0 for none. A folder without them gets them
            by the same call with this argument, and nothing is learned again.
        checkpoint_every: how often the task that is being learned is saved, as the learner's option of that name.
        discard_unfinished: put what is left of interrupted tasks aside instead of going on with them.
        track: names of experiment trackers, as `everlora.tracking.check_trackers` takes them; their files go into
            `tracking/` in the folder.

    Returns:
        The content of `results.json`, and `folder`, where it lies.

    Raises:
        OptionError: an unknown recipe, setting, row or option, or a folder with results of another configuration.
        DataError: the data cannot be found or does not fit the recipe.
        ModelError: no base model can be found.
        UnsupportedError: several workers with data in memory, or several processes under torchrun.
        InterruptedLearning: somebody asked for a stop.
    """
    if processes().size > 1:
        raise UnsupportedError(
            f"a recipe is run by one process, found {processes().size}; start it without torchrun and share its rows "
            "and seeds with workers, or teach a Learner under torchrun."
        )
    if path_points:
        path_positions(path_points)
    saving: dict[str, Any] = {"discard_unfinished": True} if discard_unfinished else {}
    if checkpoint_every is not None:
        Interval.of(checkpoint_every)
        saving["checkpoint_every"] = str(checkpoint_every)
    text = recipe_text(recipe)
    plan = make_plan(
        text,
        file=Path(recipe).name,
        setting=setting,
        methods=methods,
        seeds=seeds,
        model=model,
        data=data,
        options=options,
    )
    plan = dataclasses.replace(plan, path_points=path_points, saving=saving, track=check_trackers(track))
    workers = _number_of_workers(workers, plan)
    _warn_of_missing_paths(plan)
    report = progress or _silent
    streams = Streams(plan, report)
    streams(plan.seeds[0])  # data that is missing or wrong is reported here, before any process starts
    folder = _open_folder(plan, Path(out) if out is not None else None, streams.fingerprint)
    if workers == 1:
        for row, seed in plan.jobs:
            execute(plan, row, seed, streams=streams, out=folder, progress=report)
    else:
        run_jobs(folder / "plan.json", plan.jobs, workers=workers, progress=report)
    results = _results(plan, folder, streams, threads=torch.get_num_threads() if workers == 1 else 1)
    write_json(folder / "results.json", results)
    write_report(results, folder / "report.html")
    return results | {"folder": str(folder)}


def _number_of_workers(given: int | None, plan: Plan) -> int:
    """How many processes share the work; one means this process itself."""
    in_memory = plan.data is not None and not isinstance(plan.data, str | Path)
    if given is None:
        return 1 if in_memory else min(plan.recipe.workers, os.cpu_count() or 1, len(plan.jobs))
    if given < 1:
        raise OptionError(f"workers is {given}; give 1 or more.")
    if given > 1 and in_memory:
        raise UnsupportedError("Data in memory cannot be handed to other processes; give a folder, or use one worker.")
    return given


def _warn_of_missing_paths(plan: Plan) -> None:
    """Name the rows that will have no path although one was asked for."""
    rows = [row for row in plan.rows if plan.path_points and not has_path(method_row(plan.recipe, row).method)]
    if rows:
        logger.warning("no accuracy along paths for %s: the method keeps no earlier weights.", ", ".join(rows))


def _silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""


def _open_folder(plan: Plan, out: Path | None, data_hash: str) -> Path:
    """Make the folder and put the plan into it, or check that the plan there is the same experiment."""
    if out is None:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        out = Path("runs") / f"{plan.recipe.name}-{moment}"
    file = out / "plan.json"
    values = {**plan.to_json(), DATA_HASH: data_hash}
    if file.exists():
        if other := changes(read_json(file), values, _FIXED):
            raise OptionError(f"{out} holds results with another {other[0]}; choose another folder with --out.")
    elif not is_fresh(out, file.name):
        raise OptionError(f"{out} is not empty and holds no results of a run; choose another folder with --out.")
    write_json(file, values)
    return out


def _finished(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """All finished records in the folder, also of earlier calls: rows in the recipe's order, seeds ascending."""
    records = [read_json(path) for path in sorted(folder.glob("*/run.json"))]
    order = {row: index for index, row in enumerate(plan.recipe.methods)}
    done = [record for record in records if record["rows_done"] == record["num_tasks"]]
    return sorted(done, key=lambda record: (order.get(record["method"], len(order)), record["method"], record["seed"]))


def _results(plan: Plan, folder: Path, data: Streams, *, threads: int) -> dict[str, Any]:
    recipe, setting = plan.recipe, plan.setting
    records = _finished(plan, folder)
    seeds = sorted({int(record["seed"]) for record in records})
    streams = {record["seed"]: record["stream"] for record in records}
    stream = streams[seeds[0]]
    known = {row: method_row(recipe, row) for row in dict.fromkeys(record["method"] for record in records)}
    same_order = len({one["order_hash"] for one in streams.values()}) == 1
    settings = {"setting": plan.setting_name, **setting.model_dump(mode="json", exclude_defaults=True)}
    results = {
        "format": FORMAT,
        "recipe": {"name": recipe.name, "title": recipe.title, "status": recipe.status, "text": plan.text},
        "stream": {**stream, "order_seed": stream["order_seed"] if same_order else "the run's seed"},
        "streams": {str(seed): streams[seed] for seed in seeds},
        "data": data.source,
        DATA_HASH: data.fingerprint,
        "model": plan.model if not Path(plan.model).is_dir() else Path(plan.model).name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"everlora": __version__, "python": platform.python_version(), **_library_versions()},
        "commits": commits(Path(everlora.__file__).parent, Path.cwd()),
        "device": _device(),
        "threads": threads,
        "seeds": seeds,
        "settings": settings | {"options": dict(plan.options)},
        "runs": [{name: record[name] for name in _COPIED if name in record} for record in records],
        "published": [_published(figure) for figure in recipe.published if figure.setting == plan.setting_name],
        "notes": recipe.notes,
        "table": recipe.table,
        "reference": recipe.reference,
        "rows": {
            name: row.model_dump(mode="json", include={"family", "trials", "ablation"}) for name, row in known.items()
        },
    }
    return results | {"claims": judge(recipe.claims, results)}


def _published(figure: PublishedFigure) -> dict[str, Any]:
    """A published figure in percent, as its source prints it, with its deviations in the note too."""
    values = figure.model_dump(mode="json")
    deviations = [f"{name} ± {values[f'{name}_sd']}" for name in ("last", "avg") if values[f"{name}_sd"] is not None]
    return values | {"note": "; ".join([*deviations, *([figure.note] if figure.note else [])]) or None}


def _library_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
