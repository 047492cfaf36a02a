"""ConvLoRA: growth to the number, a start that changes nothing, capped ranks, and adapters in PEFT's own layout."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from everlora import Learner
from everlora.errors import OptionError, TargetError, UnsupportedError
from everlora.isolation import batch_norms
from everlora.lowrank import LowRankConv2d, LowRankLinear
from everlora.methods import method_spec
from everlora.methods.base import Method, TaskInfo
from tests.methods.isolation_builders import Bench, begin_and_end, deep_resnet, examples, save_kind
from tests.tiny_models import save_tiny


class ConvEncoder:
    """Any network on images `(n, c, h, w)`, its map pooled."""

    output_head = None

    def __init__(self, model: nn.Module, feature_dim: int, default_targets: tuple[str, ...] = ()) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.feature_dim = feature_dim
        self.default_targets = default_targets

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["pixel_values"]).flatten(2).mean(2)


def make(encoder: Any, **options: Any) -> Method:
    spec = method_spec("convlora")
    return spec.method_class(spec.options(options), encoder, seed=1)


def begin(method: Method, index: int = 0) -> None:
    method.begin_task(TaskInfo(index, f"task {index}", (2 * index, 2 * index + 1), 4), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "rank", "total"),
    [
        (3, 1, 352_642),
        (3, 4, 542_572),
        pytest.param(3, 2, 415_952, marks=pytest.mark.slow),
        pytest.param(3, 8, 795_812, marks=pytest.mark.slow),
        pytest.param(5, 4, 925_164, marks=pytest.mark.slow),
    ],
)
def test_ten_tasks_have_the_parameters_of_the_formula(blocks: int, rank: int, total: int) -> None:
    backbone = deep_resnet(blocks)
    method = make(backbone, rank=rank)
    begin_and_end(method, backbone, 10)
    assert method.stored_parameters() == total
    state = method.state()
    per_task = sum(v.numel() for k, v in state.items() if k.startswith("tasks/003/adapter/"))
    assert per_task == 6_331 * rank if blocks == 3 else per_task == 10_811 * rank


def test_ranks_are_capped_where_an_adapter_would_outgrow_its_layer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="everlora"):
        method = make(deep_resnet(3), rank=16, alpha=8.0)
    lines = [record.getMessage() for record in caplog.records if "layer1.0.conv1" in record.getMessage()]
    assert len(lines) == 1 and "conv1 (10)" in lines[0] and "layer2.0.conv1" not in lines[0]
    ranks = method.plan.ranks
    assert (ranks["conv1"], ranks["layer1.0.conv1"], ranks["layer2.0.conv1"]) == (10, 14, 16)
    assert "linear" not in ranks and len(ranks) == 19
    begin(method)
    layers = method.layers()
    numel = sum(layer.down.numel() + layer.up.numel() for layer in layers.values())
    assert numel == 99_118
    assert {layer.scale for layer in layers.values()} == {0.5}, "the scale is that of the rank asked for"
    alphas = method.task_values(0)["alphas"]
    assert alphas["conv1"] == 5.0 and alphas["layer3.0.conv1"] == 8.0


def test_a_fresh_task_starts_from_the_pretrained_features_to_the_bit() -> None:
    backbone = deep_resnet(1)
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32)}
    with torch.no_grad():
        before = backbone.features(inputs)
    method = make(backbone)
    begin(method)
    for mode in ("folded", "factored"):
        for layer in method.layers().values():
            assert layer.down.abs().sum() > 0 and not layer.up.any()
            layer.forward_mode = mode
        with torch.no_grad():
            assert torch.equal(backbone.eval().features(inputs), before)
    for layer in method.layers().values():
        torch.nn.init.normal_(layer.up)
    with torch.no_grad():
        assert not torch.equal(backbone.features(inputs), before)


def test_doubling_alpha_doubles_what_an_adapter_adds() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)).double()
    x = {"pixel_values": torch.randn(2, 3, 6, 6, dtype=torch.float64)}
    added = []
    base = conv(x["pixel_values"])
    for alpha in (1.0, 2.0):
        encoder = ConvEncoder(conv, 8)
        method = make(encoder, rank=2, alpha=alpha, targets=("1",))
        begin(method)
        torch.nn.init.ones_(method.layers()["1"].up)
        added.append(encoder.model(x["pixel_values"]) - base)
    assert added[0].abs().max() > 0.01
    torch.testing.assert_close(added[1], 2 * added[0], rtol=0, atol=1e-12)


def test_grouped_and_depthwise_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
    )
    x = {"pixel_values": torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))}
    skipped = make(ConvEncoder(model, 8), rank=2)
    begin(skipped)
    assert list(skipped.layers()) == ["0", "1"] and skipped.task_modules.version(0).keys() == {"0", "1", "3"}
    copied = make(ConvEncoder(model, 8), rank=2, depthwise="full_delta")
    begin(copied)
    own = copied.task_modules.own(0)["2"]
    assert own is not copied.task_modules.original("2") and own.weight.requires_grad
    assert copied.stored_parameters() - skipped.stored_parameters() == 8 * 9 + 8
    for factor in [f for layer in copied.layers().values() for f in (layer.up, layer.down)]:
        torch.nn.init.normal_(factor)
    copied.recogniser.observe_features({0: torch.ones(1, 8)})
    state = copied.state()
    shapes = {side: tuple(state[f"tasks/000/adapter/1/{side}"].shape) for side in ("down", "up")}
    assert shapes == {"down": (4, 4, 3, 3), "up": (8, 2, 1, 1)}
    expected = copied.encoder.features(x)
    again = make(ConvEncoder(model, 8), rank=2, depthwise="full_delta")
    again.load_state(state)
    again.activate(0)
    assert torch.equal(again.encoder.features(x), expected)


def test_layers_of_all_kinds_have_their_own_ranks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 1), nn.Flatten(2), nn.Linear(49, 80))
    method = make(ConvEncoder(model, 40), rank=3, alpha=6, rank_linear=20, alpha_linear=5)
    assert method.plan.ranks == {"0": 3, "2": 3, "4": 20}
    assert method.plan.scales == {"0": 2.0, "2": 2.0, "4": 0.25}
    begin(method)
    kinds = {name: type(layer) for name, layer in method.layers().items()}
    assert kinds == {"0": LowRankConv2d, "2": LowRankConv2d, "4": LowRankLinear}
    assert make(ConvEncoder(model, 40), rank=0).plan.ranks == {"4": 30}
    with pytest.raises(OptionError, match="no layer is left to adapt"):
        make(ConvEncoder(model, 40), rank=0, rank_linear=0)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="'linear' does not change the features"):
        make(deep_resnet(1), targets=("linear",))
    with pytest.raises(OptionError, match="norm=frozen_eval leaves as they were"):
        make(deep_resnet(1), norm="frozen_eval", bn_recalibrate=True)
    bench = Bench("gpt2", save_tiny("gpt2", tmp_path), "convlora", {})
    assert next(iter(bench.method.plan.ranks)) == "h.0.attn.c_attn.key"
    with pytest.raises(UnsupportedError, match="fused projection"):
        Bench("gpt2", tmp_path, "convlora", {"first_task": "full"})


def test_a_task_can_start_from_the_one_before(tmp_path: Path) -> None:
    bench = Bench("resnet", save_kind("resnet", tmp_path), "convlora", {"init_from": "previous"}, epochs=1)
    bench.learn(0)
    begin(bench.method, 1)
    first, second = (bench.method.task_modules.version(task) for task in (0, 1))
    for path, module in second.items():
        before = first[path].state_dict()
        assert module is not first[path]
        assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert second["conv1"].up.any() and second["conv1"].up.requires_grad


def test_a_full_first_task_becomes_the_base_of_the_others(tmp_path: Path) -> None:
    bench = Bench("resnet", save_kind("resnet", tmp_path), "convlora", {"first_task": "full"}, epochs=1)
    alone = bench.backbone.num_parameters
    bench.learn(0)
    assert bench.method.stored_parameters() == alone + 130, "the pretrained weights are not needed any more"
    begin(bench.method, 1)
    inputs = bench.batch(0).inputs
    fresh = bench.backbone.eval().features(inputs)
    bench.method.activate(0)
    assert torch.equal(bench.backbone.features(inputs), fresh)
    bench.method.activate(None)
    assert not torch.equal(bench.backbone.features(inputs), fresh)
    ranks = bench.method.plan.ranks
    sizes = {name: bench.backbone.model.get_submodule(name) for name in ranks}
    adapters = sum(r * (9 * sizes[n].in_channels + sizes[n].out_channels) for n, r in ranks.items())
    assert bench.method.stored_parameters() == alone + 130 + adapters + 2 * 240 + 130


def test_statistics_can_be_estimated_anew(tmp_path: Path) -> None:
    folder = save_kind("resnet", tmp_path)
    made = []
    for again in (False, True):
        bench = Bench("resnet", folder, "convlora", {"bn_recalibrate": again}, epochs=1, eval_batch_size=8)
        bench.learn(0)
        made.append(bench.method.task_modules.version(0)["bn1"])
        assert all(norm.momentum == 0.1 and not norm.training for norm in batch_norms([bench.method.task_modules]))
    assert torch.equal(made[0].weight, made[1].weight)
    bench.method.activate(0)
    conv = bench.backbone.model.conv1
    with torch.no_grad():
        maps = [conv(bench.batch(0).inputs["pixel_values"][part]) for part in (slice(0, 8), slice(8, 16))]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(made[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(made[0].running_mean, mean, rtol=1e-2) and int(made[1].num_batches_tracked) == 2


def test_a_task_folder_holds_an_adapter_that_peft_reads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (tmp_path / "model").mkdir()
    folder = save_kind("resnet", tmp_path / "model")
    options = {"rank": 12, "alpha": 6.0, "norm": "frozen_eval", "epochs": 1, "batch_size": 8, "augment": "none"}
    learner = Learner.create(tmp_path / "learner", folder, "convlora", **options)
    learner.learn(examples("resnet", 0), name="one")
    task = next((tmp_path / "learner").rglob("adapter_model.safetensors")).parent
    tensors = load_file(task / "adapter_model.safetensors")
    assert tensors["base_model.model.layer2.0.conv1.lora_A.weight"].shape == (12, 16, 3, 3)
    assert tensors["base_model.model.layer2.0.conv1.lora_B.weight"].shape == (32, 12, 1, 1)
    config = json.loads((task / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]["^conv1"]) == (12, 6.0, 10)
    assert config["alpha_pattern"]["^conv1"] == 5.0
    bench = Bench("resnet", folder, "ncm", {})
    inputs = bench.batch(0).inputs["pixel_values"]
    learner.method.activate(0)
    with torch.no_grad():
        expected = learner.backbone.features({"pixel_values": inputs})
        wrapped = peft.PeftModel.from_pretrained(bench.backbone.model, task)
        found = wrapped.base_model.model.eval().features(inputs)
        plain = learner.method.activate(None) or learner.backbone.features({"pixel_values": inputs})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4)
