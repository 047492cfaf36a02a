"""What everlora needs to know of a PEFT model: its trained adapter, by names that do not depend on the adapter's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from everlora.errors import ModelError, StoreError, UnsupportedError

__all__ = [
    "adapter_config",
    "adapter_tensors",
    "check_config",
    "check_plain_lora",
    "evaluating",
    "refuse_sharded",
    "trained_adapter",
    "trained_places",
]

_MUST_AGREE = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def trained_adapter(model: Any) -> str:
    """Return the name of the one adapter of a PEFT model that is trained.

    Raises:
        ModelError: `model` is no PEFT model, or not exactly one of its adapters has parameters that are trained.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(f"expected a PEFT model, found {type(model).__name__}; wrap it by get_peft_model first")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    found = [name for name in model.peft_config if any(f".{name}." in f"{path}." for path in trained)]
    if len(found) != 1:
        raise ModelError(
            f"expected one adapter with trained parameters, found {found or 'none'}; freeze the others, or load the "
            "adapter with is_trainable=True"
        )
    return str(found[0])


def check_plain_lora(model: Any) -> None:
    """Refuse what a plain LoRA folder cannot hold, or what two adapters over one base would share.

    Raises:
        ModelError: see `trained_adapter`.
        UnsupportedError: another kind of adapter, trained biases, modules kept whole, trained weights outside the
            adapter, or an adapter on an output layer tied to the embeddings.
    """
    adapter = trained_adapter(model)
    config = model.peft_config[adapter]
    if config.peft_type != "LORA":
        raise UnsupportedError(f"expected a LoRA adapter, found {config.peft_type}; use peft.LoraConfig")
    for key, plain in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        found = getattr(config, key, plain)
        if found and found != plain:
            raise UnsupportedError(
                f"expected an adapter with {key}={plain!r}, found {found!r}: what it trains would be shared by the "
                "stable and the plastic adapter; leave the option out"
            )
    outside = [name for name, p in model.named_parameters() if p.requires_grad and f".{adapter}" not in name]
    if outside:
        raise UnsupportedError(f"expected only the adapter to be trained, found '{outside[0]}'; freeze the base model")
    base = model.get_base_model()
    if base.config.get_text_config().tie_word_embeddings:
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        if any(isinstance(end, nn.Module) and any(True for _ in _adapter_children(end, adapter)) for end in ends):
            raise UnsupportedError(
                "expected no adapter on embeddings that are tied to the output layer, found one; take them out of "
                "target_modules"
            )


def _adapter_children(module: nn.Module, adapter: str) -> Iterator[str]:
    """Names of the parameters below `module` that belong to an adapter."""
    return (name for name, _ in module.named_parameters() if f".{adapter}" in f".{name}")


def trained_places(model: PeftModel) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Find each trained parameter: the module that holds it, and under which attribute.

    Returns:
        Name with the adapter's own name left out, the same for any adapter of the same shape, to the place.
    """
    adapter = trained_adapter(model)
    places = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                parts = [part for part in (*path.split("."), attribute) if part != adapter]
                places[".".join(parts)] = (module, attribute, parameter)
    return places


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's weights as PEFT writes them to `adapter_model.safetensors`: contiguous, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def adapter_config(model: PeftModel, adapter: str) -> dict[str, Any]:
    """Return an adapter's configuration as PEFT writes it to `adapter_config.json`, for inference."""
    values: dict[str, Any] = model.peft_config[adapter].to_dict()
    values["inference_mode"] = True
    values["base_model_name_or_path"] = values.get("base_model_name_or_path") or _base_name(model)
    return {key: _plain(value) for key, value in values.items()}


def check_config(saved: Mapping[str, Any], model: PeftModel, adapter: str, *, folder: object) -> None:
    """Check that a saved adapter was made with the shape of one in a model.

    Raises:
        StoreError: rank, alpha, targets or kind of scaling differ.
    """
    own = adapter_config(model, adapter)
    for key in _MUST_AGREE:
        if _comparable(saved.get(key)) != _comparable(own.get(key)):
            raise StoreError(
                f"{folder}: expected an adapter with {key}={own.get(key)!r}, as the model has, found "
                f"{saved.get(key)!r}; make the model's adapter with the settings of the task before"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_sharded(args: Any) -> None:
    """Refuse training that splits parameters or gradients over processes.

    Raises:
        UnsupportedError: DeepSpeed or FSDP is in use.
    """
    from accelerate.state import AcceleratorState  # heavy, and of use only once a trainer has made one

    kind = str(AcceleratorState().distributed_type).upper() if AcceleratorState._shared_state else ""
    if args.deepspeed or args.fsdp or "DEEPSPEED" in kind or "FSDP" in kind:
        raise UnsupportedError(
            "expected whole parameters in each process, found DeepSpeed or FSDP, which split them or their gradients; "
            "train with one process or with torchrun (DDP)"
        )


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value))
    return value or None


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def _base_name(model: PeftModel) -> str | None:
    return getattr(model.get_base_model(), "name_or_path", None) or None
