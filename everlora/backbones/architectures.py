"""What everlora knows of each architecture: layers to adapt, pooling, loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from everlora.errors import OptionError, TargetError, nearest

__all__ = ["ARCHITECTURES", "ROLES", "Architecture", "known_projections", "known_targets"]


@dataclass(frozen=True)
class Architecture:
    """Facts about one Hugging Face `model_type`.

    Attributes:
        targets: last components of the names of its key and value projections; slices of a fused layer are called
            key and value.
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
    "modernbert": Architecture(_WORDS, "mean"),
    "gpt2": Architecture(_WORDS, "mean"),
    "t5": Architecture(("k", "v"), "mean", loader="T5EncoderModel"),
    "mt5": Architecture(("k", "v"), "mean", loader="MT5EncoderModel"),
    "clip_text_model": Architecture(_PROJ, "pooler"),
}

ROLES = ("query", "key", "value")

# Names of the three projections met in the wild, most specific first.
_PROJECTIONS: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
)
# One layer that computes all three, for those models where its slices are not known to lie side by side; the names
# of slices that do are among the projections above.
_FUSED = ("qkv", "Wqkv", "query_key_value", "in_proj", "c_attn")
_KNOWN_TARGETS: tuple[tuple[str, ...], ...] = (
    *((key, value) for _, key, value in _PROJECTIONS),
    *((name,) for name in _FUSED),
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
    present = _last_components(linear_names)
    for candidate in (preferred, *_KNOWN_TARGETS):
        if candidate and present.issuperset(candidate):
            return candidate
    raise TargetError(
        "expected linear layers known as key and value projections, such as k_proj and v_proj, "
        f"found {_listed(present)}; name the layers to adapt with targets"
    )


def known_projections(
    linear_names: Iterable[str], roles: Sequence[str], preferred: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Find projections of the attention by their part in it, each a layer of its own.

    Args:
        linear_names: full names of the linear layers of the network.
        roles: of `ROLES`, in the order wanted.
        preferred: the key and value projections of the architecture's table entry; their naming is tried first.

    Returns:
        Last components of layer names, e.g. `("q_proj", "v_proj")` for query and value.

    Raises:
        OptionError: an unknown role.
        TargetError: no known names are present, or one layer computes all projections and cannot be taken apart.
    """
    for role in roles:
        if role not in ROLES:
            raise OptionError(f"there is no attention projection '{role}'; {nearest(role, ROLES)}")
    present = _last_components(linear_names)
    for names in sorted(_PROJECTIONS, key=lambda names: names[1:] != preferred):
        candidate = tuple(names[ROLES.index(role)] for role in roles)
        if present.issuperset(candidate):
            return candidate
    wanted = " and ".join(roles)
    fused = next((name for name in _FUSED if name in present), None)
    if fused is not None:
        raise TargetError(
            f"expected {wanted} projections as layers of their own, found the fused layer {fused}, which cannot be "
            f"taken apart; give targets={fused} to adapt it as a whole"
        )
    raise TargetError(
        f"expected linear layers known as {wanted} projections, found {_listed(present)}; name the layers to adapt "
        "with targets"
    )


def _last_components(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def _listed(present: set[str]) -> str:
    return ", ".join(sorted(present)) if present else "no linear layer at all"
