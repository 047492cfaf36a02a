"""A sweep's plan: which settings are tried, with which seeds, and what they are judged by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everlora.experiments.plan import Plan, as_read, identity, method_row, row_options
from everlora.experiments.recipe import stream_of
from everlora.methods import list_methods, method_spec
from everlora.metrics import AccuracyMatrix
from everlora.settings import Settings

__all__ = ["SweepPlan", "Trial", "make_trials", "value_of"]

_HASH = 10


@dataclass(frozen=True)
class Trial:
    """One setting of one row.

    Attributes:
        row: name of the row.
        options: the options that are tried, over those of the recipe.
    """

    row: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its folder, the same for the same options."""
        return f"{self.row}-{identity(dict(self.options))[:_HASH]}"


@dataclass(frozen=True)
class SweepPlan:
    """All that decides the values of a sweep but the data.

    Attributes:
        plan: the rows, seeds, model, data and options that all trials have in common.
        trials: what is tried, in order.
        first_task: whether the first task alone is learned; else the whole stream.
        fraction: share of each task's training rows that trials are judged by.
        split_seed: of the draw of these.
        metric: which figure of the accuracy matrix decides; of no meaning for a language model.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    first_task: bool
    fraction: float
    split_seed: int
    metric: str

    @property
    def is_language(self) -> bool:
        """Whether trials are judged by cross-entropy."""
        return stream_of(self.plan.recipe, self.plan.setting).scenario == "language"

    def trial(self, name: str) -> Trial:
        """The trial whose folder has that name."""
        return next(trial for trial in self.trials if trial.name == name)

    def plan_of(self, trial: Trial, *, seed: int, num_tasks: int) -> Plan:
        """The plan of a run that tries a setting.

        Args:
            trial: the setting.
            seed: of the run.
            num_tasks: of the recipe's stream: a method that asks for it is told the same as in a run, also where only
                the first task is learned.
        """
        options = {**self.plan.options, **trial.options}
        known = row_options(dataclasses.replace(self.plan, options=options), trial.row, seed, num_tasks)
        if "total_tasks" in known:
            options.setdefault("total_tasks", known["total_tasks"])
        return dataclasses.replace(self.plan, rows=(trial.row,), seeds=(seed,), options=options)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; data in memory is left out."""
        return {
            "plan": self.plan.to_json(),
            "trials": [{"row": trial.row, "options": as_read(trial.options)} for trial in self.trials],
            "first_task": self.first_task,
            "fraction": self.fraction,
            "split_seed": self.split_seed,
            "metric": self.metric,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SweepPlan:
        """Read what `to_json` returned."""
        trials = tuple(Trial(entry["row"], entry["options"]) for entry in values["trials"])
        same = {name: values[name] for name in ("first_task", "fraction", "split_seed", "metric")}
        return cls(Plan.from_json(values["plan"]), trials, **same)


def make_trials(plan: Plan, settings: Sequence[Mapping[str, Any]]) -> tuple[Trial, ...]:
    """Give every row every setting, without the options that its method has no use for, and each only once.

    Raises:
        OptionError: an option is unknown, or a value out of range.
    """
    owned = {entry.name: set(method_spec(entry.name).option_names) for entry in list_methods()}
    trials: dict[str, Trial] = {}
    for row in plan.rows:
        method = method_row(plan.recipe, row).method
        foreign = set().union(*owned.values()) - owned[method]
        for setting in settings:
            trial = Trial(row, {key: value for key, value in setting.items() if key not in foreign})
            if trial.name not in trials:
                tried = dataclasses.replace(plan, options={**plan.options, **trial.options})
                Settings.of(method, row_options(tried, row, plan.seeds[0], num_tasks=1))
            trials.setdefault(trial.name, trial)
    return tuple(trials.values())


def value_of(record: Mapping[str, Any], metric: str) -> float:
    """The figure that a finished record is judged by.

    Args:
        record: of one run of a trial.
        metric: a name of `AccuracyMatrix.summary`; of a language model it is the mean over the tasks, after the last,
            of nats a token.

    Returns:
        A fraction, or nats a token; NaN where the figure is not defined.
    """
    if "language" in record:
        tests = record["language"]["stages"][-1]["measured"][0]["tests"]
        entropies = [test["nll"] / test["tokens"] for test in tests[: record["num_tasks"]] if test["tokens"]]
        return math.fsum(entropies) / len(entropies) if entropies else math.nan
    found = AccuracyMatrix.from_counts(record["correct"], record["sizes"]).summary()[metric]
    return math.nan if found is None else float(found)
