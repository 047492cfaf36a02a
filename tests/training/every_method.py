"""What each of two processes does in `test_processes_every_method`: all methods in float64, alone and together."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from everlora.backbones import load_backbone
from everlora.errors import UnsupportedError
from everlora.evaluation import Evaluator
from everlora.language.scoring import score_encoded
from everlora.methods import method_spec
from everlora.methods.base import TaskInfo
from everlora.methods.headed import with_head
from everlora.settings import Settings
from everlora.training import Processes, TaskData, TaskTrainer, loop, processes
from tests.methods.conv_builders import save_resnet
from tests.methods.language_builders import language_task
from tests.methods.test_contract import LANGUAGE_ROWS, ROWS
from tests.toy import tiny_model, toy_images, toy_texts
from tests.training.builders import save_language_model

STEPS = 20
ALONE = Processes()
CLASSES = [f"class {letter}" for letter in "abcd"]
TRAINING: dict[str, Any] = {
    "batch_size": 5,
    "eval_batch_size": 4,
    "lr": 1e-2,
    "augment": "none",
    "dropout": False,  # its draws are keyed by the pieces of a step
    # not Adam, which makes whole steps of gradients that are nothing but rounding
    "optimizer": "sgd",
}
# a minimum that is found by comparing values is known to the root of their rounding, and no better
_FOUND_BY_SECTIONS, _SECTIONS = ("recognition/temperature", "recognition/mean_energy"), 0.02
# beside the rows that all tests know: networks with batch norms that stay as they are, and other sums
MORE_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("vit", "ewc", {"fisher": "batch", "fisher_samples": 9}),
    ("vit", "ewc", {"fisher_samples": 9, "normalize_fisher": True}),
    ("vit", "convlora", {"select": "energy"}),
    ("vit", "independent", {"select": "concat"}),
    ("vit", "inflora", {"stats_max_batches": 3, "micro_batches": 2}),
    ("vit", "replay", {"insert": "online", "size": 8, "micro_batches": 2}),
    ("vit", "sequential", {"keep_best": True, "optimizer": "adamw"}),
    ("vit", "inflora", {"augment": "crop_flip"}),
    ("resnet", "sequential", {"bn": "affine_only"}),
    ("resnet", "ewc", {"bn": "frozen_eval", "fisher": "batch"}),
    ("resnet", "lwf", {"bn": "affine_only"}),
    ("resnet", "replay", {"bn": "affine_only"}),
    ("resnet", "convlora", {"norm": "affine_only"}),
    ("resnet", "senacnn", {"norm": "frozen_eval"}),
    ("resnet", "independent", {"norm": "affine_only"}),
    ("resnet", "packnet", {"norm": "affine_only"}),
    ("resnet", "pnn", {"norm": "frozen_eval"}),
    ("language", "replay", {"packing": True, "size": 6}),
    ("language", "i_lora", {"reset_optimizer": False, "micro_batches": 2, "ilora_buffer_size": 6}),
    ("language", "i_lora", {"preset": "llmcl_effective", "lora_dropout": 0.0}),
    ("language", "ewc", {"fisher": "batch"}),
    ("bert", "inflora", {"head": "cosine"}),
    ("bert", "inflora", {"head": "ridge", "adapt_tasks": 1}),
    ("vit", "sequential", {"head": "lda", "head_drift": "linear"}),
    ("vit", "probe", {"head": "ridge_random_features", "head_features": 30}),
    # dropout is keyed by the pieces of a step: two processes are one with two micro-batches
    ("bert", "sequential", {"dropout": True}),
    ("language", "i_lora", {"lora_dropout": 0.2, "dropout": True}),
]


@dataclass(frozen=True)
class Case:
    """A method with its options on a small network."""

    kind: str
    name: str
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        """Return the name in the file of verdicts."""
        return f"{self.kind}-{self.name}-{json.dumps(self.options, sort_keys=True, default=str)}"


CASES = [
    *(Case(kind, name, options) for kind in ("vit", "bert", "resnet") for name, options in ROWS),
    *(Case("language", name, options) for name, options in LANGUAGE_ROWS),
    *(Case(*row) for row in MORE_ROWS),
]


class Bench:
    """A method on a small network in float64, with two tasks."""

    def __init__(self, case: Case, models: Path, *, micro_batches: int | None = None) -> None:
        language = case.kind == "language"
        self.case = case
        self.backbone = load_backbone(
            models / case.kind, **({"kind": "causal_lm", "max_length": 64} if language else {})
        )
        self.backbone.double()
        if language:
            self.backbone.dtype = torch.float64  # of masks
        rank = {"rank": 2} if "rank" in method_spec(case.name).option_names else {}
        pieces = {} if micro_batches is None else {"micro_batches": micro_batches}
        settings = Settings.of(case.name, {**TRAINING, **rank, **case.options, **pieces})
        method_class = with_head(settings.method.method_class, settings.head)
        self.method = method_class(settings.method_options, self.backbone, seed=1)
        for module in self.method.own_modules():
            module.double()
        self.training = settings.training
        self.count = 1 if self.method.trains_on == "stream" else 2

    def learn(self) -> dict[str, Any]:
        """Learn all tasks; return all that is remembered and measured."""
        training = {**vars(self.training), "max_steps": STEPS // self.count}
        trainer = TaskTrainer(self.backbone, self.method, type(self.training)(**training))
        results: dict[str, Any] = {}
        for index in range(self.count):
            data, kept = self._task(index)
            classes = tuple(range(4)) if self.count == 1 else (2 * index, 2 * index + 1)
            info = TaskInfo(index, f"task {index}", () if self.case.kind == "language" else classes, len(data))
            report = trainer.learn(info, data, kept)
            if report.log:
                assert report.steps == STEPS // self.count
            for number, row in enumerate(report.log):
                results |= {f"log/{index}/{number}/{key}": value for key, value in row.items() if key != "seconds"}
        results |= self._measured(trainer)
        return results | {f"state/{key}": value for key, value in self.method.state().items()}

    def _task(self, index: int) -> tuple[TaskData, TaskData]:
        if self.case.kind == "language":
            return self._data(language_task(index, 11)), self._data(language_task(index + 7, 5))
        names = CLASSES if self.count == 1 else CLASSES[2 * index : 2 * index + 2]
        make = toy_texts if self.case.kind == "bert" else toy_images
        size = {} if self.case.kind == "bert" else {"size": 32 if self.case.kind == "resnet" else 16}
        rows, kept = (make(names, 12, seed=index + seed, **size) for seed in (1, 9))  # type: ignore[operator]
        # an odd number, whose last step has one row and so work for one process alone
        return self._data(rows.select(range(24)[: 21 if self.count == 2 else None])), self._data(
            kept.select([0, 7, 23])
        )

    def _data(self, rows: Any) -> TaskData:
        return TaskData.of(self.backbone, rows, {name: number for number, name in enumerate(CLASSES)})

    def _measured(self, trainer: TaskTrainer) -> dict[str, Any]:
        """Predictions and metrics on the rows of all tasks."""
        results: dict[str, Any] = {}
        with self.method.predicting():
            for index in range(self.count):
                data, _ = self._task(index)
                if self.case.kind == "language":
                    score = score_encoded(trainer, data.encoded)
                    results |= {f"nll/{index}": score.nll, f"tokens/{index}": score.tokens}
                    continue
                for task in (None, index):
                    results[f"scores/{index}/{task}"] = Evaluator(trainer, CLASSES).logits(data, None, task)
        return results


@contextmanager
def in_float64() -> Iterator[None]:
    """Let all numbers be of float64, those that are asked for as float32, too."""
    narrow = Tensor.float
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.float = narrow  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


def difference(one: dict[str, Any], two: dict[str, Any]) -> tuple[float, str]:
    """Largest difference of two results, relative to the largest number of its tensor or to 1, and where it is."""
    if one.keys() != two.keys():
        return float("inf"), ", ".join(sorted(one.keys() ^ two.keys()))
    worst = (0.0, "")
    for key, value in one.items():
        distance = _distance(value, two[key]) * (_SECTIONS if key.endswith(_FOUND_BY_SECTIONS) else 1.0)
        worst = max(worst, (distance, key))
    return worst


def _distance(one: Any, two: Any) -> float:
    if isinstance(one, float):
        one, two = torch.tensor(one), torch.tensor(two)
    if not isinstance(one, Tensor):
        return 0.0 if one == two else float("inf")
    if one.shape != two.shape or one.dtype != two.dtype:
        return float("inf")
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, two) else float("inf")
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(two)) or not torch.equal(one[~finite], two[~finite]):
        return float("inf")
    one, two = one[finite].double(), two[finite].double()
    return float((one - two).abs().max() / one.abs().max().clamp(min=1)) if one.numel() else 0.0


def judge(case: Case, models: Path, group: Processes, *, compares: bool) -> dict[str, Any]:
    """Learn together, and in the process that compares once more alone."""
    bench = Bench(case, models)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in bench.method.state().items()}
    try:
        together = bench.learn()
    except UnsupportedError as error:
        assert difference(before, bench.method.state())[0] == 0
        return {"refused": str(error)}
    both = [difference(together, part)[0] for part in group.gather(together)]
    if not compares:
        return {}
    loop.processes = lambda device: ALONE  # type: ignore[assignment, attr-defined]
    try:
        pieces = 2 * case.options.get("micro_batches", 1) if case.options.get("dropout") else None
        alone = Bench(case, models, micro_batches=pieces).learn()
    finally:
        loop.processes = processes  # type: ignore[attr-defined]
    value, place = difference(alone, together)
    kinds = sorted({str(v.dtype) for v in alone.values() if isinstance(v, Tensor) and v.is_floating_point()})
    return {"difference": value, "place": place, "apart": max(both), "numbers": len(alone), "dtypes": kinds}


def save_models(folder: Path) -> None:
    """Save the networks of all kinds."""
    for kind in ("vit", "bert"):
        tiny_model(kind, folder / kind)
    (folder / "resnet").mkdir()
    save_resnet(folder / "resnet")
    save_language_model(folder / "language")


def main(folder: Path, only: str = "") -> None:
    """Write the verdicts of the cases that this process compares."""
    group = processes("cpu")
    assert group.size == 2 == distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    verdicts: dict[str, Any] = {"size": distributed.get_world_size()}
    with in_float64():
        for number, case in enumerate(CASES):
            if only not in str(case):
                continue
            compares = number % 2 == group.rank
            try:
                verdict = judge(case, folder, group, compares=compares)
            except Exception as error:
                verdict = {"error": f"{type(error).__name__}: {error}"}
            verdicts |= {str(case): verdict} if compares or "error" in verdict else {}
            (folder / f"verdicts-{group.rank}.json").write_text(json.dumps(verdicts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
