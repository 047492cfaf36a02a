"""Exports of a small residual network: plain weights with their code, and adapters for plain peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everlora import Learner
from everlora.backbones import load_backbone
from everlora.backbones.base import Backbone
from everlora.backbones.cifar_network import CifarResNet
from everlora.errors import OptionError, UnsupportedError
from everlora.export import export_merged, export_peft
from everlora.lowrank import attach
from everlora.methods.base import Batch
from tests.export.builders import CARD, LABELS, make_head, readme_code
from tests.toy import toy_images

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
FAST: dict[str, Any] = {"epochs": 1, "batch_size": 8, "lr": 1e-2, "augment": "none"}
NEW = {"convlora": {"rank": 12, "alpha": 9.0}, "independent": {}, "senacnn": {"cut": "layer3"}, "packnet": {}}
SHARED = {
    "sequential": {},
    "joint": {},
    "probe": {},
    "replay": {"size": 8},
    "inflora": {"rank": 2},
    "sd_lora": {"rank": 2},
    "ncm": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shallowest network, its statistics far from those a new layer has."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = CifarResNet(1).state_dict()
        for name, tensor in state.items():
            if name.endswith("running_mean"):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
        save_file({k: v for k, v in state.items() if "batches" not in k}, folder / "model.safetensors")
    return folder


def taught(folder: Path, base: Path, method: str, tasks: int = 2, **options: Any) -> Learner:
    learner = Learner.create(folder / "learner", model=base, method=method, **{**FAST, **options})
    if learner.trains_on == "stream":
        tasks = 1
    for index in range(tasks):
        names = [f"class {letter}" for letter in "abcdef"][2 * index : 2 * index + 2]
        learner.learn(toy_images(names, 6, seed=index + 1, size=32), name=f"task {index}")
    return learner


def own_logits(learner: Learner, task: int | None = None) -> Tensor:
    """Logits of the learner itself, of the columns that a task's classes have."""
    batch = learner.backbone.collate(learner.backbone.encode(IMAGES), np.arange(5))
    with torch.no_grad():
        logits = learner.method.logits(Batch(batch, torch.zeros(5, dtype=torch.long)), task)
    if task is None:
        return logits
    labels = learner._store.read_task(task).record["labels"]
    return logits[:, [learner.classes.index(label) for label in labels]]


def plain_network(folder: Path) -> nn.Module:
    tensors = load_file(folder / "model.safetensors")
    network = CifarResNet(1, num_classes=len(tensors["linear.bias"]))
    network.load_state_dict(tensors)
    return network.eval()


def with_peft(base: Path, folder: Path) -> Tensor:
    """Logits of the base network with an adapter that peft put on, and the head that lies beside."""
    model = peft.PeftModel.from_pretrained(plain_network(base), str(folder)).eval()
    head = load_file(folder / "head.safetensors")
    info = json.loads((folder / "head.json").read_text())
    assert not info["normalize"] and info["row_classes"] == list(range(len(info["classes"])))
    with torch.no_grad():
        return model.features(pixels()) @ head["weight"].T + head["bias"]


def pixels() -> Tensor:
    scaled = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SHARED)
def test_a_shared_network_becomes_plain_weights(method: str, base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, method, **SHARED[method])
    expected = own_logits(learner)
    report = learner.export(tmp_path / "out")
    assert (report.model_class, report.max_difference < 1e-4) == ("CifarResNet", True)
    published, written = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == published.keys()
    if report.has_classifier:
        with torch.no_grad():
            close(plain_network(tmp_path / "out")(pixels()), expected)
        assert json.loads((tmp_path / "out" / "labels.json").read_text()) == learner.classes
    again = load_backbone(tmp_path / "out")
    batch = again.collate(again.encode(IMAGES), np.arange(5))
    close(again.features(batch), learner.backbone.features(batch))
    moved = not torch.equal(written["layer2.0.bn1.running_mean"], published["layer2.0.bn1.running_mean"])
    assert moved == (method in ("sequential", "joint", "replay"))
    with pytest.raises(OptionError, match="one network knows all tasks"):
        learner.export(tmp_path / "one", task=0)


@pytest.mark.parametrize("method", NEW)
def test_each_task_of_isolated_networks_is_exported_alone(method: str, base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, method, **NEW[method])
    before = [own_logits(learner, task) for task in (0, 1)]
    free = own_logits(learner)
    with pytest.raises(OptionError, match="name the one to export with task, one of: task 0, task 1"):
        learner.export(tmp_path / "all")
    with pytest.raises(OptionError, match="no task 'task 7'; known: task 0, task 1"):
        learner.export(tmp_path / "all", task="task 7")
    learner.method.activate(1)
    for task, name in ((0, 0), (1, "task 1")):
        out = tmp_path / f"out-{task}"
        assert learner.export(out, task=name).has_classifier
        with torch.no_grad():
            close(plain_network(out)(pixels()), before[task])
        labels = json.loads((out / "labels.json").read_text())
        assert labels == learner.classes[2 * task : 2 * task + 2]
        card = (out / "README.md").read_text()
        assert f"| 1 | task {task} | 2 |" in card and f"task {1 - task}" not in card
        assert learner.method.task_modules.active == 1
    assert all(torch.equal(own_logits(learner, task), before[task]) for task in (0, 1))
    assert torch.equal(own_logits(learner), free)
    if method != "convlora":
        with pytest.raises(UnsupportedError, match="what was learned lies in the network's own weights"):
            learner.export(tmp_path / "peft", "peft", task=1)


def test_only_the_first_column_of_joined_ones_is_a_plain_network(base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, "pnn")
    expected = own_logits(learner, 0)
    learner.export(tmp_path / "out", task=0)
    with torch.no_grad():
        close(plain_network(tmp_path / "out")(pixels()), expected)
    with pytest.raises(UnsupportedError, match="reads those before it"):
        learner.export(tmp_path / "second", task=1)
    assert not (tmp_path / "second").exists() and torch.equal(own_logits(learner, 0), expected)


@pytest.mark.parametrize("norm", ["per_task", "affine_only", "adabn", "frozen_eval"])
def test_plain_peft_gives_the_logits_of_a_task(norm: str, base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, "convlora", rank=12, alpha=9.0, norm=norm)
    expected = [own_logits(learner, task) for task in (0, 1)]
    for task in (0, 1):
        out = tmp_path / f"out-{task}"
        report = learner.export(out, "peft", task=task)
        assert report.max_difference < 1e-5 and not report.truncation
        close(with_peft(base, out), expected[task])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    tensors = load_file(tmp_path / "out-1" / "adapter_model.safetensors")
    assert tensors["base_model.model.layer2.0.conv1.lora_A.weight"].shape == (12, 16, 3, 3)
    assert tensors["base_model.model.layer2.0.conv1.lora_B.weight"].shape == (32, 12, 1, 1)
    config = json.loads((tmp_path / "out-1" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 0.75
    assert config["rank_pattern"] == {"^conv1": 10} and config["alpha_pattern"] == {"^conv1": 7.5}  # few channels
    kept = [name for name in tensors if "lora_" not in name]
    if norm == "frozen_eval":
        assert not kept and config["modules_to_save"] is None
    else:
        norms = [name for name, m in CifarResNet(1).named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert sorted(config["modules_to_save"]) == sorted(norms) and len(kept) == 5 * len(norms)
        own = learner.method.task_modules.version(1)["layer3.0.bn2"].state_dict()
        for name, value in own.items():
            assert torch.equal(tensors[f"base_model.model.layer3.0.bn2.{name}"], value)
    assert all(torch.equal(own_logits(learner, task), expected[task]) for task in (0, 1))


@pytest.mark.parametrize("method", ["inflora", "sd_lora"])
def test_factors_of_all_tasks_become_one_adapter(method: str, base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, method, tasks=3, rank=7)
    expected = own_logits(learner)
    learner.export(tmp_path / "out", "peft")
    close(with_peft(base, tmp_path / "out"), expected)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {name.split(".lora_")[0]: len(t) for name, t in tensors.items() if "lora_A" in name}
    layer = learner.method.layers()["layer1.0.conv1"]
    assert layer.total_rank + layer.rank > 16  # more than 16 channels can hold
    assert len(ranks) == 6 and ranks["base_model.model.layer1.0.conv1"] == 16
    assert all("lora_" in name for name in tensors)
    small = learner.export(tmp_path / "small", "peft", max_rank=2)
    assert len(small.truncation) == 6 and small.max_difference > 1e-5


def test_another_learner_starts_from_an_adapter_of_kernels(base: Path, tmp_path: Path) -> None:
    first = taught(tmp_path / "first", base, "sd_lora", tasks=1, rank=2)
    first.export(tmp_path / "adapter", "peft")
    second = Learner.create(tmp_path / "second", base, "sd_lora", start_from=str(tmp_path / "adapter"), rank=2, **FAST)
    second.learn(toy_images(["class c", "class d"], 6, seed=2, size=32))
    layer, other = (learner.method.layers()["layer2.0.conv2"] for learner in (first, second))
    down, up = layer.factors()
    block = other.blocks()[0]
    cosine = torch.cosine_similarity((up @ down).flatten(), (block.up @ block.down).flatten(), dim=0)
    assert abs(float(cosine)) > 0.999  # its magnitude went on training


def test_norms_alone_may_not_carry_other_weights(base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, "convlora", first_task="full", rank=2)
    learner.export(tmp_path / "merged", task=1)
    with torch.no_grad():
        close(plain_network(tmp_path / "merged")(pixels()), own_logits(learner, 1))
    with pytest.raises(UnsupportedError, match=r"weights of layer '[\w.]+' are not the pretrained ones"):
        learner.export(tmp_path / "out", "peft", task=1)


@pytest.mark.parametrize(
    ("option", "value"), [("groups", 2), ("dilation", (2, 2)), ("padding_mode", "reflect")], ids=lambda v: str(v)
)
def test_what_peft_drops_is_refused(option: str, value: Any, base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(base)
    padding = 2 if option == "dilation" else 1
    changed = nn.Conv2d(16, 16, 3, padding=padding, bias=False, **{option: value})
    backbone.model.layer1[0].conv2 = changed.requires_grad_(False)
    layers = attach(backbone.model, ["layer1.0.conv2"], 2)
    with pytest.raises(UnsupportedError, match=rf"layer 'layer1.0.conv2': a convolution with {option}=.* merged"):
        export_peft(backbone, layers, make_head(backbone), tmp_path / "out", card=CARD)
    assert not (tmp_path / "out").exists()


def test_a_network_with_parts_of_its_own_is_refused(base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(base)
    backbone.model.layer2[0].extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"cannot hold this network: 2 tensors .* 'layer2.0.extra.bias'"):
        export_merged(backbone, {}, make_head(backbone), tmp_path / "out", card=CARD)


def stems(backbone: Backbone) -> dict[str, Any]:
    """Adapt the stem alone, whose name others end with, or it and one other."""
    layers = attach(backbone.model, [r"re:conv1", r"re:layer1\.0\.conv1"], {"conv1": 2, "layer1.0.conv1": 4})
    for layer in layers.values():
        layer.up.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        layer.invalidate()
    return layers


def test_names_that_others_end_with_are_told_apart(base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(base)
    layers, head = stems(backbone), make_head(backbone)
    expected = backbone.features({"pixel_values": pixels()}) @ torch.from_numpy(head.weight).T
    export_peft(backbone, layers, head, tmp_path / "out", card=CARD)
    close(with_peft(base, tmp_path / "out"), expected + torch.from_numpy(head.bias))
    config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert config.target_modules == r"conv1|layer1\.0\.conv1" and config.rank_pattern == {"^conv1": 2}
    model = peft.PeftModel.from_pretrained(plain_network(base), str(tmp_path / "out"))
    assert sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules()) == 2


BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
"""
PRINT = """
import numpy
numpy.save("found.npy", score(torch.from_numpy(numpy.load("images.npy"))).float().numpy())
"""


def readme_logits(folder: Path, *, without: tuple[str, ...]) -> Tensor:
    """What the code of the README gives in a program of its own, without some packages."""
    np.save(folder / "images.npy", IMAGES)
    program = BLOCK.format(names=without) + readme_code(folder)[0] + PRINT
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0]  # the example at its end says a class
    return torch.from_numpy(np.load(folder / "found.npy"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "twice"),
    [
        ({}, False),
        pytest.param({"normalize": "unit"}, True, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_code_of_the_readme_needs_torch_and_safetensors(
    options: dict[str, Any], twice: bool, base: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(base, **options)
    layers = stems(backbone)
    labels = (*LABELS, LABELS[0]) if twice else LABELS
    head = make_head(backbone, labels, normalize=twice)
    with torch.no_grad():
        expected = head.logits(backbone.features(backbone.collate(backbone.encode(IMAGES), np.arange(5))))
    report = export_merged(backbone, layers, head, tmp_path / "out", card=CARD)
    assert report.has_classifier == (not options)
    found = readme_logits(tmp_path / "out", without=("everlora", "transformers", "peft", "PIL"))
    if "dtype" in options:
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    else:
        close(found, expected)


@pytest.mark.slow
def test_the_code_of_an_adapter_needs_peft(base: Path, tmp_path: Path) -> None:
    learner = taught(tmp_path, base, "convlora", rank=3)
    learner.export(tmp_path / "out", "peft", task=1)
    close(readme_logits(tmp_path / "out", without=("everlora",)), own_logits(learner, 1))
