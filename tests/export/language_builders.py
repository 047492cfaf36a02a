"""Small language models that learned something, and methods that taught them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from everlora.backbones import load_backbone
from everlora.backbones.causal_lm import CausalLMBackbone
from everlora.backbones.huggingface import quiet_transformers
from everlora.export import ExportReport, export_language
from everlora.lowrank import AdaptedLayer, attach, exchanged
from tests.tiny_models import save_tokenizer

CARD = {
    "method": "replay",
    "scenario": "language",
    "base_model": "owner/name",
    "base_sha256": "ab" * 32,
    "tasks": [{"name": "first | task"}, {"name": "second"}],
}
_SIZES = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48}),
    "tied": ("LlamaConfig", {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {**_SIZES, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}),
}
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}card {% endif %}"
)


def save_language_model(kind: str, folder: Path) -> Path:
    """Save a small causal language model with a tokenizer of a dozen words; same weights on every call."""
    name, settings = CONFIGS[kind]
    config = getattr(transformers, name)(**{"tie_word_embeddings": False, **settings})
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load_language_model(source: Path, **options: Any) -> CausalLMBackbone:
    backbone = load_backbone(source, kind="causal_lm", **options)
    assert isinstance(backbone, CausalLMBackbone)
    return backbone


@dataclass
class TaughtModel:
    """A method as an export sees it: adapted layers, and perhaps other factors to predict with."""

    adapted: Mapping[str, AdaptedLayer]
    others: dict[str, Mapping[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.others)

    def layers(self) -> Mapping[str, AdaptedLayer]:
        return self.adapted

    @contextmanager
    def predicting(self, variant: str | None = None) -> Iterator[None]:
        if not self.others:
            yield
            return
        with exchanged(self.adapted, self.others[variant or self.variants[0]]):
            yield


def teach(backbone: CausalLMBackbone, *, past: int = 0, variants: tuple[str, ...] = (), **options: Any) -> TaughtModel:
    """Attach layers with `past` blocks of rank 2 and a current one, its product scaled by 2, with random factors."""
    generator = torch.Generator().manual_seed(1)
    targets = options.pop("targets", None) or backbone.default_targets
    layers = attach(backbone.model, targets, **{"rank": 3, "generator": generator, **options})
    shapes = {name: (layer.down.shape, layer.up.shape) for name, layer in layers.items()}
    for layer in layers.values():
        for _ in range(past):
            layer.start_block(2, generator=generator)
            with torch.no_grad():
                layer.up.normal_(std=0.3, generator=generator)
            layer.fold_block(0.5)
        if past:
            layer.start_block(3, generator=generator)
        layer.scale = 2.0
        with torch.no_grad():
            layer.up.normal_(std=0.3, generator=generator)
    return TaughtModel(
        layers,
        {
            variant: {
                name: tuple(torch.randn(shape, generator=generator) * 0.3 for shape in pair)
                for name, pair in shapes.items()
            }
            for variant in variants
        },
    )


def export(taught: TaughtModel, backbone: CausalLMBackbone, folder: Path, kind: str, **options: Any) -> ExportReport:
    return export_language(taught, backbone, folder, format=kind, card=CARD, **options)


def tokens_of(backbone: CausalLMBackbone, rows: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, backbone.vocab_size, (rows, length), generator=generator)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def readme_code(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]


def run_readme(folder: Path, monkeypatch: Any, *, example: bool = True) -> dict[str, Any]:
    """Run the program of a README in its folder, perhaps without the example in its last line; return its names."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    code = readme_code(folder)
    with quiet_transformers():
        exec(compile(code if example else code.rpartition("\n")[0], "README.md", "exec"), names)
    return names
