"""The interface of a backbone: any pretrained network as `features(batch) -> (n, feature_dim)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from everlora.backbones.fingerprint import fingerprint_of, tokenizer_text
from everlora.backbones.images import Augment, ImageInputs
from everlora.backbones.inputs import Encoded, EncodedTexts, Rows
from everlora.backbones.texts import TextInputs
from everlora.errors import TargetError, UnsupportedError

if TYPE_CHECKING:
    from everlora.backbones.language_inputs import LanguageInputs
    from everlora.backbones.tokens import EncodedTokens

__all__ = ["Backbone", "Modality"]

Modality = Literal["image", "text", "language"]


class Backbone(nn.Module, ABC):
    """A frozen pretrained network, its input pipeline and its pooling.

    Args:
        model: the network; every parameter is frozen and the network put in evaluation mode.
        inputs: encodes and collates the data of its modality.
        source: what the user named, e.g. a folder or a hub id.
        folder: where the weights lie.
        architecture: short name such as `"vit"`, `"bert"`, `"cifar_resnet"`.
        feature_dim: width of the features.
        pooling: how token features become one vector, see `everlora.backbones.pooling`.
        feature_layers: how many of the last layers are pooled, side by side.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ImageInputs | TextInputs | LanguageInputs,
        *,
        source: str,
        folder: Path,
        architecture: str,
        feature_dim: int,
        pooling: str,
        feature_layers: int = 1,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.inputs = inputs
        self.source = source
        self.folder = folder
        self.architecture = architecture
        self.feature_dim = feature_dim
        self.pooling = pooling
        self.feature_layers = feature_layers
        # Counted now: later the network may hold adapters, which are not pretrained.
        self._num_parameters = self._count_parameters()
        self.eval()

    @property
    def modality(self) -> Modality:
        """`"image"`, `"text"` or, for causal language models, `"language"`."""
        return "image" if isinstance(self.inputs, ImageInputs) else "text"

    @property
    def inputs_fingerprint(self) -> str:
        """Sha256 over what turns rows into features beside the network: tokenizer or image steps, and pooling."""
        pooling = self.pooling if self.feature_layers == 1 else f"{self.pooling} of {self.feature_layers} layers"
        if isinstance(self.inputs, ImageInputs):
            return fingerprint_of(repr(self.inputs.transform), pooling)
        return fingerprint_of(str(self.inputs.max_length), tokenizer_text(self.inputs.tokenizer), pooling)

    @property
    def output_head(self) -> nn.Module | None:
        """The output layer of a causal language model; `None` for an encoder, whose classifier a method adds."""
        return None

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks of a causal language model; raises UnsupportedError for others."""
        raise UnsupportedError(f"{self.architecture} gives one vector a row, and no hidden states by layer")

    def hidden_states(self, batch: dict[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Hidden states of a causal language model; raises UnsupportedError for others."""
        raise UnsupportedError(f"{self.architecture} gives one vector a row, and no hidden states by layer")

    @property
    def image_size(self) -> int | None:
        """Side of the images the network sees, in pixels; `None` for texts."""
        return self.inputs.transform.size if isinstance(self.inputs, ImageInputs) else None

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens; `None` for images."""
        return self.inputs.max_length if isinstance(self.inputs, TextInputs) else None

    @property
    def num_parameters(self) -> int:
        """Number of pretrained parameters that the features depend on, shared ones counted once."""
        return self._num_parameters

    def _count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Device of the network, where batches are built."""
        return next(self.model.parameters()).device

    @property
    @abstractmethod
    def default_targets(self) -> tuple[str, ...]:
        """Name patterns of the layers to adapt by default.

        Raises:
            TargetError: the network has no layers known as keys and values; the message names what it has.
        """

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        """Name patterns of the projections of the attention with the given roles: `query`, `key`, `value`.

        Raises:
            TargetError: the network has no such layers; the message names what it has.
        """
        raise TargetError(
            f"expected an attention with {' and '.join(roles)} projections, found none in {self.architecture}; name "
            "the layers to adapt with targets"
        )

    @abstractmethod
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute pooled features.

        Args:
            batch: what `collate` returned, on the device of the network; other entries are ignored.

        Returns:
            `(n, feature_dim)` float32, also under autocast and for bfloat16 weights.
        """

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of all layers but batch norms: whatever trains beside a frozen network, its statistics stay.

        A method that wants the statistics of a batch norm to move sets that layer's mode itself, after this.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Same as `features`."""
        return self.features(batch)

    def encode(self, inputs: Any, ids: Any = None) -> Encoded | EncodedTokens:
        """Read a data set once: texts become token ids, images stay the uint8 array they are.

        Args:
            inputs: `(n, height, width, 3)` uint8 array, or a sequence of `n` texts.
            ids: `(n,)` stable ids of the rows; row numbers when omitted. `collate` hands them to the augmentation.

        Raises:
            DataError: the inputs are of another kind.
        """
        return self.inputs.encode(inputs, ids)

    def collate(self, encoded: Any, indices: Rows, *, augment: Augment | None = None) -> dict[str, Tensor]:
        """Build the batch of the given rows on the device of the network.

        Args:
            encoded: what `encode` returned.
            indices: row numbers.
            augment: images only; called with `(m, 3, height, width)` float32 pixels in [0, 1] at native size and the
                `(m,)` int64 ids, returns pixels in [0, 1] of any size.

        Returns:
            `pixel_values`, or `input_ids`, `attention_mask` and, where the model has them, `token_type_ids`.
        """
        return self.inputs.collate(encoded, indices, device=self.device, augment=augment)

    def lengths(self, encoded: Any) -> np.ndarray[Any, Any] | None:
        """Tokens of each row, `(n,)` int64, for bucketing; `None` for images."""
        return encoded.lengths if isinstance(encoded, EncodedTexts) else None

    def token_mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Which tokens are real and not padding, `(n, tokens)` bool; `None` for images, where all are."""
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()
