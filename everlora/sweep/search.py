"""`sweep`: settings of a recipe's options, tried on training rows alone."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from everlora import __version__
from everlora.errors import OptionError, UnsupportedError, nearest
from everlora.experiments.data import Progress
from everlora.experiments.plan import DATA_HASH, Plan, changes, make_plan
from everlora.experiments.pool import run_jobs
from everlora.experiments.recipe import load_recipe, recipe_text
from everlora.experiments.records import is_fresh, read_json, write_json
from everlora.report.page import write_text
from everlora.report.sweep import markdown_table, write_sweep_report
from everlora.sweep.plan import SweepPlan, Trial, make_trials
from everlora.sweep.results import collect
from everlora.sweep.space import Space, drawn_settings, grid_settings, read_space
from everlora.sweep.streams import SearchStreams
from everlora.sweep.trial import read_outcome, run_trial

__all__ = ["sweep"]

FORMAT = 1
FIRST_TASK_SHARE = 0.2
SPLIT_SEED = 20_250
PLAN_FILE, RESULTS_FILE = "sweep-plan.json", "sweep.json"
METRICS = ("last", "avg")
BACKENDS = ("local", "ray")
# What has to stay for the values in a folder to be comparable; trials and seeds may be added.
_FIXED = ("first_task", "fraction", "split_seed", "metric", DATA_HASH)
_FIXED_OF_PLAN = ("text", "setting", "model", "data", "options")


def sweep(
    recipe: str | Path,
    space: Mapping[str, Any],
    *,
    methods: Sequence[str],
    out: str | Path,
    random: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    validation: float | None = None,
    metric: str = "last",
    setting: str | None = None,
    data: Any = None,
    model: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    backend: str = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try settings of options and say which is best, without a look at test rows.

    The streams are made of the training split alone. What is in `out` already is not done again: the same call goes on
    after an interruption, also within a task, and one with more values adds to the folder.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file.
        space: option to its values, or to a range to draw from: `{"lr": [1e-3, 3e-3], "rank": "int:2..16"}`.
        methods: rows to try; options that a row's method does not have are left out for it.
        out: folder for results.
        random: draw so many settings instead of trying every combination.
        seed: of that draw.
        seeds: each setting is tried with each of these; None takes the recipe's first.
        validation: learn the whole stream, judged by this share of each task's training rows; None learns the first
            task only, judged by a fifth of its training rows.
        metric: `last`, the mean over tasks at the end, or `avg`, the mean over the stream; language models are judged
            by nats a token, and less is better.
        setting: which of the recipe's settings; None takes its default.
        data: data that replaces the recipe's; of splits in memory only `train` is looked up.
        model: base model that replaces the recipe's.
        options: options that all settings have in common.
        workers: processes, of one thread each.
        backend: `local`, or `ray` for Ray Tune (the extra `ray`), with `out` on a disk that all machines share.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The content of `sweep.json`, and `folder`, where it lies.

    Raises:
        OptionError: an unknown recipe, row, option or range, or a folder with values of another configuration.
        DataError: the data cannot be found or does not fit the recipe.
        UnsupportedError: several processes with data in memory, or Ray is not installed.
        InterruptedLearning: somebody asked for a stop.
    """
    tried = read_space(space)
    settings = grid_settings(tried) if random is None else drawn_settings(tried, random, seed=seed)
    _check_choices(validation, metric, backend, workers)
    if not methods:
        raise OptionError("a sweep needs the rows it is for; name at least one method")
    common = {"setting": setting, "data": data, "model": model}
    chosen = _checked_plan(recipe, methods, seeds, dict(options or {}), settings, common)
    in_memory = data is not None and not isinstance(data, str | Path)
    if in_memory and (workers > 1 or backend != "local"):
        raise UnsupportedError("Data in memory cannot be handed to other processes; give a folder, or use one worker.")
    fraction = FIRST_TASK_SHARE if validation is None else validation
    plan = SweepPlan(chosen, make_trials(chosen, settings), validation is None, fraction, SPLIT_SEED, metric)
    streams = SearchStreams(plan, progress)
    for one in plan.plan.seeds[:1]:
        streams(one)  # data that is missing or wrong is reported here, before any process starts
    folder = Path(out)
    plan = _open_folder(plan, folder, streams.fingerprint)
    _run(plan, folder, streams, workers=workers, backend=backend, progress=progress or _silent)
    results = _results(plan, tried, folder, streams.source, random=random, seed=seed)
    write_json(folder / RESULTS_FILE, results)
    write_text(folder / "sweep.md", markdown_table(results))
    write_sweep_report(results, folder / "sweep.html")
    return results | {"folder": str(folder)}


def _check_choices(validation: float | None, metric: str, backend: str, workers: int) -> None:
    if validation is not None and not 0 < validation < 1:
        raise OptionError(f"the share of rows to judge by must lie between 0 and 1, found {validation:g}; 0.1 is usual")
    for name, value, known in (("metric", metric, METRICS), ("backend", backend, BACKENDS)):
        if value not in known:
            raise OptionError(f"there is no {name} '{value}'; {nearest(value, known)}")
    if workers < 1:
        raise OptionError(f"workers is {workers}; give 1 or more.")


def _checked_plan(
    recipe: str | Path,
    methods: Sequence[str],
    seeds: Sequence[int] | None,
    options: dict[str, Any],
    settings: Sequence[Mapping[str, Any]],
    common: dict[str, Any],
) -> Plan:
    """The plan of what all trials share; options that are tried are checked with it, and are not in it."""
    if seeds is None:
        read = load_recipe(recipe)
        named = read.settings.get(common["setting"] or read.default_setting)
        seeds = ((named is not None and named.seeds) or read.seeds)[:1]
    if twice := sorted(set(options) & set(settings[0])):
        raise OptionError(f"'{twice[0]}' is both set and tried; leave out one of the two")
    text, file = recipe_text(recipe), Path(recipe).name
    make_plan(text, file=file, methods=methods, seeds=seeds, options={**options, **settings[0]}, **common)
    return make_plan(text, file=file, methods=methods, seeds=seeds, options=options, **common)


def _open_folder(plan: SweepPlan, out: Path, data_hash: str) -> SweepPlan:
    """Put the plan into the folder, behind the trials of an earlier one that is the same otherwise."""
    file, values = out / PLAN_FILE, {**plan.to_json(), DATA_HASH: data_hash}
    if file.exists():
        before = read_json(file)
        if other := changes(before, values, _FIXED) + changes(before["plan"], values["plan"], _FIXED_OF_PLAN):
            raise OptionError(f"{out} holds a sweep with another {other[0]}; choose another folder with --out.")
        known = {trial.name for trial in SweepPlan.from_json(before).trials}
        added = [one for trial, one in zip(plan.trials, values["trials"], strict=True) if trial.name not in known]
        values["trials"] = [*before["trials"], *added]
    elif not is_fresh(out, file.name):
        raise OptionError(f"{out} is not empty and holds no sweep; choose another folder with --out.")
    write_json(file, values)
    return plan


def _run(plan: SweepPlan, out: Path, streams: SearchStreams, *, workers: int, backend: str, progress: Progress) -> None:
    # One seed's trials stand together, so that they share its stream.
    jobs = [(trial, seed) for seed in plan.plan.seeds for trial in plan.trials]
    if backend == "ray":
        from everlora.sweep.ray_backend import run_with_ray  # an optional dependency, and a heavy one

        run_with_ray(out / PLAN_FILE, [(trial.name, seed) for trial, seed in jobs], workers=workers)
    elif workers == 1:
        for done, (trial, seed) in enumerate(jobs):
            progress("trials", done, len(jobs))
            run_trial(plan, trial, seed, streams=streams, out=out, progress=progress)
        progress("trials", len(jobs), len(jobs))
    else:
        named = [(trial.name, seed) for trial, seed in jobs]
        run_jobs(out / PLAN_FILE, named, workers=workers, progress=progress, module="everlora.sweep.worker")


def _results(plan: SweepPlan, space: Space, out: Path, source: str, *, random: int | None, seed: int) -> dict[str, Any]:
    recipe = plan.plan.recipe
    found = collect(_with_finished(plan, out), space, out)
    return {
        "format": FORMAT,
        "recipe": {"name": recipe.name, "title": recipe.title, "text": plan.plan.text},
        "setting": plan.plan.setting_name,
        "rows_judged_by": "the first task" if plan.first_task else "the whole stream",
        "first_task": plan.first_task,
        "fraction": plan.fraction,
        "split_seed": plan.split_seed,
        "metric": "nats a token" if plan.is_language else plan.metric,
        "is_lower_better": plan.is_language,
        "space": {key: str(values) if not isinstance(values, tuple) else list(values) for key, values in space.items()},
        "random": random,
        "draw_seed": None if random is None else seed,
        "seeds": list(plan.plan.seeds),
        "options": dict(plan.plan.options),
        "data": source,
        "model": plan.plan.model if not Path(plan.plan.model).is_dir() else Path(plan.plan.model).name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"everlora": __version__, "python": platform.python_version(), "torch": metadata.version("torch")},
        **found,
    }


def _with_finished(plan: SweepPlan, out: Path) -> SweepPlan:
    """The plan with trials of earlier calls that have a value for every seed, all in the order they were tried in."""
    known = {trial.name for trial in plan.trials}
    trials: list[Trial] = []
    for trial in SweepPlan.from_json(read_json(out / PLAN_FILE)).trials:
        is_done = all(read_outcome(out, trial, seed) is not None for seed in plan.plan.seeds)
        if trial.name in known or is_done:
            trials.append(trial)
    return dataclasses.replace(plan, trials=tuple(trials))


def _silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""
