"""What a kind of network must know to be exported: how it is written, loaded by plain tools, and explained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everlora.backbones.base import Backbone
from everlora.errors import UnsupportedError
from everlora.export.head import ExportHead

__all__ = ["Layout", "load_fitting", "row_lines"]


class Layout(ABC):
    """One network with its head, as other tools will hold it.

    Attributes:
        head: the classifier.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
    """

    head: ExportHead
    base: str | None

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The encoder, with the adapted layers in place."""

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
        """Whether that class computes the logits itself; else the head lies beside."""

    @property
    def base_class(self) -> tuple[str, str] | None:
        """Name and module of the base model's class, where that class can find and load it."""
        return None

    @property
    def unread(self) -> tuple[str, ...]:
        """What the names of tensors begin with that the features do not depend on, and that may differ."""
        return ()

    @property
    @abstractmethod
    def library(self) -> str:
        """Name of the library that the class of a merged model belongs to."""

    @property
    @abstractmethod
    def made_with(self) -> str:
        """Library and version on which names of layers depend."""

    @abstractmethod
    def summary(self) -> str:
        """One sentence on what a merged model is."""

    @abstractmethod
    def requirements(self) -> str:
        """One sentence on what the code needs."""

    @abstractmethod
    def code(self) -> str:
        """Complete program: loads the export from the current folder, defines `score`, and calls it once."""

    def pipeline_code(self) -> str | None:
        """Same through a ready-made pipeline, continuing the program of `code`; None where there is no such thing."""
        return None

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
    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `(n, classes)` of a loaded model, with the head that lies beside it where there is one."""


def load_fitting(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the state of a live network into a plain one.

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
    model.load_state_dict(state)


def row_lines(head: ExportHead) -> list[str]:
    """Body of the function that scores `features` with the head lying beside, as lines of code."""
    lines = ["    features = torch.nn.functional.normalize(features, dim=1)"] if head.normalize else []
    product = 'features @ head["weight"].T + head["bias"]'
    if head.has_single_rows:
        return [*lines, f"    return {product}"]
    return [
        *lines,
        f"    rows = {product}",
        '    owner = torch.tensor(info["row_classes"])  # a class may own several rows: its best one counts',
        "    return torch.stack([rows[:, owner == i].amax(dim=1) for i in range(len(classes))], dim=1)",
    ]
