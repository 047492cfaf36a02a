"""Which layers of a causal language model get an adapter, and which must not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from everlora.errors import TargetError
from everlora.lowrank import find_targets
from everlora.methods.base import Encoder

__all__ = ["ALL_LINEAR", "ATTENTION", "language_targets"]

ALL_LINEAR = "all-linear"
ATTENTION = "attention"


def language_targets(encoder: Encoder, targets: Sequence[str] | None) -> tuple[str, ...]:
    """Resolve targets, among them two words, to name patterns of layers.

    Args:
        encoder: a causal language model.
        targets: name patterns; `all-linear` stands for every linear layer but the output layer, `attention` for all
            linear layers of the attention. None takes the model's own.

    Raises:
        TargetError: a target is the output layer or an embedding, whose weights are often one and the same, or
            matches nothing.
    """
    if targets is None:
        return encoder.default_targets
    names: list[str] = []
    for target in targets:
        names += {ALL_LINEAR: _all_linear, ATTENTION: _attention}.get(target, lambda _, own=target: [own])(encoder)
    _refuse_vocabulary(encoder, names)
    return tuple(names)


def _all_linear(encoder: Encoder) -> list[str]:
    modules = encoder.model.named_modules()
    return [n for n, module in modules if isinstance(module, nn.Linear) and module is not encoder.output_head]


def _attention(encoder: Encoder) -> list[str]:
    """Linear layers beside the query projections, or queries, keys and values where these are slices of one layer."""
    parents = {name.rpartition(".")[0] for name in find_targets(encoder.model, encoder.attention_targets("query"))}
    beside = [name for name in _all_linear(encoder) if name.rpartition(".")[0] in parents]
    return beside or list(encoder.attention_targets("query", "key", "value"))


def _refuse_vocabulary(encoder: Encoder, targets: list[str]) -> None:
    model = encoder.model
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    named = [target for target in targets if any(name == target or name.endswith(f".{target}") for name in embeddings)]
    modules = dict(model.named_modules())
    chosen = [] if named else find_targets(model, targets)
    named += [name for name in chosen if modules.get(name) is encoder.output_head]
    if named:
        raise TargetError(
            f"'{named[0]}' is the model's vocabulary: an adapter of its embedding or output layer is not supported, as "
            "the two often share one weight; name layers of its blocks."
        )
