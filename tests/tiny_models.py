"""Small random-weight models of transformers, saved to folders the way their makers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from everlora.backbones.huggingface import quiet_transformers

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE = {**_SIZES, "intermediate_size": 32}
_IMAGE = {"image_size": 16, "patch_size": 8}
_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"where is my parcel lost card red green blue".split()]
_TEXT = {"vocab_size": len(_WORDS), "max_position_embeddings": 24}
_NO_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", {**_WIDE, **_IMAGE}),
    "deit": ("DeiTConfig", {**_WIDE, **_IMAGE}),
    "dinov2": ("Dinov2Config", {**_SIZES, **_IMAGE}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {**_SIZES, **_IMAGE, "num_register_tokens": 3}),
    "beit": ("BeitConfig", {**_WIDE, **_IMAGE}),
    "clip_vision_model": ("CLIPVisionConfig", {**_WIDE, **_IMAGE}),
    "siglip_vision_model": ("SiglipVisionConfig", {**_WIDE, **_IMAGE}),
    "bert": ("BertConfig", {**_WIDE, **_TEXT}),
    "roberta": ("RobertaConfig", {**_WIDE, **_TEXT, **_NO_SPECIAL, "pad_token_id": 0}),
    "distilbert": (
        "DistilBertConfig",
        {**_TEXT, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "albert": ("AlbertConfig", {**_WIDE, **_TEXT, **_NO_SPECIAL, "embedding_size": 16}),
    "mpnet": ("MPNetConfig", {**_WIDE, **_TEXT, **_NO_SPECIAL, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {**_SIZES, **_TEXT, **_NO_SPECIAL, "pad_token_id": 0, "n_inner": 32}),
    "t5": (
        "T5Config",
        {"vocab_size": len(_WORDS), "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8},
    ),
}
IMAGE_KINDS = ("vit", "deit", "dinov2", "dinov2_with_registers", "beit", "clip_vision_model", "siglip_vision_model")
TEXT_KINDS = tuple(kind for kind in CONFIGS if kind not in IMAGE_KINDS)


def save_tiny(kind: str, folder: Path, **changes: Any) -> Path:
    """Save a small model of one architecture with its tokenizer or image processor; same weights on every call."""
    config_class, settings = CONFIGS[kind]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(5)
        if kind == "clip_vision_model":
            model = transformers.CLIPVisionModel(config)
        elif kind == "t5":
            model = transformers.T5EncoderModel(config)
        else:
            model = transformers.AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            # The usual start is so narrow that different inputs look alike.
            if parameter.dim() > 1 and "embedding" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    if kind in IMAGE_KINDS:
        save_processor(folder)
    else:
        save_tokenizer(folder)
    return folder


def save_processor(folder: Path, **changes: Any) -> None:
    """Write the image processor of a small vision model."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "resample": 2,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
        **changes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_tokenizer(folder: Path) -> None:
    """Write a word tokenizer that knows a dozen words."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    words = {word: index for index, word in enumerate(_WORDS)}
    transformers.BertTokenizer(vocab=words).save_pretrained(folder)
