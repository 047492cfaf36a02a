"""Causal language models of transformers as backbones: all hidden states instead of one vector, and an output layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from everlora.backbones.architectures import ARCHITECTURES, Architecture, known_projections
from everlora.backbones.base import Backbone
from everlora.backbones.fingerprint import fingerprint_of, tokenizer_text
from everlora.backbones.huggingface import accepts, guarded_load, hidden_size, linear_names, quiet_transformers
from everlora.backbones.language_inputs import LanguageInputs
from everlora.backbones.quantization import prepare_quantized, quantization_options
from everlora.backbones.templates import find_template
from everlora.errors import ModelError, OptionError, UnsupportedError

__all__ = ["CausalLMBackbone", "fingerprint_of_inputs", "load_causal_lm"]

_UNKNOWN = Architecture((), "mean")
_DEFAULT_MAX_LENGTH = 1024
_PROBE_TOLERANCE = 1e-2


class CausalLMBackbone(Backbone):
    """A frozen causal language model with its tokenizer.

    `features` gives the last hidden states of all tokens, after the final norm; `output_head` turns them into scores of
    the next token.

    Args:
        model: of transformers, with a language-modelling head.
        inputs: templates, tokens and padding.
        facts: the entry of the architecture's table.
        **names: `source`, `folder`, `architecture`, handed to `Backbone`.
    """

    inputs: LanguageInputs

    def __init__(self, model: Any, inputs: LanguageInputs, *, facts: Architecture, **names: Any) -> None:
        super().__init__(model, inputs, feature_dim=hidden_size(model), pooling="none", **names)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._preferred_targets = facts.targets
        self._has_positions = accepts(model.forward, "position_ids")
        self._require_plain_head()

    @property
    def modality(self) -> Literal["image", "text", "language"]:
        """Always `"language"`."""
        return "language"

    @property
    def max_length(self) -> int:
        """Longest row in tokens."""
        return self.inputs.max_length

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.inputs.tokenizer

    @property
    def inputs_fingerprint(self) -> str:
        """Sha256 over template and tokenizer."""
        return fingerprint_of(self.inputs.template_text, tokenizer_text(self.tokenizer))

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer."""
        return int(self._network.config.get_text_config().vocab_size)

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks L; hidden states are numbered from 0 to L."""
        return int(self._network.config.get_text_config().num_hidden_layers)

    @property
    def output_head(self) -> nn.Module:
        """The layer that turns last hidden states into scores of the next token."""
        head: nn.Module = self._network.get_output_embeddings()
        return head

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Last name components of the query and value projections.

        Raises:
            TargetError: none of the known names is present.
        """
        return self.attention_targets("query", "value")

    def attention_targets(self, *roles: str) -> tuple[str, ...]:
        """Last name components of the projections with the given roles: `query`, `key`, `value`.

        Raises:
            TargetError: none of the known names is present.
        """
        return known_projections(linear_names(self.model), roles, self._preferred_targets)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states of all tokens, `(n, T, d)` float32."""
        return self.hidden_states(batch, [self.num_blocks])[0]

    def hidden_states(self, batch: dict[str, Tensor], layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Hidden states after some of the blocks.

        Args:
            batch: what `collate` returned.
            layers: numbers from 0, the embeddings, to `num_blocks`, whose states are those after the final norm.

        Returns:
            One `(n, T, d)` float32 for each number.
        """
        inner = any(layer != self.num_blocks for layer in layers)
        outputs = self._network.base_model(**self._arguments(batch), output_hidden_states=inner, use_cache=False)
        if not inner:
            return tuple(outputs.last_hidden_state.float() for _ in layers)
        return tuple(outputs.hidden_states[layer].float() for layer in layers)

    def collate(self, encoded: Any, indices: Any, *, augment: Any = None, pack: bool = False) -> dict[str, Tensor]:
        """Build the batch of the given rows on the device of the network: tokens, mask and labels, `(n, T)`.

        Args:
            encoded: what `encode` returned.
            indices: row numbers.
            augment: must be None.
            pack: lay rows end to end, in lines as long as the longest row may be.
        """
        return self.inputs.collate(encoded, indices, device=self.device, augment=augment, pack=pack)

    def lengths(self, encoded: Any) -> Any:
        """Tokens of each row, `(n,)` int64."""
        return encoded.lengths

    @property
    def _network(self) -> Any:
        """The model, as what transformers makes it."""
        return self.model

    def _count_parameters(self) -> int:
        return int(self._network.num_parameters())  # quantised weights hold several in one number

    def _arguments(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ["input_ids", "attention_mask", *(["position_ids"] if self._has_positions else [])]
        arguments = {name: batch[name] for name in names if name in batch}
        if "segments" in batch:
            arguments["attention_mask"] = _block_mask(batch["segments"], self.dtype)
        return arguments

    def _require_plain_head(self) -> None:
        """Check that scores are the output layer on the last hidden states, and nothing done to them afterwards."""
        tokens = torch.arange(1, 6, device=self.device)[None] % self.vocab_size
        with torch.no_grad():
            try:
                whole = self.model(input_ids=tokens, use_cache=False).logits.float()
            except (NotImplementedError, RuntimeError) as error:
                raise UnsupportedError(
                    f"{type(self.model).__name__} cannot compute on {self.device} with these weights: "
                    f"{str(error).splitlines()[0]}; load it with quantization=none"
                ) from error
            states = self.hidden_states({"input_ids": tokens}, [self.num_blocks])[0]
            weight = next(self.output_head.parameters())
            parts = self.output_head(states.to(weight.dtype) if weight.is_floating_point() else states).float()
        allowed = _PROBE_TOLERANCE * max(1.0, float(whole.abs().max()))
        if whole.shape != parts.shape or not float((whole - parts).abs().max()) <= allowed:
            raise UnsupportedError(
                f"{type(self.model).__name__} changes its scores after the output layer, which the training loss does "
                "not know; use a model with a plain output layer"
            )


def load_causal_lm(
    folder: Path,
    *,
    source: str,
    dtype: torch.dtype,
    quantization: str,
    max_length: int | None,
    template: str,
    train_on_inputs: bool,
    block_size: int | None,
) -> CausalLMBackbone:
    """Load a causal language model from a local folder; see `everlora.backbones.load_backbone`.

    Raises:
        ModelError: the folder cannot be loaded, or lacks weights.
        OptionError: an option does not fit the model.
        UnsupportedError: quantised weights were asked for where they cannot be had.
    """
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        config = guarded_load(folder, transformers.AutoConfig.from_pretrained, folder, local_files_only=True)
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(
                f"expected a causal language model in {folder}, found {config.model_type}; name a language model, or "
                "choose another scenario"
            )
        options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
        options |= quantization_options(quantization, dtype)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = guarded_load(folder, load, folder, output_loading_info=True, **options)
        tokenizer = _load_tokenizer(folder)
    prepare_quantized(model)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"expected all weights of {type(model).__name__} in {folder}, found {len(missing)} missing, first "
            f"{missing[0]}; use another folder"
        )
    inputs = LanguageInputs(
        tokenizer,
        _length(config, tokenizer, max_length),
        vocab_size=int(config.get_text_config().vocab_size),
        template=template,
        train_on_inputs=train_on_inputs,
        block_size=block_size,
    )
    facts = ARCHITECTURES.get(str(config.model_type), _UNKNOWN)
    names = {"source": source, "folder": folder, "architecture": str(config.model_type)}
    return CausalLMBackbone(model, inputs, facts=facts, **names)


def fingerprint_of_inputs(folder: Path, *, template: str = "auto") -> str:
    """Return the `inputs_fingerprint` of the language model in a local folder, without reading its weights.

    Args:
        folder: of the model.
        template: as the model is loaded with.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        OptionError: the template is not usable.
    """
    with quiet_transformers():
        tokenizer = _load_tokenizer(folder)
    return fingerprint_of(find_template(tokenizer, template).text, tokenizer_text(tokenizer))


def _load_tokenizer(folder: Path) -> Any:
    load = transformers.AutoTokenizer.from_pretrained
    return guarded_load(folder, load, folder, local_files_only=True, trust_remote_code=False)


def _length(config: Any, tokenizer: Any, wanted: int | None) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is not None and isinstance(limit, int) and wanted > limit:
        raise OptionError(f"expected max_length of at most {limit}, the positions of the model, found {wanted}")
    bounds = [_DEFAULT_MAX_LENGTH, int(min(tokenizer.model_max_length, 1 << 20))]
    return wanted or min([*bounds, limit] if isinstance(limit, int) else bounds)


def _block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention `(lines, 1, T, T)` within each segment and not ahead: 0 where allowed, the least number elsewhere.

    Padding, segment 0, sees itself, lest a row of the softmax be empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones_like(same[0]).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]
