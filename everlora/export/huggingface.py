"""Exports of models of transformers: one model of its own class, or an adapter for the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from everlora.backbones.huggingface import HuggingFaceBackbone
from everlora.backbones.images import ImageInputs
from everlora.backbones.pooling import pool
from everlora.export.classifiers import build_classifier, build_encoder, classifier_for, takes_pooler
from everlora.export.folder import write_json
from everlora.export.head import ExportHead
from everlora.export.layout import ClassifierLayout
from everlora.export.snippet import Snippet

__all__ = ["HuggingFaceLayout"]

_BATCH_KEYS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class HuggingFaceLayout(ClassifierLayout):
    """A model of transformers; see `Layout`.

    Attributes:
        encoder: the backbone.
        head: the classifier.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
    """

    encoder: HuggingFaceBackbone
    head: ExportHead
    base: str | None = None

    @cached_property
    def snippet(self) -> Snippet:
        """The code that loads the export."""
        classifier = classifier_for(self.encoder, self.head) if self.base is None else None
        return Snippet(self.encoder, self.head, classifier=classifier, base=self.base)

    @property
    def backbone(self) -> HuggingFaceBackbone:
        """The encoder, with the adapted layers in place."""
        return self.encoder

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights."""
        return self.encoder.dtype

    @property
    def model_class(self) -> str:
        """Class of transformers that loads the weights."""
        return self.snippet.model_class

    @property
    def has_classifier(self) -> bool:
        """Whether that class computes the logits itself; else the head lies beside."""
        return self.snippet.classifier is not None

    @property
    def base_class(self) -> tuple[str, str]:
        """Name and module of the base model's class."""
        kind = type(self.encoder.model)
        return kind.__name__, kind.__module__

    @property
    def unread(self) -> tuple[str, ...]:
        """The pooler, which some classes have even where its weights are not stored, unless it gives the features."""
        return () if self.encoder.pooling == "pooler" else ("pooler.",)

    @property
    def library(self) -> str:
        """The library of a merged model's class."""
        return "transformers"

    @property
    def made_with(self) -> str:
        """The major version, between which names of layers differ."""
        return f"transformers {transformers.__version__.split('.')[0]}"

    def merged_summary(self) -> str:
        """One sentence on what a merged model is."""
        if self.has_classifier:
            return f"Encoder and classifier in one `{self.model_class}`, the adapters merged into the weights."
        return (
            f"A plain `{self.model_class}` with the adapters merged into its weights; the classifier lies beside it in "
            "`head.safetensors` and `head.json`."
        )

    def requirements(self) -> str:
        """One sentence on what the code needs."""
        names = f"{self.made_with} (names of layers differ between major versions)"
        extra = " and peft" if self.base is not None else ""
        return f"Needs torch, {names}{extra}; run it in this folder."

    def code(self) -> str:
        """The program of the README."""
        return self.snippet.code()

    def pipeline_code(self) -> str | None:
        """Its continuation through a pipeline, where the class computes the logits itself."""
        return self.snippet.pipeline_code() if self.has_classifier else None

    def write_model(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the merged model the way transformers does."""
        build = build_classifier if self.has_classifier else build_encoder
        build(self.encoder, self.head, state).save_pretrained(folder)

    def write_reader(self, folder: Path) -> None:
        """Write the image processor or the tokenizer."""
        inputs = self.encoder.inputs
        if isinstance(inputs, ImageInputs):
            write_json(folder / "preprocessor_config.json", inputs.transform.processor_config())
        else:
            inputs.tokenizer.save_pretrained(folder)

    def load(self, place: Path) -> Any:
        """Load the base, or the merged model of a folder."""
        options: dict[str, Any] = {"dtype": self.encoder.dtype, "local_files_only": True}
        if not self.has_classifier and takes_pooler(self.encoder.model):
            options["add_pooling_layer"] = self.encoder.pooling == "pooler"
        with torch.random.fork_rng(devices=[]):
            return getattr(transformers, self.model_class).from_pretrained(place, **options)

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `(n, classes)` of a loaded model."""
        arguments: dict[str, Any] = {key: value for key, value in batch.items() if key in _BATCH_KEYS}
        if "pixel_values" in arguments:
            arguments["pixel_values"] = arguments["pixel_values"].to(self.dtype)
        if self.encoder.interpolate:
            arguments["interpolate_pos_encoding"] = True
        if self.encoder.feature_layers > 1:
            arguments["output_hidden_states"] = True
        output = model(**arguments)
        if self.has_classifier:
            return output.logits  # type: ignore[no-any-return]
        mask = batch.get("attention_mask")
        layers = self.encoder.feature_layers
        features = pool(output, self.encoder.pooling, mask=mask, num_prefix=self.encoder.num_prefix, layers=layers)
        return self.head.logits(features)
