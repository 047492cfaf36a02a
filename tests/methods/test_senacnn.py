"""SenaCNN: where it cuts, what it shares, and how tasks are told apart by the shared part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everlora.errors import OptionError, UnsupportedError
from everlora.methods import method_spec
from everlora.methods.base import Method, TaskInfo
from tests.methods.isolation_builders import KINDS, Bench, begin_and_end, deep_resnet, save_kind
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def make(encoder: Any, **options: Any) -> Method:
    spec = method_spec("senacnn")
    return spec.method_class(spec.options(options), encoder, seed=1)


@pytest.mark.parametrize(
    ("blocks", "cut", "total"),
    [
        (3, "half", 2_441_332),
        (3, "layer3", 2_107_252),
        (3, "last_block", 941_428),
        pytest.param(5, "half", 4_134_516, marks=pytest.mark.slow),
        pytest.param(5, "last_block", 1_135_860, marks=pytest.mark.slow),
    ],
)
def test_ten_tasks_have_the_parameters_of_the_formula(blocks: int, cut: str, total: int) -> None:
    backbone = deep_resnet(blocks)
    method = make(backbone, cut=cut)
    begin_and_end(method, backbone, 10)
    assert method.stored_parameters() == total


def test_cuts_are_where_they_are_said_to_be() -> None:
    backbone = deep_resnet(3)
    assert make(backbone).tail == ["layer2.1", "layer2.2", "layer3.0", "layer3.1", "layer3.2"]
    assert make(backbone, cut="layer3").tail == ["layer3.0", "layer3.1", "layer3.2"]
    assert make(backbone, cut="last_block").tail == ["layer3.2"]
    assert make(backbone, cut="layer2.1.conv2").tail[:2] == ["layer2.1.conv2", "layer2.1.bn2"]
    assert make(backbone).trunk == ["conv1", "bn1", "layer1.0", "layer1.1", "layer1.2", "layer2.0"]
    assert make(deep_resnet(5)).tail[0] == "layer2.2"
    with pytest.raises(OptionError, match="no module of the network"):
        make(backbone, cut="layer4")
    with pytest.raises(OptionError, match="no part would be shared"):
        make(backbone, cut="conv1")
    with pytest.raises(OptionError, match="no part would be shared"):
        make(backbone, cut="linear")


def test_one_block_for_all_layers_cannot_be_shared_by_half(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has 1 that could be told apart"):
        Bench("bert", save_tiny("albert", tmp_path), "senacnn", {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_part_stays_as_the_first_task_left_it(kind: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "senacnn", {}, epochs=1, optimizer="adamw", weight_decay=0.1)
    pretrained = {path: bench.method.task_modules.original(path).state_dict() for path in bench.method.trunk}
    bench.learn(0)
    first = bench.method.task_modules.version(0)
    trunk = {f"{p}/{k}": t.clone() for p in bench.method.trunk for k, t in first[p].state_dict().items()}
    assert any(not torch.equal(t, pretrained[n.split("/")[0]][n.split("/")[1]]) for n, t in trunk.items())
    bench.method.begin_task(TaskInfo(1, "task 1", (2, 3), 16), None)  # type: ignore[arg-type]
    second = bench.method.task_modules.version(1)
    assert all(second[path] is first[path] for path in bench.method.trunk)
    for path in bench.method.tail:
        before = first[path].state_dict()
        assert second[path] is not first[path]
        assert all(torch.equal(t, before[k]) for k, t in second[path].state_dict().items()), "starts from task 0's"
    bench.backbone.train()
    bench.method.train_mode()
    assert not any(part.training for path in bench.method.trunk for part in second[path].modules())
    assert all(second[path].training for path in bench.method.tail)
    torch.autograd.backward(bench.method.loss(bench.batch(1)).value)
    assert not any(p.grad is not None for path in bench.method.trunk for p in first[path].parameters())
    bench = Bench(kind, folders[kind], "senacnn", {}, epochs=1, optimizer="adamw", weight_decay=0.1)
    for index in range(3):
        bench.learn(index)
    first = bench.method.task_modules.version(0)
    assert all(torch.equal(t, first[n.split("/")[0]].state_dict()[n.split("/")[1]]) for n, t in trunk.items())


def test_later_parts_can_start_otherwise(folders: dict[str, Path]) -> None:
    for start in ("pretrained", "random"):
        bench = Bench("resnet", folders["resnet"], "senacnn", {"tail_init": start}, epochs=1)
        bench.learn(0)
        state = torch.get_rng_state()
        made, again = (bench.method.build(1, torch.Generator().manual_seed(5))["layer3.0"] for _ in range(2))
        assert torch.equal(made.conv1.weight, again.conv1.weight), "drawn from the task's own generator"
        assert torch.equal(torch.get_rng_state(), state)
        original = bench.method.task_modules.original("layer3.0")
        assert torch.equal(made.conv1.weight, original.conv1.weight) == (start == "pretrained")
        assert not torch.equal(made.conv1.weight, bench.method.task_modules.version(0)["layer3.0"].conv1.weight)
        assert made.conv1.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_told_apart_by_the_output_of_the_first_part(kind: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "senacnn", {}, epochs=1)
    bench.learn(0)
    bench.learn(1)
    inputs = bench.batch(0).inputs
    bench.backbone.eval()
    bench.method.activate_reference()
    with torch.no_grad():
        found = [bench.backbone.features(inputs) for _ in range(2)]
    assert torch.equal(*found)
    caught: list[torch.Tensor] = []
    bench.method.activate(1)
    last = bench.method.task_modules.version(0)[bench.method.trunk[-1]]
    handle = last.register_forward_hook(lambda module, args, result: caught.append(result))
    with torch.no_grad():
        bench.backbone.features(inputs)
    handle.remove()
    trunk = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    if kind == "resnet":
        torch.testing.assert_close(found[0], trunk.mean((2, 3)))
    elif kind == "bert":
        mask = inputs["attention_mask"][:, :, None]
        torch.testing.assert_close(found[0], (trunk * mask).sum(1) / mask.sum(1))
    else:  # pooled behind the norm that ends the network, as the first task left it
        norm = bench.method.task_modules.version(0)["layernorm"]
        torch.testing.assert_close(found[0], norm(trunk)[:, 0])
