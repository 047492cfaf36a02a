"""The one place that knows how PEFT names low-rank factors; imports no torch.

PEFT calls the down-projection `lora_A` and the up-projection `lora_B`; everything else in everlora says `down` and
`up`. A layer's output gains `scaling * B A x` with `scaling = lora_alpha / r`, which is 1 unless alphas are given. The
factors of a convolution are kernels, `(rank, in, k1, k2)` and `(out, rank, 1, 1)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from everlora.errors import StoreError, UnsupportedError

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "from_peft_tensors",
    "lora_config",
    "lora_scalings",
    "module_tensors",
    "saved_modules",
    "to_peft_tensors",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"

# What an adapter must not have beside a product of two factors, and the value that says so.
_PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "layer_replication": None}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

Array = TypeVar("Array")


def to_peft_tensors(factors: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
    """Name the factors of layers the way PEFT does.

    Args:
        factors: layer name to `(down, up)`, `(rank, in)` and `(out, rank)`; arrays or tensors, handed through.

    Returns:
        `base_model.model.<layer>.lora_A.weight` to `down`, and the same with `lora_B` to `up`.
    """
    tensors: dict[str, Array] = {}
    for layer, (down, up) in factors.items():
        tensors[f"{_PREFIX}{layer}{_DOWN}"] = down
        tensors[f"{_PREFIX}{layer}{_UP}"] = up
    return tensors


def from_peft_tensors(tensors: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Undo `to_peft_tensors`.

    Returns:
        Layer name to `(down, up)`, sorted by name.

    Raises:
        StoreError: a name is not one of PEFT's, or a layer has only one of its two factors.
    """
    halves: dict[str, dict[str, Array]] = {}
    for name, value in tensors.items():
        ending = next((ending for ending in (_DOWN, _UP) if name.endswith(ending)), None)
        if ending is None or not name.startswith(_PREFIX):
            raise StoreError(
                f"expected adapter tensors named {_PREFIX}<layer>{_DOWN} or {_UP}, found {name!r}; "
                "the file is not a plain LoRA adapter"
            )
        halves.setdefault(name[len(_PREFIX) : -len(ending)], {})[ending] = value
    single = sorted(layer for layer, pair in halves.items() if len(pair) != 2)
    if single:
        raise StoreError(f"expected both factors of layer {single[0]}, found one; the adapter file is incomplete")
    return {layer: (halves[layer][_DOWN], halves[layer][_UP]) for layer in sorted(halves)}


def saved_modules(wanted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return which modules PEFT keeps whole when `modules_to_save` names some: all whose names end like one of those.

    Args:
        wanted: names in `modules_to_save`.
        modules: qualified names of all modules of the base model.
    """
    endings = tuple(wanted)
    return [name for name in modules if name.endswith(endings)] if endings else []


def module_tensors(module: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Name the tensors of a module that is kept whole the way PEFT does, running statistics included.

    Args:
        module: its qualified name in the base model.
        tensors: its state.
    """
    return {f"{_PREFIX}{module}.{name}": tensor for name, tensor in tensors.items()}


def lora_scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Read from an `adapter_config.json` what PEFT multiplies the product of each layer's factors with.

    Args:
        config: its content.
        ranks: layer name to the rank of its factors.

    Returns:
        Layer name to `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.

    Raises:
        UnsupportedError: the adapter does more than add a product of two factors to the base's own weights.
        StoreError: the content is not that of a LoRA adapter.
    """
    kind = config.get("peft_type")
    odd = [key for key, plain in _PLAIN.items() if config.get(key) not in (plain, None)]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        odd.append("init_lora_weights")  # other ways to start change the base's weights as well
    if odd or kind != "LORA":
        key = odd[0] if kind == "LORA" else "peft_type"
        raise UnsupportedError(
            f"expected a plain LoRA adapter, found one with {key}={config.get(key)!r}; convert it to a plain one"
        )
    power = 0.5 if config.get("use_rslora") else 1.0
    return {layer: _alpha_of(layer, config) / rank**power if rank else 0.0 for layer, rank in ranks.items()}


def _alpha_of(layer: str, config: Mapping[str, Any]) -> float:
    """Find `lora_alpha` of a layer; the keys of its pattern are regular expressions for the end of a name."""
    try:
        pattern = dict(config.get("alpha_pattern") or {})
        values = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
        return float(next(values, config["lora_alpha"]))
    except (re.error, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"expected a number as lora_alpha of layer {layer} in {ADAPTER_CONFIG}, found: {error}; mend the file"
        ) from error


def lora_config(
    ranks: Mapping[str, int],
    *,
    base_model: str | None = None,
    base_class: tuple[str, str] | str | None = None,
    transposed: bool = False,
    alphas: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    modules: Iterable[str] = (),
) -> dict[str, Any]:
    """Describe factors as the content of PEFT's `adapter_config.json`.

    Args:
        ranks: layer name to rank; ranks may differ. Layers of rank 0 are left out, as PEFT has none.
        base_model: hub id or folder of the base model.
        base_class: name and module of the base model's class, for PEFT's `AutoPeftModel`; or PEFT's name of the task,
            such as `"CAUSAL_LM"`, where transformers finds the class by the base's own config.
        transposed: the base layers hold their weights as `(in, out)`, which PEFT wants to know; factors are written
            the same way in either case.
        alphas: layer name to `lora_alpha`; None for `lora_alpha = r` throughout, so that PEFT's scaling is 1.
        modules_to_save: names of the modules that are kept whole beside the factors, see `saved_modules`.
        modules: names of all modules of the base model; those that end like an adapted layer are told apart from it.

    Returns:
        A JSON-ready dict.

    Raises:
        UnsupportedError: no layer has a rank above 0.
    """
    present = {layer: int(rank) for layer, rank in sorted(ranks.items()) if rank > 0}
    if not present:
        raise UnsupportedError("a PEFT adapter needs low-rank factors, and no layer has any; export merged instead")
    largest = max(present.values())
    wanted = present if alphas is None else {layer: alphas[layer] for layer in present}
    alpha = wanted[max(present, key=present.__getitem__)]
    auto_mapping = None
    if isinstance(base_class, tuple):
        auto_mapping = {"base_model_class": base_class[0], "parent_library": base_class[1]}
    return {
        "alpha_pattern": _pattern(wanted, alpha),
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": _pattern(present, largest),
        "target_modules": _targets(present, modules),
        "task_type": base_class if isinstance(base_class, str) else None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(layers: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """The layers as PEFT takes them: by the ends of their names, or as one expression where those select others, too.

    Where they are all the modules with some last components, these are given, as one writes them by hand.
    """
    names = list(layers)
    others = set(modules) - set(names)
    last = sorted({name.rpartition(".")[2] for name in names})
    if set(names) <= set(modules) and not any(other.rpartition(".")[2] in last for other in others):
        return last
    if any(other.endswith(tuple(f".{name}" for name in names)) for other in others):
        return "|".join(re.escape(name) for name in names)
    return names


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Those values that are not the default; PEFT reads the keys of a pattern as expressions for the end of a name."""
    pattern = {}
    for layer, value in values.items():
        if value != default:
            ends_others = any(other.endswith(f".{layer}") for other in values)
            pattern[("^" if ends_others else "") + re.escape(layer)] = value
    return pattern
