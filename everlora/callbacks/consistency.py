"""Hidden states of both adapters on memory rows, and the distance between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlora.callbacks.tokens import IGNORED

__all__ = ["HiddenStates", "distance", "summed_cross_entropy"]


class HiddenStates:
    """Hidden states of a causal language model's body, whoever calls it and whatever becomes of its output.

    Args:
        body: the model below its output layer; its output has `last_hidden_state`, after the final norm.
        layers: numbers 0 to `num_blocks`.
        num_blocks: number of blocks.
    """

    def __init__(self, body: nn.Module, layers: Sequence[int], *, num_blocks: int) -> None:
        self.body = body
        self.layers = tuple(layers)
        self._needs_all = any(layer != num_blocks for layer in layers)
        self.states: tuple[Tensor, ...] = ()
        self.last: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the hidden states of the next pass that has gradients, with their graph."""
        handles = [self.body.register_forward_hook(self._keep)]
        if self._needs_all:
            handles.append(self.body.register_forward_pre_hook(_ask_for_all, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def compute(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the body without gradients and without the output layer.

        Returns:
            The last hidden states `(n, T, d)`, and those of `layers`.
        """
        with torch.no_grad():
            output = self.body(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                output_hidden_states=self._needs_all,
            )
        return output.last_hidden_state, self._chosen(output)

    def _chosen(self, output: Any) -> tuple[Tensor, ...]:
        if not self._needs_all:
            return (output.last_hidden_state,) * len(self.layers)
        return tuple(output.hidden_states[layer] for layer in self.layers)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        # Some trainers compute figures by a second pass without gradients: the first one is the one that counts.
        if torch.is_grad_enabled():
            self.states, self.last = self._chosen(output), output.last_hidden_state


def _ask_for_all(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True}


def distance(plastic: Sequence[Tensor], stable: Sequence[Tensor], mask: Tensor, *, one_sided: bool) -> Tensor:
    """Sum squared differences over attended tokens, averaged over layers and channels.

    Args:
        plastic: `(m, T, d)` each, with a graph.
        stable: the same, without; what either has beyond the mask's length is padding.
        mask: `(m, T)`, 1 for tokens, 0 for padding.
        one_sided: count only where the stable value is the larger.

    Returns:
        `1 / (|S| d) sum_l sum_tokens ||plastic - stable||^2`, float32.

    Source: section 2 of the reference on I-LoRA.
    """
    total = torch.zeros((), device=mask.device)
    present = mask.bool()
    for moved, target in zip(plastic, stable, strict=True):
        kept, other = (states[:, : mask.shape[1]][present].float() for states in (moved, target))
        difference = other - kept
        difference = difference.relu() if one_sided else difference
        total = total + difference.square().sum() / target.shape[-1]
    return total / len(stable)


def summed_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Sum the cross-entropy over supervised tokens, without gradients.

    Args:
        hidden: `(n, T, d)` last hidden states.
        labels: `(n, T)`, unshifted.
        head: the output layer.
    """
    with torch.no_grad():
        targets = labels[:, 1:]
        chosen = targets != IGNORED
        return functional.cross_entropy(head(hidden[:, :-1][chosen]).float(), targets[chosen], reduction="sum")
