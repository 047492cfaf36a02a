"""An optimiser's moments as plain tensors, to be carried from one task to the next."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from everlora.errors import ShapeError

__all__ = ["moments", "put_back"]

logger = logging.getLogger("everlora.training")

_OWN_TO_A_TASK = ("head",)
Groups = Mapping[str, Sequence[nn.Parameter]]


def moments(optimizer: torch.optim.Optimizer, groups: Groups) -> dict[str, Tensor]:
    """Return what the optimiser knows of each parameter, on the CPU, by group, place in it and name.

    A head belongs to its task, so what is known of it is left out.

    Args:
        optimizer: after training.
        groups: the parameters by group, as the optimiser was made for.
    """
    known: dict[str, Tensor] = {}
    for key, parameter in _parameters(groups):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                known[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone()
    return known


def put_back(optimizer: torch.optim.Optimizer, groups: Groups, known: Mapping[str, Tensor]) -> None:
    """Let an optimiser go on from what `moments` returned; one of another kind starts anew, and says so in the log.

    Raises:
        ShapeError: a tensor does not fit its parameter.
    """
    names = {key.rpartition("/")[2] for key in known}
    wanted = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    if not known or names != wanted:
        if known:
            logger.warning("the optimiser is of another kind than before and starts without moments")
        return
    for key, parameter in _parameters(groups):
        entry = {name: known[f"{key}/{name}"] for name in wanted if f"{key}/{name}" in known}
        for name, value in entry.items():
            if name != "step" and value.shape != parameter.shape:
                raise ShapeError(
                    f"expected {name} of '{key}' in shape {tuple(parameter.shape)}, found {tuple(value.shape)}; train "
                    "the same layers with the same rank, or let the optimiser start anew"
                )
        if entry:
            # the count of steps stays on the CPU, where the optimiser keeps it
            optimizer.state[parameter] = {
                name: value.clone() if name == "step" else value.to(parameter.device, parameter.dtype, copy=True)
                for name, value in entry.items()
            }


def _parameters(groups: Groups) -> Iterator[tuple[str, nn.Parameter]]:
    for group, parameters in groups.items():
        if group not in _OWN_TO_A_TASK:
            for place, parameter in enumerate(parameters):
                yield f"{group}/{place:04d}", parameter
