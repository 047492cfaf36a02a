"""Gradient checkpointing: the same gradients, blocks computed again, networks that cannot are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everlora.errors import UnsupportedError
from tests.methods.conv_builders import save_resnet
from tests.toy import tiny_model
from tests.training.builders import Bench, distance, save_language_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("vit", "bert", "llama")}
    tiny = {kind: tiny_model(kind, folders[kind]) for kind in ("vit", "bert")}
    return {**tiny, "llama": save_language_model(folders["llama"])}


KINDS = {"vit": "image", "bert": "text", "llama": "language"}


def _forwards(bench: Bench) -> list[str]:
    """Names of the feed-forward layers as they run, first time or again."""
    seen: list[str] = []
    for name, module in bench.backbone.model.named_modules():
        if name.endswith(("mlp.gate_proj", "output.dense", "mlp.fc2", "mlp.fc1")) and "attention" not in name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    return seen


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("forward_mode", ["folded", "factored"])
@pytest.mark.parametrize("model", list(KINDS))
def test_gradients_are_the_same_with_and_without(
    model: str, forward_mode: str, dropout: bool, models: dict[str, Path]
) -> None:
    benches, runs = [], []
    for enabled in (False, True):
        training = {"max_steps": 2, "checkpoint_gradients": enabled, "dropout": dropout}
        bench = Bench(models[model], KINDS[model], training=training, forward_mode=forward_mode)
        runs.append(_forwards(bench))
        bench.learn()
        benches.append(bench)
    for plain, again in zip(*(bench.gradients for bench in benches), strict=True):
        assert distance(plain, again) < 1e-6
    assert runs[0] and len(runs[1]) > len(runs[0]), "blocks were computed again"


def test_it_ends_with_the_task(models: dict[str, Path]) -> None:
    bench = Bench(models["llama"], "language", training={"max_steps": 1, "checkpoint_gradients": True})
    bench.learn()
    flags = [m.gradient_checkpointing for m in bench.backbone.modules() if hasattr(m, "gradient_checkpointing")]
    assert flags and not any(flags) and not any(module.training for module in bench.backbone.modules())
    embedded = bench.backbone.model.get_input_embeddings()(torch.tensor([[1, 2]]))  # type: ignore[operator]
    assert not embedded.requires_grad, "no hook is left behind"


def test_networks_without_blocks_are_refused(tmp_path: Path) -> None:
    training = {"max_steps": 1, "checkpoint_gradients": True}
    with pytest.raises(UnsupportedError, match="cifar_resnet cannot compute its blocks again"):
        Bench(save_resnet(tmp_path), "image", training=training).learn()
