"""Loading a backbone by name."""

from __future__ import annotations

from pathlib import Path

import torch

from everlora.backbones.base import Backbone
from everlora.backbones.causal_lm import load_causal_lm
from everlora.backbones.cifar_resnet import is_cifar_resnet, load_cifar_resnet
from everlora.backbones.huggingface import depth_of, load_huggingface
from everlora.backbones.images import check_image_size
from everlora.backbones.pooling import POOLINGS
from everlora.backbones.source import resolve_source
from everlora.errors import OptionError, UnsupportedError, nearest

__all__ = ["feature_depth", "load_backbone"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NORMALISATIONS = ("processor", "unit")
_KINDS = ("encoder", "causal_lm")


def load_backbone(
    source: str | Path,
    *,
    pooling: str = "auto",
    normalize: str = "processor",
    dtype: str = "float32",
    max_length: int | None = None,
    image_size: int | None = None,
    feature_layers: int = 1,
    trust_remote_code: bool = False,
    kind: str = "encoder",
    quantization: str = "none",
    template: str = "auto",
    train_on_inputs: bool = False,
    block_size: int | None = None,
) -> Backbone:
    """Load a pretrained network, frozen and in evaluation mode.

    Args:
        source: a local folder, a hub id, `"packaged"`, or `"package:<python package>/<folder>"`.
        pooling: `"auto"` (by architecture), `"cls"`, `"mean"`, `"pooler"` or `"cls_mean"`.
        normalize: `"processor"` for the normalisation the model was trained with, `"unit"` for pixels in [0, 1].
        dtype: `"float32"` or `"bfloat16"`, of the weights; features are always float32.
        max_length: texts only: longest row in tokens; by default what the model was trained with.
        image_size: images only: side in pixels; by default what the model was trained with. Position embeddings
            are interpolated where the model can.
        feature_layers: encoders only: how many of the last layers to pool; their vectors stand side by side.
        trust_remote_code: must stay `False`: code that comes with weights is never run.
        kind: `"encoder"`, or `"causal_lm"` for a language model with its output layer; the next four are for these.
        quantization: `"none"`, `"4bit"` or `"8bit"` weights.
        template: how instructions become a prompt, see `everlora.backbones.LanguageInputs`.
        train_on_inputs: learn prompts, too, and not answers only.
        block_size: tokens of the blocks that plain text is cut into; the longest row by default.

    Returns:
        The backbone; `default_targets`, `feature_dim`, `encode`, `collate`, `features` are the parts to use.

    Raises:
        ModelError: nothing is found under that name, or it cannot be loaded.
        OptionError: an option is unknown or does not fit the model.
        UnsupportedError: `trust_remote_code` is set.
    """
    if trust_remote_code:
        raise UnsupportedError("code that comes with weights is not run; convert the model to a class of transformers")
    if pooling != "auto" and pooling not in POOLINGS:
        raise OptionError(f"unknown pooling {pooling!r}; {nearest(str(pooling), ('auto', *POOLINGS))}")
    if normalize not in _NORMALISATIONS:
        raise OptionError(f"unknown normalize {normalize!r}; {nearest(str(normalize), _NORMALISATIONS)}")
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; {nearest(str(dtype), _DTYPES)}")
    if image_size is not None:
        check_image_size(image_size)
    if kind not in _KINDS:
        raise OptionError(f"unknown kind {kind!r}; {nearest(kind, _KINDS)}")
    folder = resolve_source(source)
    if kind == "causal_lm":
        if (image_size, pooling, normalize, feature_layers) != (None, "auto", "processor", 1):
            raise OptionError(
                "a language model takes no image_size, pooling, feature_layers or normalize; leave them out"
            )
        return load_causal_lm(
            folder,
            source=str(source),
            dtype=_DTYPES[dtype],
            quantization=quantization,
            max_length=max_length,
            template=template,
            train_on_inputs=train_on_inputs,
            block_size=block_size,
        )
    if (quantization, template, train_on_inputs, block_size) != ("none", "auto", False, None):
        raise OptionError(
            "quantization, template, train_on_inputs and block_size are for language models (scenario language); leave "
            "them out"
        )
    normalise = normalize == "processor"
    if is_cifar_resnet(folder):
        if (max_length, image_size, feature_layers) != (None, None, 1) or pooling not in ("auto", "mean"):
            raise OptionError(
                f"a CIFAR residual network takes no max_length, image_size, pooling or feature_layers; drop them for "
                f"{source}"
            )
        return load_cifar_resnet(folder, source=str(source), dtype=_DTYPES[dtype], normalise=normalise)
    return load_huggingface(
        folder,
        source=str(source),
        pooling=pooling,
        normalise=normalise,
        dtype=_DTYPES[dtype],
        max_length=max_length,
        image_size=image_size,
        feature_layers=feature_layers,
    )


def feature_depth(source: str | Path, pooling: str = "auto") -> int:
    """How many of an encoder's last layers `feature_layers` can take, from its config alone.

    Returns:
        1 where the layers differ in width, or the pooling reads only the last.

    Raises:
        ModelError: nothing is found under that name, or it cannot be read.
    """
    folder = resolve_source(source)
    return 1 if is_cifar_resnet(folder) else depth_of(folder, pooling)
