"""What everlora knows of each architecture: layers to adapt, pooling, loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from everlora.errors import TargetError

__all__ = ["ARCHITECTURES", "Architecture", "known_targets"]


@dataclass(frozen=True)
class Architecture:
    """Facts about one Hugging Face `model_type`.

    Attributes:
        targets: last components of the names of its key and value projections.
        pooling: the pooling used unless another is asked for.
        loader: class of transformers that loads the encoder.
        num_prefix: leading tokens of an image that are no patches, register tokens not counted.
        offset_positions: position numbers start after the padding id, so two positions cannot be used.
    """

    targets: tuple[str, ...]
    pooling: str
    loader: str = "AutoModel"
    num_prefix: int = 1
    offset_positions: bool = False


_PROJ = ("k_proj", "v_proj")
_WORDS = ("key", "value")

ARCHITECTURES: dict[str, Architecture] = {
    # images
    "vit": Architecture(_PROJ, "cls"),
    "deit": Architecture(_PROJ, "cls", num_prefix=2),
    "dinov2": Architecture(_PROJ, "cls"),
    "dinov2_with_registers": Architecture(_PROJ, "cls"),
    "dinov3_vit": Architecture(_PROJ, "cls"),
    "beit": Architecture(_PROJ, "pooler"),
    "ijepa": Architecture(_PROJ, "mean", num_prefix=0),
    # Repositories of contrastive models hold two towers; the image tower is the one loaded.
    "clip": Architecture(_PROJ, "pooler", loader="CLIPVisionModel"),
    "clip_vision_model": Architecture(_PROJ, "pooler", loader="CLIPVisionModel"),
    "siglip": Architecture(_PROJ, "pooler", loader="SiglipVisionModel", num_prefix=0),
    "siglip_vision_model": Architecture(_PROJ, "pooler", loader="SiglipVisionModel", num_prefix=0),
    "swin": Architecture(_PROJ, "mean", num_prefix=0),
    # texts
    "bert": Architecture(_WORDS, "mean"),
    "roberta": Architecture(_WORDS, "mean", offset_positions=True),
    "xlm-roberta": Architecture(_WORDS, "mean", offset_positions=True),
    "camembert": Architecture(_WORDS, "mean", offset_positions=True),
    "electra": Architecture(_WORDS, "mean"),
    "albert": Architecture(_WORDS, "mean"),
    "distilbert": Architecture(("k_lin", "v_lin"), "mean"),
    "mpnet": Architecture(("k", "v"), "mean", offset_positions=True),
    "deberta-v2": Architecture(("key_proj", "value_proj"), "mean"),
    "modernbert": Architecture(("Wqkv",), "mean"),
    "t5": Architecture(("k", "v"), "mean", loader="T5EncoderModel"),
    "mt5": Architecture(("k", "v"), "mean", loader="MT5EncoderModel"),
    "clip_text_model": Architecture(_PROJ, "pooler"),
}

# Names of key and value projections met in the wild, most specific first; fused projections come last.
_KNOWN_TARGETS: tuple[tuple[str, ...], ...] = (
    _PROJ,
    _WORDS,
    ("k_lin", "v_lin"),
    ("key_proj", "value_proj"),
    ("to_k", "to_v"),
    ("k", "v"),
    ("wk", "wv"),
    ("qkv",),
    ("Wqkv",),
    ("query_key_value",),
    ("in_proj",),
    ("c_attn",),
)


def known_targets(linear_names: Iterable[str], preferred: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Choose the layers to adapt from the names of the linear layers.

    Args:
        linear_names: full names of the linear layers of the network.
        preferred: the choice of the architecture's table entry; taken when the network has them all.

    Returns:
        Last components of layer names, e.g. `("k_proj", "v_proj")`.

    Raises:
        TargetError: no known pair of names is present; the message names the layers found.
    """
    present = {name.rsplit(".", 1)[-1] for name in linear_names}
    for candidate in (preferred, *_KNOWN_TARGETS):
        if candidate and present.issuperset(candidate):
            return candidate
    found = ", ".join(sorted(present)) if present else "no linear layer at all"
    raise TargetError(
        "expected linear layers known as key and value projections, such as k_proj and v_proj, "
        f"found {found}; name the layers to adapt with targets"
    )
