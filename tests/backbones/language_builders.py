"""Small tokenizers for language models, and rows."""

from __future__ import annotations

import json
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from everlora.backbones.language_inputs import LanguageInputs
from everlora.backbones.tokens import EncodedTokens

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = None, **more: Any) -> Any:
    """One token per byte, `chr` of ASCII as in the text, and special tokens after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    given = {name: token for name, token in specials.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given, **more)


def word_tokenizer(*words: str) -> Any:
    """One token per word; what lies between words is no token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class WithoutPlaces:
    """A tokenizer that cannot tell where in the text a token lies."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        assert not options["return_offsets_mapping"]
        return self.tokenizer(texts, **options)


def task(instruction: str, output: str | None = None, **more: Any) -> str:
    row = {"instruction": instruction, "input": "", **more}
    return json.dumps(row if output is None else {**row, "output": output})


def text(content: str) -> str:
    return json.dumps({"text": content})


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


CPU = torch.device("cpu")
BYTES = byte_tokenizer()
BOS, EOS = 256, 257


def make(max_length: int = 64, tokenizer: Any = BYTES, **options: Any) -> LanguageInputs:
    return LanguageInputs(tokenizer, max_length, **{"vocab_size": 258, **options})


def shown(inputs: LanguageInputs, ids: Any) -> str:
    return "".join({BOS: "<", EOS: ">"}.get(int(token)) or inputs.tokenizer.decode([int(token)]) for token in ids)


def supervised(inputs: LanguageInputs, encoded: EncodedTokens, row: int = 0) -> str:
    labels = inputs.collate(encoded, [row], device=CPU)["labels"][0]
    return shown(inputs, labels[labels != -100])
