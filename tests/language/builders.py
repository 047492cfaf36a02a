"""Small random-weight language models, and trainers around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from everlora.backbones import load_backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.lowrank import LowRankLayer, attach
from everlora.streams import Examples, load_dialogues
from everlora.training import TaskTrainer, TrainingOptions
from tests.backbones.language_builders import BOS, BYTES, EOS

_COMMON: dict[str, Any] = {"vocab_size": 258, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
_WIDE = {**_COMMON, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_WIDE, num_key_value_heads=1, max_position_embeddings=128),
    "mistral": lambda: transformers.MistralConfig(
        **_WIDE, num_key_value_heads=2, max_position_embeddings=128, sliding_window=6
    ),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=16, n_layer=2, n_head=2, n_inner=32, n_positions=128, tie_word_embeddings=False
    ),
}


def save_model(folder: Path, kind: str = "llama", tokenizer: Any = BYTES) -> Path:
    """Save a model whose next tokens differ clearly in probability; same weights on every call."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> CausalLMBackbone:
    backbone = load_backbone(folder, **{"kind": "causal_lm", "max_length": 96, **options})
    assert isinstance(backbone, CausalLMBackbone)
    return backbone


def trainer_of(backbone: Any, **options: Any) -> TaskTrainer:
    """A trainer whose method is never asked for anything: evaluation takes the weights that are in place."""
    return TaskTrainer(backbone, None, TrainingOptions(**{"eval_batch_size": 3, **options}))  # type: ignore[arg-type]


def adapt(backbone: CausalLMBackbone, seed: int = 0, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> None:
    """Attach branches of random weights, so that the model computes something else than before."""
    generator = torch.Generator().manual_seed(seed)
    for layer in attach(backbone.model, targets, 3, generator=generator).values():
        assert isinstance(layer, LowRankLayer)
        with torch.no_grad():
            layer.up.normal_(generator=generator)


def rows(*items: Any, **options: Any) -> Examples:
    return load_dialogues(list(items), **options)


def tokens_of(text: str) -> list[int]:
    """The tokens of a text, one for each byte, and none added."""
    ids: list[int] = BYTES(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_of(text: str) -> list[int]:
    """The tokens of an instruction, written out by hand."""
    return [BOS, *tokens_of(text + "\n")]
