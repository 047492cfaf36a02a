"""The Muon optimiser, in float32 and batched over matrices of one shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return roughly `U V^T` of every `U S V^T`, by the quintic Newton-Schulz iteration in the input's own precision.

    Args:
        matrices: `(n, rows, columns)` with `rows <= columns`; one batched product for all, since small ones one by
            one leave a CPU's threads waiting.
        steps: iterations.

    Returns:
        `(n, rows, columns)`, singular values near 1.

    Source: Jordan et al., "Muon", 2024, with its coefficients. In float32 rather than bfloat16: CPUs without bfloat16
    units are an order of magnitude slower in it.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised, for the matrices of the hidden layers; sized so that AdamW's rates fit.

    Source: Jordan et al., "Muon", 2024; the factor `0.2 sqrt(max(rows, columns))` is that of Liu et al., 2025.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient, those of one shape together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for shape, parameters in shapes.items():
                directions = torch.stack([self._direction(p, group["momentum"]) for p in parameters])
                scale = group["lr"] * 0.2 * math.sqrt(shape[1])
                for parameter, change in zip(parameters, orthogonalise(directions), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(change.T if parameter.shape[0] > parameter.shape[1] else change, alpha=-scale)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Return the Nesterov momentum of one matrix, transposed where it is taller than wide."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        direction: Tensor = parameter.grad.lerp(state["momentum"], momentum)
        return direction.T if direction.shape[0] > direction.shape[1] else direction
