"""Exports of the small residual networks: plain weights beside a copy of the network's code, or an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from everlora.backbones import cifar_network
from everlora.backbones.cifar_resnet import CifarResNet, CifarResNetBackbone, load_cifar_resnet
from everlora.backbones.images import ImageInputs, ImageTransform
from everlora.export.folder import write_json
from everlora.export.head import ExportHead
from everlora.export.layout import ClassifierLayout, load_fitting, row_lines

__all__ = ["CifarResNetLayout"]

_CODE_FILE = "cifar_resnet.py"
_LABELS_FILE = "labels.json"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class CifarResNetLayout(ClassifierLayout):
    """A residual network whose tensors bear the names they have in its published files; see `Layout`.

    Attributes:
        encoder: the backbone.
        head: the classifier; a merged export holds its rows as the network's own linear layer.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
    """

    encoder: CifarResNetBackbone
    head: ExportHead
    base: str | None = None

    @property
    def backbone(self) -> CifarResNetBackbone:
        """The encoder, with the adapted layers in place."""
        return self.encoder

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights."""
        return self.encoder.model.linear.weight.dtype

    @property
    def model_class(self) -> str:
        """Class of the network, in the code that is written beside the weights."""
        return CifarResNet.__name__

    @property
    def has_classifier(self) -> bool:
        """Whether its linear layer computes the logits; in half precision it would round the head as well."""
        return self.base is None and self.head.is_linear and self.dtype == torch.float32

    @property
    def library(self) -> str:
        """The library of a merged model's class."""
        return "pytorch"

    @property
    def made_with(self) -> str:
        """The library and its version."""
        return f"torch {torch.__version__.split('+')[0]}"

    def merged_summary(self) -> str:
        """One sentence on what a merged model is."""
        name = f"A plain residual network of {self._depth} layers, whose code lies beside it in `{_CODE_FILE}`"
        if self.has_classifier:
            return f"{name}; its layer `linear` is the classifier."
        return f"{name}; the classifier lies beside it, too, in `head.safetensors` and `head.json`."

    def requirements(self) -> str:
        """One sentence on what the code needs."""
        libraries = "torch and safetensors" if self.base is None else "torch, safetensors and peft"
        pixels = "images of 32x32 pixels in [0, 1]"
        if self._transform.mean is not None and self._transform.std is not None:
            pixels += (
                f" with mean {_listed(self._transform.mean)} and deviation {_listed(self._transform.std)} taken out"
            )
        return f"Needs {libraries}, and {pixels}, as the code does it; run it in this folder."

    def code(self) -> str:
        """The program of the README."""
        lines = [*self._imports(), "", *self._loading(), "", *self._score(), "", *self._call()]
        return "\n".join(lines)

    def write_model(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the weights by their published names, the head's rows as the linear layer."""
        weight, bias = self.head.tensors()
        with torch.random.fork_rng(devices=[]):  # the starting values are all overwritten
            model = CifarResNet(self._blocks, num_classes=len(weight)).to(self.dtype)
        load_fitting(model, {**state, "linear.weight": weight, "linear.bias": bias})
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if _COUNTER not in name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def write_reader(self, folder: Path) -> None:
        """Write the network's code, the labels, and how pixels are normalised."""
        source = Path(cifar_network.__file__).read_text(encoding="utf-8")
        (folder / _CODE_FILE).write_text(source, encoding="utf-8")
        labels = json.dumps(list(self.head.classes), indent=2, ensure_ascii=False)
        (folder / _LABELS_FILE).write_text(labels + "\n", encoding="utf-8")
        write_json(folder / "preprocessor_config.json", self._transform.processor_config())

    def load(self, place: Path) -> Any:
        """Load the base, or the merged model of a folder."""
        return load_cifar_resnet(place, source=str(place), dtype=self.dtype, normalise=True).model

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `(n, classes)` of a loaded model."""
        pixels = batch["pixel_values"].to(self.dtype)
        if self.has_classifier:
            logits: Tensor = model(pixels)
            return logits
        return self.head.logits(model.features(pixels).float())

    @property
    def _blocks(self) -> int:
        return len(self.encoder.model.layer1)

    @property
    def _depth(self) -> int:
        return 6 * self._blocks + 2

    @property
    def _transform(self) -> ImageTransform:
        inputs = self.encoder.inputs
        assert isinstance(inputs, ImageInputs)
        return inputs.transform

    def _imports(self) -> list[str]:
        lines = ["import json", "", "import torch", f"from {Path(_CODE_FILE).stem} import {self.model_class}"]
        if self.base is not None:
            lines += ["from huggingface_hub import snapshot_download"] if self._is_on_hub else []
            lines += ["from peft import PeftModel"]
        return [*lines, "from safetensors.torch import load_file"]

    @property
    def _is_on_hub(self) -> bool:
        return self.base is not None and not Path(self.base).is_absolute()

    def _loading(self) -> list[str]:
        lines = ['folder = "."  # the folder that holds this file']
        where = "folder"
        if self.base is not None:
            named = json.dumps(self.base)
            lines += [f"base = {f'snapshot_download({named})' if self._is_on_hub else named}  # the base model"]
            where = "base"
        dtype = "" if self.dtype == torch.float32 else f".to({self.dtype})"
        lines += [
            f'tensors = load_file(f"{{{where}}}/model.safetensors")',
            f'model = {self.model_class}({self._blocks}, num_classes=len(tensors["linear.bias"])){dtype}',
            "model.load_state_dict(tensors)",
        ]
        lines += ["model = PeftModel.from_pretrained(model, folder)"] if self.base is not None else []
        lines += ["model = model.eval()"]
        if not self.has_classifier:
            lines += [
                'head = load_file(f"{folder}/head.safetensors")',
                'with open(f"{folder}/head.json", encoding="utf-8") as file:',
                "    info = json.load(file)",
            ]
        lines += [
            f'with open(f"{{folder}}/{_LABELS_FILE}", encoding="utf-8") as file:',
            "    classes = json.load(file)",
        ]
        return lines

    def _score(self) -> list[str]:
        lines = [
            "",
            "def score(images):",
            '    """Logits of images `(n, 32, 32, 3)`, RGB from 0 to 255: one row each, one column a class."""',
            "    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255",
        ]
        mean, std = self._transform.mean, self._transform.std
        if mean is not None and std is not None:
            lines += [
                f"    mean = torch.tensor({list(mean)}).view(3, 1, 1)",
                f"    std = torch.tensor({list(std)}).view(3, 1, 1)",
                "    pixels = (pixels - mean) / std",
            ]
        pixels = "pixels" if self.dtype == torch.float32 else f"pixels.to({self.dtype})"
        lines += ["    with torch.no_grad():"]
        if self.has_classifier:
            return [*lines, f"        return model({pixels})"]
        return [*lines, f"        features = model.features({pixels}).float()", *row_lines(self.head)]

    def _call(self) -> list[str]:
        return [
            "",
            "images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)  # put your own here",
            "for row in score(images):",
            "    print(classes[int(row.argmax())])",
        ]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
