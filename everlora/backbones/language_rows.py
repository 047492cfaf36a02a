"""From parsed rows to token ids: prompt and answer, or blocks of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everlora.backbones.templates import PromptTemplate, answer_of
from everlora.backbones.tokenised import TokenisedText, tokenise
from everlora.backbones.tokens import EncodedTokens, token_dtype
from everlora.errors import DataError, ModelError

__all__ = ["RowEncoder"]

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RowEncoder:
    """The rules by which rows become token ids; see `everlora.backbones.language_inputs.LanguageInputs`.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: how prompts are written.
        bos: ids that start a row: one, or none.
        eos: ids that end one: one, or none.
        max_length: longest row in tokens.
        block_size: tokens of a block of plain text.
        vocab_size: ids the model knows.
        train_on_inputs: whether prompts are supervised.
    """

    tokenizer: Any
    template: PromptTemplate
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    max_length: int
    block_size: int
    vocab_size: int
    train_on_inputs: bool

    def pairs(self, rows: Sequence[Mapping[str, Any]], ids: Ids, places: Sequence[int]) -> EncodedTokens:
        """Encode rows of prompt and answer.

        Args:
            rows: all rows of a call.
            ids: `(n,)` their ids.
            places: which of them have a prompt and an answer.
        """
        prompts = [self.prompt(rows[place], place) for place in places]
        answers = [self._answer(rows[place], place) for place in places]
        kept, parts, num_prompt, num_bytes, num_truncated = [], [], [], [], 0
        texts = zip(tokenise(self.tokenizer, prompts), tokenise(self.tokenizer, answers), strict=True)
        for place, (prompt, answer) in zip(places, texts, strict=True):
            prompt = self._without_bos(prompt)
            whole = np.concatenate([answer.ids, self.eos]).astype(np.int64)
            first, last = self._cut(len(self.bos), len(prompt), len(whole))
            part = np.concatenate([self.bos, prompt.ids[first:], whole[:last]]).astype(np.int64)
            sizes = np.concatenate([np.zeros(len(self.bos)), prompt.num_bytes[first:], answer.num_bytes[:last]])
            start = 1 if self.train_on_inputs else max(1, len(self.bos) + len(prompt) - first)
            if len(part) <= start:
                continue
            kept.append(place)
            parts.append(part)
            num_prompt.append(start)
            num_bytes.append(int(sizes[start:].sum()))
            num_truncated += first > 0 or last < len(whole)
        encoded = self._rows(parts, num_prompt, num_bytes, ids[kept])
        return _counted(encoded, num_truncated, len(places) - len(kept))

    def blocks(self, texts: Sequence[str], first_id: int) -> EncodedTokens:
        """Encode plain texts as one stream, cut into blocks numbered from `first_id`; empty texts count as dropped."""
        documents = [document for document in tokenise(self.tokenizer, texts) if len(document)]
        pieces = [piece for document in documents for piece in (self.bos, document.ids, self.eos)]
        sizes = [
            piece
            for document in documents
            for piece in (np.zeros(len(self.bos)), document.num_bytes, np.zeros(len(self.eos)))
        ]
        stream = np.concatenate([*pieces, []]).astype(np.int64)
        counts = np.concatenate([*sizes, []]).astype(np.int64)
        starts = range(0, max(0, len(stream) - 1), self.block_size)  # nothing predicts the token of a tail of one
        parts = [stream[start : start + self.block_size] for start in starts]
        num_bytes = [int(counts[start + 1 : start + self.block_size].sum()) for start in starts]
        encoded = self._rows(parts, [1] * len(parts), num_bytes, first_id + np.arange(len(parts), dtype=np.int64))
        return _counted(encoded, 0, len(texts) - len(documents))

    def prompts(self, rows: Sequence[Mapping[str, Any]], reserve: int) -> list[list[int]]:
        """Return bos and prompt of each row, cut on the left to leave `reserve` tokens free."""
        texts = [row["text"] if "text" in row else self.prompt(row, place) for place, row in enumerate(rows)]
        room = self.max_length - reserve - len(self.bos)
        result = []
        for tokens in tokenise(self.tokenizer, texts):
            prompt = self._without_bos(tokens).ids
            self.check_ids(prompt)
            result.append([*self.bos, *prompt[max(0, len(prompt) - room) :].tolist()])
        return result

    def prompt(self, row: Mapping[str, Any], place: int) -> str:
        """Write the prompt of a row; an error names the row."""
        try:
            return self.template.prompt(row)
        except DataError as error:
            raise DataError(f"row {place + 1}: {error}") from error

    def shortened(self, encoded: EncodedTokens, count_bytes: Callable[[Ids], int]) -> EncodedTokens:
        """Cut rows that were encoded for a longer `max_length`.

        Args:
            encoded: rows of this tokenizer.
            count_bytes: tells the UTF-8 bytes of some token ids, for answers that lose their end.
        """
        parts, num_prompt, num_bytes = [], [], encoded.num_bytes.tolist()
        for index in range(len(encoded)):
            row, length = encoded.row(index).astype(np.int64), int(encoded.prompt_lengths[index])
            head = len(self.bos) if tuple(row[: len(self.bos)].tolist()) == self.bos else 0
            first, last = self._cut(head, length - head, len(row) - length)
            parts.append(np.concatenate([row[:head], row[head + first : length], row[length : length + last]]))
            num_prompt.append(max(1, length - first))
            if length - first < 1 or length + last < len(row):
                num_bytes[index] = count_bytes(parts[-1][num_prompt[-1] :])
        return self._rows(parts, num_prompt, num_bytes, encoded.ids)

    def check_ids(self, ids: Sequence[int] | Ids) -> None:
        """Check that the model has an embedding for each id.

        Raises:
            ModelError: it has none; the tokenizer belongs to another model, or was extended.
        """
        largest = int(np.max(ids, initial=0))
        if largest >= self.vocab_size:
            raise ModelError(
                f"expected token ids below {self.vocab_size}, the vocabulary of the model, found {largest} "
                f"({self.tokenizer.convert_ids_to_tokens(largest)!r}); use the tokenizer the model came with"
            )

    def _answer(self, row: Mapping[str, Any], place: int) -> str:
        answer = answer_of(row)
        if answer is None:
            field = "message of the assistant at the end" if "messages" in row else "'output'"
            raise DataError(f"row {place + 1} has no {field}, so there is no answer to learn; add it or drop the row")
        return answer

    def _without_bos(self, prompt: TokenisedText) -> TokenisedText:
        """Take off the bos that a template writes itself, so that a row has one and keeps it when it is cut."""
        if self.bos and len(prompt) and prompt.ids[0] == self.bos[0]:
            return TokenisedText(prompt.ids[1:], prompt.num_bytes[1:])
        return prompt

    def _cut(self, num_head: int, num_prompt: int, num_answer: int) -> tuple[int, int]:
        """Return how many tokens the prompt loses on the left and how many the answer keeps."""
        room = self.max_length - num_head
        kept = min(num_answer, room)
        return max(0, num_prompt - (room - kept)), kept

    def _rows(self, parts: list[Ids], num_prompt: list[int], num_bytes: list[int], ids: Ids) -> EncodedTokens:
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        self.check_ids(flat)
        return EncodedTokens(
            token_ids=flat.astype(token_dtype(self.vocab_size)),
            offsets=offsets,
            prompt_lengths=np.asarray(num_prompt, dtype=np.int32),
            num_bytes=np.asarray(num_bytes, dtype=np.int64),
            ids=ids,
        )


def _counted(encoded: EncodedTokens, num_truncated: int, num_dropped: int) -> EncodedTokens:
    return replace(encoded, num_truncated=num_truncated, num_dropped=num_dropped)
