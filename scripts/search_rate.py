"""Choose the learning rate of each row of a recipe: every value tried on the first task of a class order no run uses.

    python scripts/search_rate.py convlora-vs-senacnn --setting small --methods all

Only training images are looked at: the rows that `keep_validation` holds out decide. The best accuracy after any epoch
wins; of equals the higher mean over the epochs, then the smaller rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlora import Learner
from everlora.experiments.plan import Plan, Streams, make_plan, method_row, row_options
from everlora.experiments.recipe import recipe_text
from everlora.metrics.speed import area_over_epochs, best_accuracy

RATES = (1e-3, 3e-3, 1e-2)
ORDER_SEED = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or JSON."""
    given = parse(arguments)
    plan = make_plan(
        recipe_text(given.recipe),
        file=Path(given.recipe).name,
        setting=given.setting,
        methods=given.methods.split(",") if given.methods else None,
        seeds=[given.seed],
        model=given.model,
        data=given.data,
    )
    task = Streams(plan)(given.seed).tasks[0]
    found = {}
    for row in plan.rows:
        tried = {rate: trial(plan, row, task, rate, given.seed) for rate in given.rates}
        if any(curve is None for curve in tried.values()):
            continue
        found[row] = {"rates": {str(rate): curve for rate, curve in tried.items()}, "chosen": choose(tried)}
        if not given.json:
            print(line(row, tried, found[row]["chosen"]), flush=True)
    if given.json:
        print(json.dumps(found))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe")
    parser.add_argument("--setting")
    parser.add_argument("--methods", help="rows, separated by commas, or 'all'")
    parser.add_argument("--rates", type=lambda text: [float(word) for word in text.split(",")], default=list(RATES))
    parser.add_argument("--seed", type=int, default=ORDER_SEED, help="of the class order and of all else")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def trial(plan: Plan, row: str, task: Any, rate: float, seed: int) -> list[list[float]] | None:
    """Learn the task with one rate; return its validation curve, None where nothing is trained."""
    options = row_options(plan, row, seed, num_tasks=1) | {"lr": rate}
    with tempfile.TemporaryDirectory() as folder:
        method = method_row(plan.recipe, row).method
        learner = Learner.create(Path(folder) / "learner", model=plan.model, method=method, **options)
        learner.learn(task.train, name=task.name)
        curve: list[list[float]] = learner.card()["tasks"][0]["cost"]["curve"]
    return curve or None


def choose(tried: dict[float, list[list[float]]]) -> float:
    """Return the rate with the best epoch; of equals the one that is better on average, then the smaller."""
    return max(tried, key=lambda rate: (best_accuracy(tried[rate]), area_over_epochs(tried[rate]), -rate))


def line(row: str, tried: dict[float, list[list[float]]], chosen: float) -> str:
    """One row: best accuracy in percent of each rate, the mean over epochs behind it."""
    cells = [f"{rate:g}: {100 * best_accuracy(c):.1f} ({100 * area_over_epochs(c):.1f})" for rate, c in tried.items()]
    return f"{row:14} {'   '.join(f'{cell:>22}' for cell in cells)}   -> {chosen:g}"


if __name__ == "__main__":
    main()
