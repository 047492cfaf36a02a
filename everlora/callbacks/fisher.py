"""How much the likelihood of a task's answers depends on each weight of the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from everlora.callbacks.adapters import evaluating
from everlora.callbacks.regularizer import Examples
from everlora.errors import DataError, NumericError
from everlora.methods.keys import keyed_generator

__all__ = ["fisher_information", "single_rows"]


def fisher_information(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], examples: Examples, *, limit: int
) -> tuple[dict[str, Tensor], int]:
    """Measure the diagonal of the empirical Fisher information, in evaluation mode and float32.

    `F = 1/n sum_i (d/dtheta mean-token negative log-likelihood of example i)^2`: squared for each example by itself,
    since the square of a batch's mean gradient is near zero for a trained model.

    Args:
        model: returns the mean over a row's supervised tokens as `loss`.
        parameters: theta by name.
        examples: batches of one row; those without a supervised token are left out.
        limit: n, at most.

    Returns:
        F by the same names, and n.

    Raises:
        DataError: no example has a label that is predicted.
        NumericError: a gradient is NaN or infinite.

    Source: section 10 of the reference on I-LoRA.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    used = 0
    with evaluating(model), torch.enable_grad():
        for example in examples:
            row = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in example.items()}
            if not (row["labels"][..., 1:] != -100).any():
                continue
            loss = model(**row, use_cache=False)["loss"]
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float().square())
            used += 1
            if used == limit:
                break
    if not used:
        raise DataError("expected examples with labels to measure the Fisher information on, found none; check them")
    broken = [name for name, total in sums.items() if not total.isfinite().all()]
    if broken:
        raise NumericError(f"the Fisher information of '{broken[0]}' is not finite: the training has diverged")
    return {name: total / used for name, total in sums.items()}, used


def single_rows(dataloader: Any, *, keys: tuple[object, ...]) -> Iterator[Mapping[str, Any]]:
    """Yield rows of a data loader's data set, one in each batch, without touching the loader's own order.

    Drawn at random by `keys` where the data set can be indexed; the first ones where it is a stream.

    Args:
        dataloader: a torch DataLoader.
        keys: seed and whatever tells this draw from others.

    Raises:
        DataError: a row has no labels.
    """
    if not isinstance(dataloader, DataLoader):
        raise DataError(f"expected a torch DataLoader, found {type(dataloader).__name__}; pass the training's own")
    dataset: Any = dataloader.dataset
    if isinstance(dataset, IterableDataset):
        for batch in dataloader:
            yield from _split(_checked(batch))
        return
    for index in torch.randperm(len(dataset), generator=keyed_generator(*keys)).tolist():
        yield _checked(dataloader.collate_fn([dataset[index]]))


def _checked(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        raise DataError("expected batches with labels, found none; use a data collator that makes labels")
    return batch


def _split(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    count = len(batch["labels"])
    for row in range(count):
        yield {k: v[row : row + 1] if isinstance(v, Tensor) and len(v) == count else v for k, v in batch.items()}
