"""Pretrained networks: encoders of Hugging Face and CIFAR ResNets as `features(batch)`, and causal language models."""

from everlora.backbones.base import Backbone, Modality
from everlora.backbones.causal_lm import fingerprint_of_inputs
from everlora.backbones.fingerprint import model_fingerprint
from everlora.backbones.inputs import Encoded, EncodedImages, EncodedTexts
from everlora.backbones.load import feature_depth, load_backbone
from everlora.backbones.source import resolve_source

__all__ = [
    "Backbone",
    "Encoded",
    "EncodedImages",
    "EncodedTexts",
    "Modality",
    "feature_depth",
    "fingerprint_of_inputs",
    "load_backbone",
    "model_fingerprint",
    "resolve_source",
]
