"""Results of language models as `results.json` holds them, from invented cross-entropies."""

from __future__ import annotations

from typing import Any

import numpy as np

DOMAINS = ("plays", "news", "sums")
TOKENS, BYTES = (1000, 900, 800), (1600, 1400, 1200)
BASE = (4.9, 4.8, 5.6)
PROMPTS = ({"text": "Once upon <a time>"}, {"instruction": "Say it", "input": "twice"})


def score(nats: float, task: int, *, right: int | None = None) -> dict[str, Any]:
    """A stored score with so many nats a token."""
    tokens, size = (TOKENS[task], BYTES[task]) if task < len(TOKENS) else (500, 900)
    return {
        "nll": nats * tokens,
        "tokens": tokens,
        "num_bytes": size,
        "rows": 10,
        "correct": right,
        "answers": 0 if right is None else 10,
        "rouge_l": None,
    }


def moment(nats: list[float], own: float, words: str, *, right: int | None = None) -> dict[str, Any]:
    """What is measured at one moment."""
    return {
        "tests": [score(value, task, right=right) for task, value in enumerate(nats)],
        "retention": score(own, 3),
        "samples": [f"{words} <1>", f"{words} 2"],
    }


def language_run(
    method: str,
    seed: int,
    *,
    fall: float = 0.3,
    variants: tuple[str | None, ...] = (None,),
    only_last: bool = False,
    buffer: bool = False,
    right: int | None = None,
) -> dict[str, Any]:
    """A run that learns each domain to 3 nats and then loses `fall` nats of it with every later task."""
    noise = np.random.default_rng(seed).normal(0.0, 0.01, size=(3, 3))
    stages = []
    for step in range(3):
        if only_last and step < 2:
            continue
        measured = []
        for place, variant in enumerate(variants):
            lost = fall + 0.1 * place
            nats = [
                3.0 + 0.1 * task + lost * (step - task) + float(noise[step, task]) if task <= step else BASE[task] - 0.1
                for task in range(3)
            ]
            entry = moment(nats, 1.3 + lost * (step + 1), f"{method} {variant} after {step}", right=right)
            measured.append({"variant": variant, **entry})
        stages.append({"task": step, "measured": measured})
    panels: dict[str, Any] = {"fisher": {"layer": [0.5, 0.6, 0.7]}}
    if buffer:
        rows = {"task 0": [9.0, 5.0, 3.0], "task 1": [None, 4.0, 3.0], "task 2": [None, None, 3.0]}
        panels |= {"buffer_rows": rows, "buffer_bytes": {"buffer": [900.0, 950.0, 1000.0 + seed]}}
    return {
        "method": method,
        "label": method.capitalize(),
        "seed": seed,
        "options": {"lr": 0.003, "max_steps": 20, "epochs": 5},
        "reference_parameters": 1000,
        "cost": [
            {
                "task": task,
                "seconds": 2.0 + task,
                "steps": 20,
                "step_seconds": 0.1,
                "peak_memory_bytes": 10**6,
                "trainable_parameters": 50,
                "stored_parameters": 1050,
                "state_bytes": 4000,
            }
            for task in ([2] if only_last else range(3))
        ],
        "panels": panels,
        "language": {
            "domains": list(DOMAINS),
            "general_sets": [],
            "prompts": [dict(prompt) for prompt in PROMPTS],
            "base": moment(list(BASE), 1.3, "before", right=right),
            "stages": stages,
        },
    }


def language_results(seeds: tuple[int, ...] = (1, 2, 3), *, right: int | None = None) -> dict[str, Any]:
    """A method with two sets of weights and a buffer, one that forgets, and one that learns all at once."""
    runs = []
    for seed in seeds:
        runs += [
            language_run("double", seed, fall=0.1, variants=("stable", "plastic"), buffer=True, right=right),
            language_run("forgetful", seed, fall=0.5, right=right),
            language_run("together", seed, fall=0.0, only_last=True, right=right),
            language_run("varied", seed, fall=0.2, right=right),
        ]
    return {
        "format": 1,
        "recipe": {"name": "sample", "title": "Sample <run>", "text": "rank: 4\n"},
        "stream": {
            "name": "sample",
            "scenario": "language",
            "num_tasks": 3,
            "task_names": list(DOMAINS),
            "train_sizes": [10, 20, 30],
            "test_sizes": [1, 2, 3],
            "order_seed": None,
        },
        "table": "language",
        "model": "tiny",
        "created": "2025-01-01T00:00:00+00:00",
        "versions": {"numpy": "2.0"},
        "device": "cpu",
        "threads": 1,
        "seeds": list(seeds),
        "settings": {"setting": "short"},
        "rows": {"varied": {"ablation": True, "trials": None, "family": None}},
        "runs": runs,
        "published": [],
        "notes": "Invented.",
    }
