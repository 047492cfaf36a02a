"""Gradient checkpointing: blocks of a network are computed again on the way back instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from everlora.backbones import Backbone
from everlora.errors import UnsupportedError

__all__ = ["checkpointing", "set_blocks_training"]

_FLAG = "gradient_checkpointing"


@contextmanager
def checkpointing(backbone: Backbone, enabled: bool) -> Iterator[None]:
    """Let the blocks of a network be computed again on the way back, inside a `with` block.

    Raises:
        UnsupportedError: the network has no blocks that can be.
    """
    if not enabled:
        yield
        return
    model: Any = backbone.model
    blocks = _blocks(model)
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError(
            f"{backbone.architecture} cannot compute its blocks again; leave checkpoint_gradients out, or use a larger "
            "micro_batches to save memory."
        )
    # The older names are deprecated where the newer ones exist.
    start = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    stop = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    start({"use_reentrant": False})
    # What only the reentrant kind needs: inputs of the first block with gradients, which would cost time for nothing.
    model.disable_input_require_grads()
    try:
        yield
    finally:
        stop()


def set_blocks_training(backbone: Backbone) -> None:
    """Say that checkpointed blocks train, though what is inside them may not: they look at their own mode alone."""
    for block in _blocks(backbone.model):
        if getattr(block, _FLAG):
            block.training = True


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, _FLAG)]
