"""From texts to padded token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everlora.backbones.images import Augment
from everlora.backbones.inputs import Encoded, EncodedTexts, Rows, as_rows
from everlora.errors import DataError, OptionError

__all__ = ["TextInputs"]

logger = logging.getLogger("everlora.backbones")


class TextInputs:
    """Tokenises each text once and pads each batch to its own longest row.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest row in tokens, special tokens included; longer texts lose their end.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        num_special = tokenizer.num_special_tokens_to_add()
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= num_special:
            raise OptionError(
                f"expected max_length as a whole number above {num_special}, the special tokens of the tokenizer, "
                f"found {max_length!r}"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        self.uses_token_types = "token_type_ids" in tokenizer.model_input_names

    def encode(self, inputs: Sequence[str], ids: Any = None) -> EncodedTexts:
        """Tokenise texts; those longer than `max_length` are cut, counted and reported in the log.

        Raises:
            DataError: `inputs` is not a list of strings, or the ids do not fit.
        """
        texts = list(inputs) if not isinstance(inputs, str) else [inputs]
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"expected text in row {row}, found {type(text).__name__}; convert the column to text")
        row_ids = np.arange(len(texts), dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        if row_ids.shape != (len(texts),):
            raise DataError(f"expected {len(texts)} row ids, found shape {row_ids.shape}; pass one id for each text")
        tokens: list[list[int]] = self._tokenise(texts, truncation=True, max_length=self.max_length) if texts else []
        num_truncated = self._count_truncated(texts, tokens)
        if num_truncated:
            logger.warning(
                "%d of %d texts are longer than %d tokens and lose their end",
                num_truncated,
                len(texts),
                self.max_length,
            )
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in tokens], out=offsets[1:])
        flat = np.fromiter((token for row in tokens for token in row), dtype=np.int32, count=int(offsets[-1]))
        return EncodedTexts(token_ids=flat, offsets=offsets, ids=row_ids, num_truncated=num_truncated)

    def _tokenise(self, texts: list[str], **options: Any) -> list[list[int]]:
        rows = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
        result: list[list[int]] = rows["input_ids"]
        return result

    def _count_truncated(self, texts: list[str], tokens: list[list[int]]) -> int:
        # Only rows that fill the whole length can have lost anything: tokenise just those again, uncut.
        full = [text for text, row in zip(texts, tokens, strict=True) if len(row) >= self.max_length]
        if not full:
            return 0
        return sum(len(row) > self.max_length for row in self._tokenise(full, truncation=False))

    def collate(
        self, encoded: Encoded, rows: Rows, *, device: torch.device, augment: Augment | None
    ) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, `(m, longest)` int64, for the given rows, on `device`.

        `token_type_ids`, all zero as each row is one segment, are added for models that have them.

        Raises:
            DataError: `encoded` holds images.
            OptionError: an augmentation was given, which texts do not have.
        """
        if not isinstance(encoded, EncodedTexts):
            raise DataError("expected encoded texts, found encoded images; use data of the modality of the model")
        if augment is not None:
            raise OptionError("expected no augmentation for texts, found one; set augment to none")
        parts = [encoded.row(int(index)) for index in as_rows(rows)]
        longest = max((len(part) for part in parts), default=0)
        input_ids = np.full((len(parts), longest), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(parts), longest), dtype=np.int64)
        for row, part in enumerate(parts):
            input_ids[row, : len(part)] = part
            attention_mask[row, : len(part)] = 1
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
        if self.uses_token_types:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return {name: tensor.to(device) for name, tensor in batch.items()}
