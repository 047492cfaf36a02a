"""What of the encoder is fine-tuned, and what happens to batch norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from everlora.methods import method_spec
from everlora.settings import Settings
from tests.methods.tuned_builders import Bench, assert_goes_on_after_reopening, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def _norms(bench: Bench) -> dict[str, torch.Tensor]:
    model = bench.backbone.model
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return {k: v.clone() for k, v in model.state_dict().items() if k.rpartition(".")[0] in names}


def _changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize(("kind", "trained"), [("resnet", "all"), ("vit", "adapter"), ("bert", "adapter")])
def test_by_default_convolutional_networks_are_trained_whole_and_others_adapted(
    kind: str, trained: str, models: dict[str, Path]
) -> None:
    bench = Bench(models[kind], kind, "sequential", rank=2)
    assert bench.method.tuned.train == trained and bool(bench.method.layers()) == (trained == "adapter")
    explicit = Bench(models[kind], kind, "sequential", rank=2, train=trained)
    for each in (bench, explicit):
        each.learn(0)
    states = (each.method.state() for each in (bench, explicit))
    first, second = ({k: v for k, v in state.items() if isinstance(v, torch.Tensor)} for state in states)
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}),
        ({"bn": "affine_only"}, {"weight", "bias"}),
        ({"bn": "frozen_eval"}, set()),
        ({"train": "head"}, set()),
        ({"train": "adapter", "rank": 2}, set()),
    ],
)
def test_batch_norms_move_as_far_as_they_are_trained(options: dict, moves: set[str], models: dict[str, Path]) -> None:
    bench = Bench(models["resnet"], "resnet", "sequential", **options)
    before = _norms(bench)
    bench.learn(0)
    assert _changed(before, _norms(bench)) == moves
    convolutions = [p for name, p in bench.backbone.model.named_parameters() if name == "layer1.0.conv1.weight"]
    assert bool(convolutions) == (options.get("train") != "adapter")
    assert not any(module.training for module in bench.backbone.modules())


def test_the_probe_never_moves_a_batch_norm(models: dict[str, Path]) -> None:
    bench = Bench(models["resnet"], "resnet", "probe")
    before = {key: value.clone() for key, value in bench.backbone.model.state_dict().items()}
    bench.learn(0)
    bench.learn(1)
    assert bench.method.fixed_features
    assert all(torch.equal(value, before[key]) for key, value in bench.backbone.model.state_dict().items())


def test_scales_shifts_and_biases_are_a_group_without_decay(models: dict[str, Path]) -> None:
    bench = Bench(models["resnet"], "resnet", "sequential")
    bench.begin(0)
    groups = bench.method.parameters()
    assert {p.ndim for p in groups["adapter"]} == {2, 4} and {p.ndim for p in groups["norm"]} == {1}
    assert sum(map(len, groups.values())) == len(list(bench.backbone.model.parameters())) + 2
    frozen = Bench(models["resnet"], "resnet", "sequential", bn="frozen_eval")
    frozen.begin(0)
    assert len(frozen.method.parameters()["norm"]) == 1  # the bias of the linear layer on top


def test_ranks_fit_each_convolution(models: dict[str, Path]) -> None:
    bench = Bench(models["resnet"], "resnet", "sequential", train="adapter", rank=15)
    ranks = {name: layer.rank for name, layer in bench.method.layers().items()}
    assert ranks["layer1.0.conv1"] == 14 and ranks["layer3.0.conv2"] == 15
    before = bench.backbone.features(bench.batch(0, [0, 1]).inputs)
    bench.learn(0)
    assert not torch.equal(bench.backbone.features(bench.batch(0, [0, 1]).inputs), before)


def test_layers_of_lower_rank_count_as_much_as_others(models: dict[str, Path]) -> None:
    options = {"sequential": {"train": "adapter"}, "ewc": {"train": "adapter"}, "o_lora": {}}
    for method, more in options.items():
        bench = Bench(models["resnet"], "resnet", method, rank=15, alpha=30, **more)
        bench.begin(0)
        layers = bench.method.layers()
        assert {layer.rank for layer in layers.values()} == {14, 15}
        assert {layer.scale for layer in layers.values()} == {2.0}
        saved = next(value for key, value in bench.method.state().items() if key.endswith("alphas"))
        assert saved == {name: 2.0 * layer.rank for name, layer in layers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["adapter", "all"])
def test_a_learner_goes_on_after_reopening(train: str, models: dict[str, Path], tmp_path: Path) -> None:
    assert_goes_on_after_reopening(tmp_path, models["resnet"], "resnet", "sequential", train=train, lr=1e-3)


def test_options_stored_before_there_was_a_choice_of_batch_norms() -> None:
    stored = Settings.of("sequential", {}).as_parts()
    del stored["method"]["bn"]
    stored["method"]["train"] = "adapter"
    again = Settings.from_parts(method_spec("sequential"), stored)
    assert again.method_options.train == "adapter" and again.method_options.bn == "shared"
    assert Settings.of("probe", {}).method_options.train == "head"
