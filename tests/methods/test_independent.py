"""Independent networks: what a task gets, and growth to the number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everlora.lowrank import LowRankConv2d, LowRankLinear
from everlora.methods import method_spec
from everlora.methods.base import TaskInfo
from tests.methods.isolation_builders import KINDS, Bench, begin_and_end, deep_resnet, save_kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize(("blocks", "total"), [(3, 2_697_220), pytest.param(5, 4_641_540, marks=pytest.mark.slow)])
def test_ten_tasks_have_the_parameters_of_the_formula(blocks: int, total: int) -> None:
    backbone = deep_resnet(blocks)
    spec = method_spec("independent")
    method = spec.method_class(spec.options({}), backbone, seed=1)
    begin_and_end(method, backbone, 10)
    assert method.stored_parameters() == total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", ["auto", "adapter", "all"])
def test_a_task_gets_a_copy_or_an_adapter(kind: str, train: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "independent", {"train": train, "rank": 2, "alpha": 6})
    alone = bench.backbone.num_parameters
    bench.method.begin_task(TaskInfo(0, "task 0", (0, 1), 16), None)  # type: ignore[arg-type]
    version = bench.method.task_modules.version(0)
    adapters = [m for m in version.values() if isinstance(m, LowRankLinear | LowRankConv2d)]
    head = 2 * (bench.backbone.feature_dim + 1)
    if train == "all" or (train == "auto" and kind == "resnet"):
        assert not adapters and "linear" not in version
        own = {t.data_ptr() for module in version.values() for t in module.state_dict().values()}
        originals = [bench.method.task_modules.original(path).state_dict() for path in version]
        assert not own & {t.data_ptr() for state in originals for t in state.values()}
        assert all(p.requires_grad for module in version.values() for p in module.parameters())
        assert bench.method.stored_parameters() == alone + head
    else:
        assert adapters and all((layer.rank, layer.scale) == (2, 3.0) for layer in adapters)
        bases = {id(bench.method.task_modules.original(path)) for path in version}
        assert all(id(layer.base) in bases for layer in adapters)
        factors = sum(layer.up.numel() + layer.down.numel() for layer in adapters)
        norms = sum(p.numel() for m in version.values() if m not in adapters for p in m.parameters())
        assert norms > 0 and bench.method.stored_parameters() == alone + factors + norms + head


def test_tasks_are_recognised_by_a_network_that_is_kept(folders: dict[str, Path]) -> None:
    for train in ("all", "adapter"):
        bench = Bench("resnet", folders["resnet"], "independent", {"train": train}, epochs=1)
        bench.learn(0)
        bench.method.activate_reference()
        inputs = bench.batch(0).inputs
        with torch.no_grad():
            reference = bench.backbone.eval().features(inputs)
            bench.method.activate(0)
            assert torch.equal(bench.backbone.features(inputs), reference) == (train == "all")
            bench.method.activate(None)
            assert torch.equal(bench.backbone.features(inputs), reference) == (train == "adapter")
