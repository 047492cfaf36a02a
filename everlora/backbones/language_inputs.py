"""From instruction, chat and plain-text rows to padded batches of a causal language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everlora.backbones.batches import IGNORED, LinesOfRows, padded, width_of
from everlora.backbones.images import Augment
from everlora.backbones.inputs import Encoded, Rows, as_rows
from everlora.backbones.language_rows import RowEncoder
from everlora.backbones.templates import find_template
from everlora.backbones.tokens import EncodedTokens
from everlora.errors import DataError, OptionError
from everlora.streams.dialogue_rows import parse_row

__all__ = ["LanguageInputs"]

logger = logging.getLogger("everlora.backbones")
Ids = NDArray[np.int64]


class LanguageInputs:
    """Tokenises each row once and pads each batch to its own longest row.

    A row of prompt and answer becomes `[bos] + prompt + answer + [eos]`, prompt and answer tokenised apart, so that a
    prompt has the same tokens in training and in generation. Answer and eos are supervised. The plain texts of one
    call of `encode` become one stream of `[bos] + text + [eos]`, cut into blocks; all of it is supervised but bos and
    the first token of each block. A token the tokenizer does not have (bos, eos) is left out.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest row in tokens. A longer one loses the beginning of its prompt (bos stays), then eos and
            the end of its answer.
        vocab_size: rows of the model's embedding, which is never resized.
        template: how prompts are written, see `everlora.backbones.templates.find_template`.
        train_on_inputs: supervise the prompts too.
        block_size: tokens of a block of plain text, default `max_length`.

    Attributes:
        bos: id of the token that starts a row, or None.
        eos: id of the token that ends one, or None.
        pad: id that fills up batches: the tokenizer's, else eos, else 0. Masks come from lengths, never from this id.

    Raises:
        OptionError: a length or the template is not usable.
        ModelError: the tokenizer's bos or eos lies outside the model's vocabulary.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        vocab_size: int,
        template: str = "auto",
        train_on_inputs: bool = False,
        block_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = _whole_number("max_length", max_length, 2, None)
        self.block_size = max_length if block_size is None else _whole_number("block_size", block_size, 2, max_length)
        self.vocab_size = vocab_size
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        # Tokenizers are often given a pad token that the embedding has no row for.
        self.pad = int(pad) if pad is not None and pad < vocab_size else int(self.eos or 0)
        self._rows = RowEncoder(
            tokenizer,
            find_template(tokenizer, template),
            bos=() if self.bos is None else (self.bos,),
            eos=() if self.eos is None else (self.eos,),
            max_length=self.max_length,
            block_size=self.block_size,
            vocab_size=vocab_size,
            train_on_inputs=train_on_inputs,
        )
        self._rows.check_ids([*self._rows.bos, *self._rows.eos])

    @property
    def template_text(self) -> str:
        """What identifies the template: the chat template, or the text given, or everlora's own."""
        return self._rows.template.text

    @property
    def train_on_inputs(self) -> bool:
        """Whether prompts are supervised."""
        return self._rows.train_on_inputs

    def encode(self, inputs: Sequence[str], ids: Any = None) -> EncodedTokens:
        """Tokenise rows; those cut short or dropped are counted and reported in the log.

        Args:
            inputs: rows as `everlora.streams.load_dialogues` makes them.
            ids: `(n,)` stable ids of the rows, default 0 to n - 1. Blocks of plain text are numbered from 0, or from
                past the largest id of the other rows where a call has both kinds.

        Returns:
            The rows of prompt and answer, in order, and after them the blocks.

        Raises:
            DataError: a row is broken or has no answer, or the ids do not fit.
            ModelError: the tokenizer gives ids outside the model's vocabulary.
        """
        rows = _parsed(inputs)
        row_ids = np.arange(len(rows), dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        if row_ids.shape != (len(rows),):
            raise DataError(f"expected {len(rows)} row ids, found shape {row_ids.shape}; pass one id for each row")
        places = [place for place, row in enumerate(rows) if "text" not in row]
        encoded = self._rows.pairs(rows, row_ids, places)
        if len(places) < len(rows):
            first_id = int(row_ids[places].max(initial=-1)) + 1
            encoded = encoded.join(self._rows.blocks([row["text"] for row in rows if "text" in row], first_id))
        if encoded.num_truncated:
            logger.warning(
                "%d of %d rows are longer than %d tokens and lose the beginning of their prompt or the end of their "
                "answer",
                encoded.num_truncated,
                len(rows),
                self.max_length,
            )
        if encoded.num_dropped:
            logger.warning("%d of %d rows hold nothing to learn and are dropped", encoded.num_dropped, len(rows))
        return encoded

    def fit(self, encoded: EncodedTokens) -> EncodedTokens:
        """Cut rows that were encoded for a longer `max_length`; they are counted and reported in the log.

        Args:
            encoded: rows of this tokenizer.

        Returns:
            The rows, unchanged where they fit. The bytes of a shortened answer are those its tokens decode to.
        """
        too_long = int((encoded.lengths > self.max_length).sum())
        if not too_long:
            return encoded
        logger.warning("%d of %d rows are longer than %d tokens and are cut", too_long, len(encoded), self.max_length)
        shortened = self._rows.shortened(encoded, lambda ids: len(self.decode(ids).encode("utf-8")))
        return replace(shortened, num_truncated=encoded.num_truncated + too_long, num_dropped=encoded.num_dropped)

    def encode_prompts(self, inputs: Sequence[str], *, reserve: int = 0) -> list[list[int]]:
        """Return bos and prompt of each row, as in training, and nothing of its answer; a plain text is a prompt.

        Args:
            inputs: rows, with or without answers.
            reserve: tokens of `max_length` to leave free for the answer.

        Returns:
            Token ids per row; prompts that are too long lose their beginning, bos stays.

        Raises:
            DataError: a row is broken.
            OptionError: `reserve` leaves no room for a prompt.
        """
        return self._rows.prompts(_parsed(inputs), _whole_number("reserve", reserve, 0, self.max_length - 2))

    def collate(
        self,
        encoded: EncodedTokens | Encoded,
        rows: Rows,
        *,
        device: torch.device,
        augment: Augment | None = None,
        pack: bool = False,
    ) -> dict[str, Tensor]:
        """Build the batch of the given rows, padded on the right.

        Args:
            encoded: what `encode` returned.
            rows: row numbers.
            device: where the batch goes; on CUDA its width is a multiple of 8.
            augment: must be None.
            pack: lay the rows end to end in lines of at most `max_length` tokens.

        Returns:
            `input_ids`, `attention_mask` and `labels`, all `(n, T)` int64; labels are not shifted and -100 at bos,
            prompt and padding. Packed, also `position_ids` `(lines, T)`, which restart with each row, and `segments`
            `(lines, T)`: 0 for padding, else the number of the row in its line, from 1.

        Raises:
            DataError: `encoded` holds other data.
            OptionError: an augmentation was given, which texts do not have.
        """
        if not isinstance(encoded, EncodedTokens):
            raise DataError(
                f"expected encoded rows of a language model, found {type(encoded).__name__}; use data of the modality "
                "of the model"
            )
        if augment is not None:
            raise OptionError("expected no augmentation for texts, found one; set augment to none")
        index = as_rows(rows)
        parts = [encoded.row(row).astype(np.int64) for row in index.tolist()]
        prompts = encoded.prompt_lengths[index].tolist()
        labels = [self._labels(part, prompt) for part, prompt in zip(parts, prompts, strict=True)]
        lines = LinesOfRows.fill([len(part) for part in parts], self.max_length if pack else None)
        width = width_of(lines.longest, self.max_length, device)
        batch = {
            "input_ids": lines.lay(parts, width, self.pad),
            "attention_mask": lines.lay([np.ones_like(part) for part in parts], width, 0),
            "labels": lines.lay(labels, width, IGNORED),
        }
        if pack:
            batch["position_ids"] = lines.lay([np.arange(len(part)) for part in parts], width, 0)
            batch["segments"] = lines.segments(width)
        return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}

    def collate_prompts(self, prompts: Sequence[Sequence[int]], *, device: torch.device) -> dict[str, Tensor]:
        """Build a batch for generation, padded on the left.

        Returns:
            `input_ids`, `attention_mask` and `position_ids` (0 for the first real token), all `(n, T)` int64.
        """
        width = width_of(max((len(prompt) for prompt in prompts), default=0), self.max_length, device)
        input_ids = padded([np.asarray(prompt, dtype=np.int64) for prompt in prompts], width, self.pad, left=True)
        mask = padded([np.ones(len(prompt), dtype=np.int64) for prompt in prompts], width, 0, left=True)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        batch = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}

    def decode(self, ids: Iterable[int] | Tensor | NDArray[Any]) -> str:
        """Return the text of token ids, special tokens left out."""
        values = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else [int(token) for token in ids]
        text: str = self.tokenizer.decode(values, skip_special_tokens=True)
        return text

    def _labels(self, tokens: Ids, num_prompt: int) -> Ids:
        labels = tokens.copy()
        labels[:num_prompt] = IGNORED
        if self.bos is not None:
            starts = tokens == self.bos  # of the later texts within a block
            if self.bos == self.eos:
                starts[1:] &= tokens[:-1] == self.eos
            labels[starts] = IGNORED
        return labels


def _parsed(inputs: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for place, text in enumerate([inputs] if isinstance(inputs, str) else inputs):
        try:
            rows.append(parse_row(text))
        except DataError as error:
            raise DataError(f"row {place + 1}: {error}") from error
    return rows


def _whole_number(name: str, value: Any, least: int, most: int | None) -> int:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"between {least} and {most}"
        raise OptionError(f"expected {name} as a whole number, {limits}, found {value!r}")
    return int(value)
