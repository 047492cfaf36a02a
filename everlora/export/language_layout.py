"""How a causal language model is written, loaded by plain tools, and explained."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.quantization import chosen_quantization, is_quantized, quantization_options
from everlora.errors import UnsupportedError
from everlora.export.language_snippet import LanguageSnippet, chat_template_of
from everlora.export.layout import Layout, load_fitting
from everlora.heads import LanguageHead
from everlora.lowrank import LowRankLayer

__all__ = ["LanguageLayout"]

_GENERATION = "generation_config.json"
_PROBE_LENGTHS = (32, 7, 2)
# Of weights in few bits, whose products round what they read.
_ROUNDED = 5e-2


@dataclass(frozen=True)
class LanguageLayout(Layout):
    """A causal language model; see `Layout`.

    Attributes:
        encoder: the backbone.
        base: where the base model is loaded from, for a PEFT export; `None` for a merged one.
        variants: sub-folders of the adapters, the one that predicts by default first; empty where there is but one,
            beside the README.
        variant: name of the weights that were written, where there are several kinds.
    """

    encoder: CausalLMBackbone
    base: str | None = None
    variants: tuple[str, ...] = ()
    variant: str | None = None

    @property
    def backbone(self) -> CausalLMBackbone:
        """The network, with the adapted layers in place."""
        return self.encoder

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights, of those that are not quantised."""
        dtype: torch.dtype = self.encoder.dtype
        return dtype

    @property
    def model_class(self) -> str:
        """Class of transformers that the weights belong to."""
        return type(self.encoder.model).__name__

    @property
    def has_classifier(self) -> bool:
        """Always true: the output layer is a part of the model, and nothing lies beside."""
        return True

    @property
    def base_class(self) -> str:
        """PEFT's name of what the base does."""
        return "CAUSAL_LM"

    @property
    def library(self) -> str:
        """The library of a merged model's class."""
        return "transformers"

    @property
    def made_with(self) -> str:
        """The major version, between which names of layers differ."""
        return f"transformers {transformers.__version__.split('.')[0]}"

    @property
    def pipeline_tag(self) -> str:
        """Generation of text."""
        return "text-generation"

    @property
    def tolerance(self) -> float:
        """As for other models, but for quantised weights, on which a product may round otherwise."""
        return _ROUNDED if is_quantized(self.encoder.model) else super().tolerance

    def summary(self) -> str:
        """One sentence on what was written."""
        if self.base is None:
            return f"A plain `{self.model_class}` with the adapters merged into its weights, and its tokenizer."
        if not self.variants:
            return "A LoRA adapter for PEFT, and the tokenizer; prompts are written as the code below does it."
        names = " and ".join(f"`{name}/`" for name in self.variants)
        return f"LoRA adapters for PEFT in {names}, each complete in itself, and the tokenizer."

    def requirements(self) -> str:
        """One sentence on what the code needs."""
        extra = " and peft" if self.base is not None else ""
        extra += ", and bitsandbytes" if chosen_quantization(self.encoder.model) != "none" else ""
        return f"Needs torch, {self.made_with} (names of layers differ between major versions){extra}; run it here."

    def code(self) -> str:
        """The program of the README."""
        return LanguageSnippet(self.encoder, self.base, self.variants[0] if self.variants else "").code()

    def facts(self) -> list[tuple[str, Any]]:
        """Weights of which kind were written, and how those of the base were held."""
        rows: list[tuple[str, Any]] = [] if self.variant is None else [("Weights", self.variant)]
        bits = chosen_quantization(self.encoder.model)
        return [*rows, ("Base weights while learning", bits)] if bits != "none" else rows

    def sections(self) -> list[str]:
        """What the sub-folders are, where there are several."""
        if not self.variants:
            return []
        first, *others = self.variants
        lines = [f"- `{first}/` is what the learner predicts with by default, and what the code above loads."]
        lines += [f"- `{name}/` are the learner's weights of that name, loaded in the same way." for name in others]
        return ["## Which adapter", "\n".join(lines)]

    def check(self) -> None:
        """Refuse to merge into weights that cannot hold a sum.

        Raises:
            UnsupportedError: the base is quantised, or an adapted output layer shares its weight with the embedding.
        """
        if self.base is None and is_quantized(self.encoder.model):
            raise UnsupportedError(
                "adapters cannot be merged into quantised weights without rounding away what was learned; export peft, "
                "and merge it into the base loaded unquantised"
            )
        tied = bool(self.encoder.model.config.get_text_config().tie_word_embeddings)  # type: ignore[union-attr, operator]
        if self.base is None and tied and isinstance(self.encoder.output_head, LowRankLayer):
            raise UnsupportedError(
                "the adapted output layer shares its weight with the embedding, which a merge would change, too; "
                "export peft"
            )

    def check_saved(self, modules: Sequence[str]) -> None:
        """Refuse whole modules beside the factors, which servers of language models do not load.

        Raises:
            UnsupportedError: there are some.
        """
        if modules:
            raise UnsupportedError(
                f"'{modules[0]}' is not the base's any more, and an adapter for a language model holds factors alone; "
                "export merged instead"
            )

    def write_model(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the merged model the way transformers does, tied weights once."""
        live: Any = self.encoder.model
        # On the meta device nothing is allocated; the weights are those of the state, not copies.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            plain = type(live)(copy.deepcopy(live.config))
        load_fitting(plain, state, assign=True)
        plain.tie_weights()
        plain.generation_config = copy.deepcopy(live.generation_config)
        plain.save_pretrained(folder)
        if (self.encoder.folder / _GENERATION).is_file():
            shutil.copyfile(self.encoder.folder / _GENERATION, folder / _GENERATION)

    def write_inputs(self, folder: Path) -> None:
        """Write the tokenizer, with the chat template that the learner was given, if it was given one."""
        tokenizer = copy.copy(self.encoder.tokenizer)
        template = chat_template_of(self.encoder)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)

    def load(self, place: Path) -> Any:
        """Load the base, or the merged model of a folder."""
        options: dict[str, Any] = {"dtype": self.dtype, "local_files_only": True, "use_safetensors": True}
        options |= quantization_options(chosen_quantization(self.encoder.model), self.dtype)
        with torch.random.fork_rng(devices=[]):
            return transformers.AutoModelForCausalLM.from_pretrained(place, **options)

    def probe(self, rows: Any = None) -> dict[str, Tensor]:
        """Batch of tokens, padded on the right: of the rows, or made-up ones."""
        backbone = self.encoder
        if rows is not None:
            encoded = backbone.encode(rows)
            return backbone.collate(encoded, np.arange(len(encoded)))
        lengths = [min(length, backbone.max_length) for length in _PROBE_LENGTHS]
        generator = np.random.default_rng(0)
        ids = np.full((len(lengths), max(lengths)), backbone.inputs.pad, dtype=np.int64)
        for row, length in enumerate(lengths):
            ids[row, :length] = generator.integers(0, backbone.vocab_size, length)
        mask = (np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]).astype(np.int64)
        batch = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.from_numpy(values).to(backbone.device) for name, values in batch.items()}

    def expected(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits `(tokens, vocabulary)` that the learner gives, without padding."""
        features = self.encoder.features(batch)[batch["attention_mask"].bool()]
        return LanguageHead(self.encoder.output_head).logits(features)

    def logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `(tokens, vocabulary)` of a loaded model, without padding."""
        mask = batch["attention_mask"]
        output = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        return output.logits[mask.bool()].float()  # type: ignore[no-any-return]
