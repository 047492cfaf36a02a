"""Whether named arrays can be what a learner wrote: names, shapes, types and values, as far as they show by themselves.

Nothing here needs the model or torch. Each function yields ends of sentences that begin with the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from everlora.errors import StoreError
from everlora.peft_format import from_peft_tensors

__all__ = ["Shapes", "adapter_shapes", "check_adapter", "check_config", "check_finite", "check_head", "check_kept"]

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Layer name to the shapes of its two factors, `(rank, in, ...)` and `(out, rank, ...)`."""


def check_finite(arrays: Arrays, start: str = "") -> Iterator[str]:
    """Weights, named from `start` on, must be finite; other arrays may say NaN for what does not exist."""
    for name, array in sorted(arrays.items()):
        if name.startswith(start) and array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            yield f"holds {count} numbers in '{name}' that are not finite"


def adapter_shapes(arrays: Arrays) -> Shapes:
    """Shapes of the factors in a PEFT file.

    Raises:
        StoreError: a name is not one of PEFT's, or a layer has one factor only.
    """
    return {layer: (down.shape, up.shape) for layer, (down, up) in from_peft_tensors(arrays).items()}


def check_adapter(arrays: Arrays, earlier: Shapes) -> Iterator[str]:
    """Factors must be floats that fit each other, and the layer as earlier tasks knew it; `earlier` is added to."""
    try:
        shapes = adapter_shapes(arrays)
    except StoreError as error:
        yield f"is no adapter: {str(error).rpartition('; ')[0]}"
        return
    for name, array in sorted(arrays.items()):
        if array.dtype.kind != "f":
            yield f"holds '{name}' as {array.dtype}, where floating-point numbers are expected"
    for layer, (down, up) in shapes.items():
        if len(down) not in (2, 4) or len(down) != len(up) or down[0] != up[1]:
            yield f"holds factors of layer '{layer}' that do not fit each other, {down} and {up}"
            continue
        before = earlier.setdefault(layer, (down, up))
        if (before[0][1:], before[1][0]) != (down[1:], up[0]):
            yield f"holds factors of layer '{layer}' of shapes {down} and {up}, where an earlier task has {before}"


def check_config(config: Mapping[str, Any], ranks_beside: Mapping[str, int]) -> Iterator[str]:
    """The ranks that an adapter_config.json names must be those of the factors beside it."""
    pattern, common = config.get("rank_pattern"), config.get("r")
    if not isinstance(pattern, Mapping | None) or isinstance(common, bool) or not isinstance(common, int):
        yield "names no rank"
        return
    for layer, rank in ranks_beside.items():
        try:
            named = [value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", layer)]
        except re.error:
            yield "has a 'rank_pattern' that is no regular expression"
            return
        expected = named[0] if named else common
        if rank and expected != rank:
            yield f"names the rank {expected} for layer '{layer}', whose factors have {rank}"


def check_head(arrays: Arrays, values: Mapping[str, Any], widths: dict[str, int]) -> Iterator[str]:
    """A head has one row per class of its task, all heads of one width; `widths` is added to."""
    weight, bias, classes = arrays.get("head/weight"), arrays.get("head/bias"), values.get("classes")
    if weight is None:
        return
    if weight.ndim != 2 or weight.dtype.kind != "f":
        yield f"holds 'head/weight' of shape {weight.shape} and type {weight.dtype}, where rows of floats are expected"
        return
    if isinstance(classes, list) and len(classes) != len(weight):
        yield f"holds {len(weight)} rows in 'head/weight' for {len(classes)} classes"
    if bias is not None and bias.shape != weight.shape[:1]:
        yield f"holds 'head/bias' of shape {bias.shape} beside 'head/weight' of shape {weight.shape}"
    if widths.setdefault("head", weight.shape[1]) != weight.shape[1]:
        yield f"holds a head for {weight.shape[1]} features, where an earlier task has {widths['head']}"


def check_kept(arrays: Arrays) -> Iterator[str]:
    """Rows kept for validation: every list of strings ends where its bytes end, and all columns are of one length."""
    lengths = {"ids": len(arrays["ids"])} if "ids" in arrays and arrays["ids"].ndim == 1 else {}
    if not lengths:
        yield "holds no row numbers"
    if "images" in arrays:
        lengths["images"] = len(arrays["images"])
    for name in sorted(arrays):
        if not name.endswith(".ends"):
            continue
        ends, data = arrays[name], arrays.get(f"{name.removesuffix('.ends')}.bytes")
        lengths[name] = len(ends)
        end = int(ends[-1]) if len(ends) else 0
        if data is None or end != data.size or (np.diff(ends) < 0).any():
            yield f"holds strings in '{name}' that do not end where their bytes do"
    if len(set(lengths.values())) > 1:
        yield f"holds columns of different lengths, {lengths}"
