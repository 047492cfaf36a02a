"""The Python an export's README shows: plain transformers (and peft), nothing of everlora."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from everlora.backbones.huggingface import HuggingFaceBackbone
from everlora.export.classifiers import takes_pooler
from everlora.export.head import ExportHead
from everlora.export.layout import row_lines

__all__ = ["Snippet"]


@dataclass(frozen=True)
class Snippet:
    """What the code depends on.

    Attributes:
        backbone: the encoder and its pooling.
        head: the classifier.
        classifier: class of transformers that holds encoder and head, or `None` with the head beside.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
    """

    backbone: HuggingFaceBackbone
    head: ExportHead
    classifier: str | None = None
    base: str | None = None

    @property
    def model_class(self) -> str:
        """Class of transformers that loads the weights."""
        return self.classifier or type(self.backbone.model).__name__

    def code(self) -> str:
        """Complete program: loads the export from the current folder, defines `score`, and calls it once."""
        return "\n\n".join(
            ["\n".join(self._imports()), "\n".join(self._loading()), self._score(), "\n".join(self._call())]
        )

    def pipeline_code(self) -> str:
        """Same through `pipeline`; continues the program of `code`."""
        if self.backbone.modality == "image":
            lines = ['classify = pipeline("image-classification", model=folder)', "print(classify(images[0]))"]
        else:
            options = f"truncation=True, max_length={self.backbone.max_length}"
            lines = [
                f'classify = pipeline("text-classification", model=folder, {options})',
                "print(classify(texts[0]))",
            ]
        return "\n".join(["from transformers import pipeline", "", *lines])

    def _is_image(self) -> bool:
        return self.backbone.modality == "image"

    def _imports(self) -> list[str]:
        reader = "AutoImageProcessor" if self._is_image() else "AutoTokenizer"
        lines = [] if self.classifier else ["import json", ""]
        lines += ["import torch"]
        lines += ["from peft import PeftModel"] if self.base is not None else []
        lines += ["from PIL import Image"] if self._is_image() else []
        lines += [] if self.classifier else ["from safetensors.torch import load_file"]
        return [*lines, "from transformers import " + ", ".join(sorted([reader, self.model_class], key=str.lower))]

    def _loading(self) -> list[str]:
        kind = "AutoImageProcessor" if self._is_image() else "AutoTokenizer"
        dtype = {torch.float32: "torch.float32", torch.bfloat16: "torch.bfloat16"}[self.backbone.dtype]
        options = f"dtype={dtype}"
        if self.classifier is None and takes_pooler(self.backbone.model):
            options += f", add_pooling_layer={self.backbone.pooling == 'pooler'}"
        where = "folder" if self.base is None else "base"
        lines = ['folder = "."  # the folder that holds this file']
        lines += [f"base = {json.dumps(self.base)}  # the base model"] if self.base is not None else []
        lines += [f"{'processor' if self._is_image() else 'tokenizer'} = {kind}.from_pretrained(folder)"]
        lines += [f"model = {self.model_class}.from_pretrained({where}, {options})"]
        lines += ["model = PeftModel.from_pretrained(model, folder)"] if self.base is not None else []
        lines += ["model = model.eval()"]
        if self.classifier is None:
            lines += [
                'head = load_file(f"{folder}/head.safetensors")',
                'with open(f"{folder}/head.json", encoding="utf-8") as file:',
                "    info = json.load(file)",
                'classes = info["classes"]',
            ]
        else:
            lines += ["classes = [model.config.id2label[i] for i in range(model.config.num_labels)]"]
        return lines

    def _score(self) -> str:
        argument = "images" if self._is_image() else "texts"
        lines = ["", f"def score({argument}):", f'    """Logits of {argument}: one row each, one column a class."""']
        if self._is_image():
            call = "pixel_values=pixels"
            call += ", interpolate_pos_encoding=True" if self.backbone.interpolate else ""
            lines += [
                '    pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.dtype)',
            ]
        else:
            call = "**batch"
            length = f"max_length={self.backbone.max_length}"
            lines += [
                f'    batch = tokenizer(texts, padding=True, truncation=True, {length}, return_tensors="pt")',
            ]
        call += ", output_hidden_states=True" if self.backbone.feature_layers > 1 else ""
        lines += ["    with torch.no_grad():", f"        output = model({call})"]
        if self.classifier:
            return "\n".join([*lines, "    return output.logits"])
        return "\n".join([*lines, *self._pooling(), *row_lines(self.head)])

    def _pooling(self) -> list[str]:
        pooling = self.backbone.pooling
        if pooling == "pooler":
            return ["    features = output.pooler_output.float().flatten(1)"]
        layers = self.backbone.feature_layers
        if layers > 1:
            return self._pooling_of_layers(layers)
        lines = ["    hidden = output.last_hidden_state.float()"]
        if pooling in ("mean", "cls_mean") and self._is_image():
            lines += ["    if hidden.dim() == 4:  # a convolutional network", "        hidden = hidden.flatten(2).mT"]
            lines += [f"    mean = hidden[:, {self.backbone.num_prefix} :].mean(dim=1)  # over patches"]
        elif pooling in ("mean", "cls_mean"):
            lines += ['    mask = batch["attention_mask"].unsqueeze(-1)  # padding does not count']
            lines += ["    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)"]
        formula = {
            "cls": "hidden[:, 0]",
            "mean": "mean",
            "cls_mean": "torch.cat([hidden[:, 0], mean], dim=1)",
        }
        return [*lines, f"    features = {formula[pooling]}"]

    def _pooling_of_layers(self, layers: int) -> list[str]:
        lines = [f"    layers = [*output.hidden_states[-{layers}:-1], output.last_hidden_state]"]
        lines += ["    hidden = torch.stack(layers, dim=1).float()  # row, layer, token, width"]
        if self._is_image():
            mean = f"hidden[:, :, {self.backbone.num_prefix} :].mean(dim=2)"
        else:
            lines += ['    mask = batch["attention_mask"][:, None, :, None]  # padding does not count']
            mean = "(hidden * mask).sum(dim=2) / mask.sum(dim=2)"
        first = "hidden[:, :, 0]"
        pooled = {"cls": first, "mean": mean, "cls_mean": f"torch.cat([{first}, {mean}], dim=2)"}[self.backbone.pooling]
        return [*lines, f"    features = ({pooled}).flatten(1)"]

    def _call(self) -> list[str]:
        if self._is_image():
            size = self.backbone.image_size or 32
            lines = ["", f'images = [Image.new("RGB", ({size}, {size}))]  # put your own here: Image.open("photo.png")']
        else:
            lines = ["", 'texts = ["put your own text here"]']
        argument = "images" if self._is_image() else "texts"
        return [*lines, f"for row in score({argument}):", "    print(classes[int(row.argmax())])"]
