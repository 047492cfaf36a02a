"""How long a task is trained, and at what rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from everlora.errors import OptionError
from everlora.methods.base import TaskInfo
from everlora.methods.registry import parse_options
from everlora.training import TrainingOptions
from everlora.training.options import Length, rate_factor, steps_per_epoch
from tests.toy import tiny_model
from tests.training.builders import Bench


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("vit", tmp_path_factory.mktemp("vit"))


def _rates(bench: Bench) -> list[float]:
    """Learning rates of the adapters at each step, as fractions of the first given."""
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(optimizer: torch.optim.Optimizer, *args: object) -> object:
        rates.append(optimizer.param_groups[0]["lr"] / bench.trainer.options.lr)
        return step(optimizer, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", noted)
        bench.learn()
    return rates


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_max_steps_are_exact(steps: int, epochs: int, vit: Path) -> None:
    bench = Bench(vit, "image", training={"max_steps": steps, "epochs": 2})  # 24 rows: three steps a pass
    told: list[tuple[int, int]] = []
    bench.method.after_epoch = lambda epoch, of: told.append((epoch, of))
    events: list[tuple[str, int, int]] = []
    bench.trainer.progress = lambda *event: events.append(event)
    report = bench.learn()
    assert report.steps == steps == bench.events.count("after_step")
    assert told == [(epoch, epochs) for epoch in range(epochs)] and len(report.log) == epochs
    assert events[-1] == ("train first", steps, steps)


def test_a_method_is_told_the_steps_of_its_task(vit: Path) -> None:
    for training, steps in (({}, 3), ({"epochs": 4, "batch_size": 7}, 16), ({"max_steps": 5}, 5)):
        bench = Bench(vit, "image", training=training)
        told: list[TaskInfo] = []
        begin = bench.method.begin_task
        bench.method.begin_task = lambda task, collect, told=told, begin=begin: (
            told.append(task) or begin(task, collect)
        )
        assert bench.learn().steps == steps == told[0].steps and told[0].num_examples == 24


def test_a_short_last_batch_counts_unless_it_is_left_out() -> None:
    counts = [steps_per_epoch(TrainingOptions(batch_size=8), rows) for rows in (1, 8, 9, 16)]
    assert counts == [1, 1, 2, 2]
    dropped = [steps_per_epoch(TrainingOptions(batch_size=8, drop_last=True), rows) for rows in (1, 8, 9, 16)]
    assert dropped == [1, 1, 1, 2]


def test_warm_up_is_exact(vit: Path) -> None:
    bench = Bench(vit, "image", training={"warmup_steps": 4, "epochs": 2, "lr_schedule": "constant"})
    assert _rates(bench) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-12)


def test_a_schedule_by_steps(vit: Path) -> None:
    training = {"epochs": 2, "lr_schedule": "linear", "schedule_per": "step"}
    assert _rates(Bench(vit, "image", training=training)) == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    warm = {**training, "warmup_steps": 2, "max_steps": 4}
    assert _rates(Bench(vit, "image", training=warm)) == pytest.approx([0.5, 0.75, 0.5, 0.25])
    by_epoch = {"epochs": 2, "lr_schedule": "linear"}
    assert _rates(Bench(vit, "image", training=by_epoch)) == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])


def test_cosines_by_steps_run_over_all_steps_and_milestones_stay_epochs() -> None:
    length = Length(2, 10)
    cosine = TrainingOptions(lr_schedule="cosine", schedule_per="step")
    assert rate_factor(cosine, 1, 5, length) == pytest.approx(0.5) and rate_factor(cosine, 0, 0, length) == 1
    official = TrainingOptions(lr_schedule="cosine99", schedule_per="step")
    assert rate_factor(official, 1, 9, length) == pytest.approx(0.0157, abs=1e-4)
    steps = TrainingOptions(lr_schedule="steps", schedule_per="step", milestones=(1,))
    assert [rate_factor(steps, step // 5, step, length) for step in (4, 5)] == [1, pytest.approx(0.1)]


def test_gradients_are_cut_to_a_norm(vit: Path) -> None:
    bench = Bench(vit, "image", training={"max_steps": 1, "clip_norm": 1e-3})
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def noted(parameters: list[nn.Parameter], norm: float) -> torch.Tensor:
        result = clip(parameters, norm)
        norms.append(float(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]).norm()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", noted)
        bench.learn()
    before = torch.cat([gradient.reshape(-1) for gradient in bench.gradients[0]]).norm()
    assert before > 0.01 and norms == pytest.approx([1e-3], rel=1e-2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("micro_batches", 0), ("warmup_steps", -1), ("max_steps", 0), ("clip_norm", 0), ("schedule_per", "row")],
)
def test_options_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"'{name}' of training"):
        parse_options(TrainingOptions, {name: value}, "training")


def test_packing_is_for_language_models(vit: Path) -> None:
    with pytest.raises(OptionError, match="packing is for language models, found vit"):
        Bench(vit, "image", training={"packing": True}).learn()
