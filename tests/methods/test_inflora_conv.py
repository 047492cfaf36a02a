"""InfLoRA on convolutions, read as linear layers on patches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from everlora import Learner
from everlora.errors import UnsupportedError
from everlora.lowrank import LowRankConv2d, SecondMoment
from everlora.methods import method_spec
from everlora.methods.base import Batch, TaskInfo
from everlora.methods.inflora import InfLoRA
from tests.methods.conv_builders import ConvEncoder, images, save_resnet
from tests.toy import FAST, toy_tasks


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet(tmp_path_factory.mktemp("resnet"))


def _make(encoder: ConvEncoder, name: str = "inflora", **options: object) -> InfLoRA:
    method = InfLoRA(method_spec(name).options({"rank": 2, **options}), encoder, seed=7)
    method.heads.double()
    return method


def _collector(encoder: ConvEncoder, data: Batch) -> Callable[..., int]:
    def collect(visit=None, *, stage, before=None, augment=True, max_batches=None) -> int:  # type: ignore[no-untyped-def]
        if before is not None:
            before(data)
        with torch.no_grad():
            features = encoder.features(data.inputs)
        if visit is not None:
            visit(data, features)
        return len(data.labels)

    return collect


def _learn(method: InfLoRA, encoder: ConvEncoder, task: int, steps: int = 15) -> None:
    data, info = images(task), TaskInfo(task, f"task {task}", (2 * task, 2 * task + 1), 16)
    collect = _collector(encoder, data)
    method.begin_task(info, collect)
    method.heads.double()
    groups = method.parameters()
    optimizer = torch.optim.SGD([*groups["adapter"], *groups["head"]], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        method.loss(data).value.backward()
        optimizer.step()
    method.end_task(info, collect)


@pytest.mark.parametrize("name", ["inflora", "inflora_opt"])
@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}])
def test_old_patches_are_mapped_to_zero_and_old_features_stay(name: str, options: dict[str, object]) -> None:
    encoder = ConvEncoder(**options)
    # Up to rounding all directions are protected: those left out hold 1e-15 of the squared length of all patches.
    method = _make(encoder, name, threshold="constant", threshold_start=1 - 1e-15, energy="moment", first_task="reach")
    _learn(method, encoder, 0)
    old = images(0).inputs
    with torch.no_grad():
        before = encoder.features(old)
        middle = torch.tanh(encoder.model.first(old["x"]))
        base = encoder.model.second(middle)
    _learn(method, encoder, 1)
    for layer, x in ((method.layers()["first"], old["x"]), (method.layers()["second"], middle)):
        assert isinstance(layer, LowRankConv2d)
        down, up = layer.blocks()[1].down, layer.blocks()[1].up
        assert layer.blocks()[1].scale.numel() == 2 and float((up @ down).norm()) > 1e-3, "the task was learned"
        rows = layer.input_rows(x)
        assert float((rows @ down.T).abs().max()) < 1e-6 * float(rows.norm())
    with torch.no_grad():
        torch.testing.assert_close(encoder.model.second(middle), base, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(encoder.features(old), before, rtol=1e-7, atol=1e-7)
        assert not torch.allclose(encoder.features(images(1).inputs), _features_without_last(method, encoder))


def _features_without_last(method: InfLoRA, encoder: ConvEncoder) -> torch.Tensor:
    """Features of the newest task's images by the model before it."""
    other = ConvEncoder()
    earlier = _make(other)
    for name, layer in earlier.layers().items():
        blocks = method.layers()[name].blocks()[:-1]
        layer.load_past([b.down for b in blocks], [b.up for b in blocks])
        layer.start_block(0)
    return other.features(images(1).inputs)


def test_without_projection_old_features_move() -> None:
    """The control of the test above."""
    encoder = ConvEncoder()
    method = _make(encoder, projection=False)
    _learn(method, encoder, 0)
    with torch.no_grad():
        before = encoder.features(images(0).inputs)
    _learn(method, encoder, 1)
    with torch.no_grad():
        assert float((encoder.features(images(0).inputs) - before).abs().max()) > 1e-3


def test_the_first_design_is_the_top_of_the_moment_of_patches() -> None:
    encoder = ConvEncoder()
    method = _make(encoder)
    data = images(0)
    rows = method.layers()["first"].input_rows(data.inputs["x"])
    moment = SecondMoment(18).update(rows).matrix
    _, vectors = torch.linalg.eigh(moment)
    method.begin_task(TaskInfo(0, "task 0", (0, 1), 16), _collector(encoder, data))
    down = method.layers()["first"].down.detach()
    top = vectors[:, -2:]
    inside = down @ top @ top.T
    torch.testing.assert_close(inside, down, rtol=1e-6, atol=1e-6)


def test_the_state_goes_to_another_method_and_back() -> None:
    encoder = ConvEncoder()
    method = _make(encoder)
    for task in (0, 1):
        _learn(method, encoder, task)
    other_encoder = ConvEncoder()
    other = _make(other_encoder)
    other.load_state(copy.deepcopy(method.state()))
    x = images(1).inputs
    assert torch.equal(other_encoder.features(x), encoder.features(x))
    assert other.panels() == method.panels() and other.panels()["occupied_rank"].keys() == {"first", "second"}


def test_convolutions_in_groups_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'second' is a convolution with 2 groups"):
        _make(ConvEncoder(groups=2))


@pytest.mark.parametrize("name", ["inflora", "inflora_opt"])
def test_a_learner_on_a_residual_network(name: str, resnet: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "learner", model=resnet, method=name, rank=2, **FAST)
    tasks = toy_tasks("image", 2)
    for index, task in enumerate(tasks):
        learner.learn(task, name=f"task {index}")
    assert all(isinstance(layer, LowRankConv2d) for layer in learner.method.layers().values())
    pictures = list(tasks[0].inputs[:3])
    wanted = [prediction.scores for prediction in learner.predict(pictures)]
    again = Learner.open(tmp_path / "learner")
    assert [prediction.scores for prediction in again.predict(pictures)] == wanted
