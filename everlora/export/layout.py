"""What a kind of network must know to be exported: how it is written, loaded by plain tools, and explained."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everlora.backbones.base import Backbone
from everlora.errors import ShapeError, UnsupportedError
from everlora.export.head import ExportHead

__all__ = ["ClassifierLayout", "Layout", "load_fitting", "row_lines"]

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Layout(ABC):
    """One network as other tools will hold it.

    Attributes:
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
    """

    base: str | None

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The network, with the adapted layers in place."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights."""

    @property
    @abstractmethod
    def model_class(self) -> str:
        """Class that loads the weights."""

    @property
    @abstractmethod
    def has_classifier(self) -> bool:
        """Whether that class computes the logits itself; else a head lies beside."""

    @property
    def base_class(self) -> tuple[str, str] | str | None:
        """How PEFT's `AutoPeftModel` finds the base's class, where it can; see `everlora.peft_format.lora_config`."""
        return None

    @property
    def unread(self) -> tuple[str, ...]:
        """What the names of tensors begin with that the logits do not depend on, and that may differ."""
        return ()

    @property
    @abstractmethod
    def library(self) -> str:
        """Name of the library that the class of a merged model belongs to."""

    @property
    @abstractmethod
    def made_with(self) -> str:
        """Library and version on which names of layers depend."""

    @property
    @abstractmethod
    def pipeline_tag(self) -> str:
        """What such a model does, in the words of model cards."""

    @property
    def tolerance(self) -> float:
        """Largest relative difference of a logit that rounding explains; beyond it the export is refused."""
        return _TOLERANCE[self.dtype]

    @abstractmethod
    def summary(self) -> str:
        """One sentence on what was written."""

    @abstractmethod
    def requirements(self) -> str:
        """One sentence on what the code needs."""

    @abstractmethod
    def code(self) -> str:
        """Complete program: loads the export from the current folder, defines what computes, and calls it once."""

    def pipeline_code(self) -> str | None:
        """Same through a ready-made pipeline, continuing the program of `code`; None where there is no such thing."""
        return None

    def facts(self) -> list[tuple[str, Any]]:
        """Rows of the model card's table that only this kind of network has."""
        return []

    def sections(self) -> list[str]:
        """Parts of the model card, in Markdown, that stand after the code."""
        return []

    def check(self) -> None:  # noqa: B027 - optional hook
        """Refuse, before anything is written, parts that do not fit each other."""

    def check_saved(self, modules: Sequence[str]) -> None:  # noqa: B027 - optional hook
        """Refuse an adapter that holds whole modules, where tools for such models cannot use one.

        Args:
            modules: their names; none for an adapter of factors alone.
        """

    @abstractmethod
    def write_model(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the merged model.

        Args:
            folder: of the export.
            state: of the plain network, see `everlora.export.plain.merged_state`.

        Raises:
            UnsupportedError: the state is not that of a plain network of this kind.
        """

    @abstractmethod
    def write_inputs(self, folder: Path) -> None:
        """Write what turns images or texts into the model's inputs, and what else the code reads."""

    @abstractmethod
    def load(self, place: Path) -> Any:
        """Load a plain network the way the code does, on the CPU: the base, or the merged model of a folder."""

    @abstractmethod
    def probe(self, rows: Any = None) -> dict[str, Tensor]:
        """Batch on which learner and export are compared, on the learner's device.

        Args:
            rows: to make it of; a few made-up ones when omitted.
        """

    @abstractmethod
    def expected(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits that the learner gives, a row for each thing it predicts."""

    @abstractmethod
    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The same of a loaded model, with the head that lies beside it where there is one."""


class ClassifierLayout(Layout):
    """An encoder with its classifier.

    Attributes:
        head: the classifier.
    """

    head: ExportHead

    @property
    def pipeline_tag(self) -> str:
        """Classification of what the encoder reads."""
        return "image-classification" if self.backbone.modality == "image" else "text-classification"

    def summary(self) -> str:
        """One sentence on what was written."""
        if self.base is not None:
            return "A LoRA adapter for PEFT, with its classifier beside it in `head.safetensors` and `head.json`."
        return self.merged_summary()

    @abstractmethod
    def merged_summary(self) -> str:
        """One sentence on what a merged model is."""

    def facts(self) -> list[tuple[str, Any]]:
        """Pooling and number of classes."""
        layers = self.backbone.feature_layers
        pooling = self.backbone.pooling + (f", of the last {layers} layers" if layers > 1 else "")
        return [("Pooling", pooling), ("Classes", len(self.head.classes))]

    def sections(self) -> list[str]:
        """The labels, as JSON strings, so that no label can break out of the block or span lines."""
        labels = (json.dumps(label, ensure_ascii=False).replace("`", "\\u0060") for label in self.head.classes)
        return ["## Labels", "\n".join(["```text", *labels, "```"])]

    def check(self) -> None:
        """Check that the head fits the features.

        Raises:
            ShapeError: it does not.
        """
        if self.head.num_features != self.backbone.feature_dim:
            raise ShapeError(
                f"expected a head for {self.backbone.feature_dim} features, found one for {self.head.num_features}; "
                "pass the head that was trained on this model"
            )

    def write_inputs(self, folder: Path) -> None:
        """Write what turns images or texts into the model's inputs, and the head where it lies beside."""
        self.write_reader(folder)
        if not self.has_classifier:
            self.head.save(folder)

    @abstractmethod
    def write_reader(self, folder: Path) -> None:
        """Write what turns images or texts into the model's inputs, and what else the code reads."""

    def probe(self, rows: Any = None) -> dict[str, Tensor]:
        """Batch of images or texts."""
        encoded = self.backbone.encode(self._made_up_rows() if rows is None else rows)
        return self.backbone.collate(encoded, np.arange(len(encoded)))

    def expected(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits `(n, classes)` that the learner gives."""
        return self.head.logits(self.backbone.features(batch))

    def _made_up_rows(self) -> Any:
        if self.backbone.modality == "text":
            return ["a", "where is my parcel?", *self.head.classes[:6]]
        size = self.backbone.image_size or 64
        return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)


def load_fitting(model: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Put the state of a live network into a plain one.

    Args:
        model: the plain one.
        state: of the live one.
        assign: give it these very tensors instead of copies, for a model that was made on the meta device.

    Raises:
        UnsupportedError: the live network has other tensors than the plain one.
    """
    wanted = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    given = {name for name in state if not name.endswith("num_batches_tracked")}
    if wanted != given:
        raise UnsupportedError(
            f"a plain {type(model).__name__} cannot hold this network: {len(wanted ^ given)} tensors are extra or "
            f"missing, first '{min(wanted ^ given)}'; predict with the learner itself"
        )
    model.load_state_dict(state, assign=assign)


def row_lines(head: ExportHead) -> list[str]:
    """Body of the function that scores `features` with the head lying beside, as lines of code."""
    lines = ["    features = torch.nn.functional.normalize(features, dim=1)"] if head.normalize else []
    if head.projection is not None:
        lines += ['    features = torch.relu(features @ head["projection"].T)  # random features']
    product = 'features @ head["weight"].T + head["bias"]'
    if head.has_single_rows:
        return [*lines, f"    return {product}"]
    return [
        *lines,
        f"    rows = {product}",
        '    owner = torch.tensor(info["row_classes"])  # a class may own several rows: its best one counts',
        "    return torch.stack([rows[:, owner == i].amax(dim=1) for i in range(len(classes))], dim=1)",
    ]
