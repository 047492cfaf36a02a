"""Classification classes of transformers that compute a linear head on pooled features, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from everlora.backbones.huggingface import HuggingFaceBackbone, accepts
from everlora.export.head import ExportHead
from everlora.export.layout import load_fitting

__all__ = ["build_classifier", "build_encoder", "classifier_for", "takes_pooler"]


@dataclass(frozen=True)
class _Classifier:
    """A class of transformers, and which slice of its input each pooling of ours fills."""

    name: str
    slices: Mapping[str, tuple[int, ...]]  # pooling -> which of `parts` blocks of the classifier's input it fills
    parts: int = 1


_CLS = {"cls": (0,)}
_CLS_AND_MEAN = {"cls": (0,), "mean": (1,), "cls_mean": (0, 1)}
_POOLER = {"pooler": (0,)}

_CLASSIFIERS: dict[str, _Classifier] = {
    "vit": _Classifier("ViTForImageClassification", _CLS),
    "deit": _Classifier("DeiTForImageClassification", _CLS),
    "dinov2": _Classifier("Dinov2ForImageClassification", _CLS_AND_MEAN, parts=2),
    "dinov2_with_registers": _Classifier("Dinov2WithRegistersForImageClassification", _CLS_AND_MEAN, parts=2),
    "beit": _Classifier("BeitForImageClassification", _POOLER),
    "bert": _Classifier("BertForSequenceClassification", _POOLER),
    "albert": _Classifier("AlbertForSequenceClassification", _POOLER),
}


def classifier_for(backbone: HuggingFaceBackbone, head: ExportHead) -> str | None:
    """Name the class of transformers that computes the same logits, or `None` when there is none.

    Features of several layers have none; nor have half-precision bases, whose own class would round the head as well.
    """
    entry = _CLASSIFIERS.get(backbone.architecture)
    fits = entry is not None and backbone.pooling in entry.slices and head.is_linear and backbone.feature_layers == 1
    if entry is None or not fits or backbone.interpolate or backbone.dtype != torch.float32:
        return None
    return entry.name


def build_encoder(backbone: HuggingFaceBackbone, head: ExportHead, state: Mapping[str, Tensor]) -> Any:
    """Build the plain encoder with the merged weights, on the CPU.

    Raises:
        UnsupportedError: the state is not that of such an encoder.
    """
    model: Any = backbone.model
    options = {"add_pooling_layer": backbone.pooling == "pooler"} if takes_pooler(model) else {}
    with torch.random.fork_rng(devices=[]):  # the starting values are all overwritten
        encoder = type(model)(_labelled_config(model, head), **options)
    load_fitting(encoder.to(backbone.dtype), state)
    return encoder.eval()


def build_classifier(backbone: HuggingFaceBackbone, head: ExportHead, state: Mapping[str, Tensor]) -> Any:
    """Build the architecture's own classification model with merged weights and the head's rows, on the CPU.

    Raises:
        UnsupportedError: the state is not that of its encoder.
    """
    entry = _CLASSIFIERS[backbone.architecture]
    config = _labelled_config(backbone.model, head)
    config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):  # the starting values are all overwritten
        model = getattr(transformers, entry.name)(config)
    load_fitting(getattr(model, model.base_model_prefix), state)
    weight, bias = head.tensors()
    columns = weight.chunk(len(entry.slices[backbone.pooling]), dim=1)
    padded = [torch.zeros_like(columns[0]) for _ in range(entry.parts)]
    for part, block in zip(entry.slices[backbone.pooling], columns, strict=True):
        padded[part] = block
    with torch.no_grad():
        model.classifier.weight.copy_(torch.cat(padded, dim=1))
        model.classifier.bias.copy_(bias)
    return model.eval()


def _labelled_config(model: Any, head: ExportHead) -> Any:
    """Copy a config with the labels of the head in place of those the base was trained with."""
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(head.classes))
    config.label2id = {label: number for number, label in enumerate(head.classes)}
    return config


def takes_pooler(model: nn.Module) -> bool:
    """Whether the class of a model lets a caller leave out its pooling layer."""
    return accepts(type(model), "add_pooling_layer")
