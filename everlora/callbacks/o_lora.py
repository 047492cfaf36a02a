"""O-LoRA on PEFT adapters: a new adapter per task, in directions the frozen adapters before it do not use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn

from everlora.callbacks.adapters import adapter_config, check_plain_lora, trained_adapter
from everlora.callbacks.folders import adapter_files, load_tensors
from everlora.callbacks.regularizer import Examples, Regularizer
from everlora.errors import StoreError, UnsupportedError
from everlora.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    from_peft_tensors,
    lora_config,
    lora_scalings,
    to_peft_tensors,
)

__all__ = ["PAST", "OrthogonalAdapters", "OrthogonalOptions"]

PAST = "everlora_past"  # the adapter that holds all earlier tasks' factors, side by side
_FOLDER = "adapter"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class OrthogonalOptions:
    """Options of O-LoRA.

    Attributes:
        lambda_1: weight of the overlap between the rows of the new and of the earlier down-projections.
        lambda_2: weight of the norms of the new adapter's factors.
        orth_norm: sum the absolute values of the overlaps (`l1`, as the public code) or their squares (`fro2`).
    """

    lambda_1: Annotated[float, Field(ge=0)] = 0.5
    lambda_2: Annotated[float, Field(ge=0)] = 0.0
    orth_norm: Literal["l1", "fro2"] = "l1"


class OrthogonalAdapters(Regularizer):
    """`lambda_1 * sum |A_old A_new^T| + lambda_2 * sum (||A_new|| + ||B_new||)`, earlier adapters frozen and summed.

    Earlier tasks' factors lie side by side in one frozen PEFT adapter, so their number costs no further passes through
    a layer: of rank `r1 + r2 + ...`, its product is the sum of the tasks' products. It is active along with the new one
    in training and prediction, and the base's weights are never touched.

    Source: Wang et al., 2023 (O-LoRA); section 10 of the reference on I-LoRA.
    """

    options_type: ClassVar[type] = OrthogonalOptions
    needs_examples: ClassVar[bool] = False
    options: OrthogonalOptions

    def __init__(self, options: OrthogonalOptions) -> None:
        super().__init__(options)
        self.past: dict[str, tuple[Tensor, Tensor]] = {}  # layer to (down, up), all earlier tasks
        self.config: dict[str, Any] = {}
        self.ranks: list[int] = []
        self._earlier: dict[str, tuple[Tensor, Tensor]] = {}
        self._earlier_config: dict[str, Any] = {}
        self._earlier_ranks: list[int] = []
        self._layers: dict[str, tuple[LoraLayer, str]] = {}
        self._attached: object = None  # what the model's adapter of earlier tasks was made of

    def begin(self, model: PeftModel, *, resumed: bool) -> None:
        """Put the earlier tasks' adapter beside the new one, frozen and active."""
        check_plain_lora(model)
        adapter = trained_adapter(model)
        if model.peft_config[adapter].use_dora:
            raise UnsupportedError("expected use_dora=False for o_lora, found True: DoRA adapters do not add up")
        self._layers = _adapted(model, adapter)
        self._refuse_repeated()
        self._earlier, self._earlier_config = dict(self.past), dict(self.config)
        self._earlier_ranks = list(self.ranks)
        if self.past:
            if self._attached is not self.past or PAST not in model.peft_config:
                _attach_past(model, self.past, self.config)
                self._attached = self.past
            _activate(model, adapter)

    def penalty(self, model: PeftModel) -> Tensor:
        """Return the penalty; a graph leads to the trained factors."""
        terms = list(self._terms(model))
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def gradients(self, model: PeftModel) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the penalty's gradients, by autograd over the factors alone."""
        with torch.enable_grad():
            terms = list(self._terms(model))
            if not terms:
                return
            factors = [f for layer, name in self._adapted(model).values() for f in _factors(layer, name)]
            found = torch.autograd.grad(torch.stack(terms).sum(), factors, allow_unused=True)
        yield from ((factor, g) for factor, g in zip(factors, found, strict=True) if g is not None)

    def finish(self, model: PeftModel, examples: Examples) -> None:
        """Lay the new adapter's factors beside the earlier tasks'."""
        adapter = trained_adapter(model)
        joined: dict[str, tuple[Tensor, Tensor]] = {}
        scales = dict.fromkeys(self._earlier, 1.0)
        for name, (layer, _) in self._adapted(model).items():
            down, up = (factor.detach().float().cpu() for factor in _factors(layer, adapter))
            scales[name] = float(layer.scaling[adapter])
            if name in self._earlier:
                old_down, old_up = self._earlier[name]
                ratio = _scaling(self._earlier_config, name, len(old_down)) / scales[name]
                down, up = torch.cat([old_down, down]), torch.cat([old_up * ratio, up], dim=1)
            joined[name] = (down, up)
        for name in self._earlier.keys() - joined.keys():
            joined[name] = self._earlier[name]
            scales[name] = _scaling(self._earlier_config, name, len(joined[name][0]))
        self.past = {name: joined[name] for name in sorted(joined)}
        self.config = _joined_config(model, adapter, self.past, scales)
        self.ranks = [*self._earlier_ranks, int(model.peft_config[adapter].r)]

    def files(self) -> dict[str, bytes]:
        """Return the sum of all tasks' adapters as one plain PEFT folder."""
        files = adapter_files(to_peft_tensors(self.past), self.config)
        return {f"{_FOLDER}/{name}": data for name, data in files.items()}

    def record(self) -> dict[str, Any]:
        """Return the rank of each task's adapter."""
        return {"ranks": self.ranks}

    def load(self, record: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Put back the earlier tasks' factors."""
        weights, config = f"{_FOLDER}/{ADAPTER_WEIGHTS}", f"{_FOLDER}/{ADAPTER_CONFIG}"
        if weights not in files or config not in files:
            raise StoreError(f"expected a folder {_FOLDER}, found none; the folder was written by another method")
        self.past = from_peft_tensors(load_tensors(files[weights], Path(weights)))
        self.config = json.loads(files[config])
        self.ranks = [int(rank) for rank in record["ranks"]]
        self._earlier, self._earlier_config, self._earlier_ranks = dict(self.past), dict(self.config), list(self.ranks)

    def _adapted(self, model: PeftModel) -> dict[str, tuple[LoraLayer, str]]:
        return self._layers or _adapted(model, trained_adapter(model))

    def _terms(self, model: PeftModel) -> Iterator[Tensor]:
        for name, (layer, adapter) in self._adapted(model).items():
            down, up = _factors(layer, adapter)
            if self.options.lambda_1 and name in self._earlier:
                old, _ = _factors(layer, PAST)
                overlap = old.detach().float() @ down.float().T
                size = overlap.abs() if self.options.orth_norm == "l1" else overlap.square()
                yield self.options.lambda_1 * size.sum()
            if self.options.lambda_2:
                yield self.options.lambda_2 * (down.float().norm() + up.float().norm())

    def _refuse_repeated(self) -> None:
        """Refuse an adapter that is already among the earlier ones: its product would count twice."""
        for name, (layer, adapter) in self._layers.items():
            down, _ = _factors(layer, adapter)
            past = self.past.get(name, (down[:0], down[:0]))[0]
            if len(past) < len(down) or not torch.equal(past[-len(down) :], down.detach().float().cpu()):
                return
        raise UnsupportedError(
            "expected a new adapter for the new task, found the one of the task before, which would count twice; make "
            "one with get_peft_model, or with add_adapter and set_adapter"
        )


def _adapted(model: PeftModel, adapter: str) -> dict[str, tuple[LoraLayer, str]]:
    """Layers that an adapter has factors in, by their name in the base model."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            if not isinstance(module.get_base_layer(), nn.Linear) or adapter not in module.lora_A:
                raise UnsupportedError(
                    f"expected linear layers for o_lora, found '{path}'; leave it out of the targets"
                )
            layers[path.removeprefix(_PREFIX)] = (module, adapter)
    return layers


def _factors(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _attach_past(model: PeftModel, past: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> None:
    """Add the adapter of earlier tasks, or renew it."""
    if PAST in model.peft_config:
        model.delete_adapter(PAST)
    model.add_adapter(PAST, LoraConfig.from_peft_type(**config))
    loaded = set_peft_model_state_dict(model, to_peft_tensors(past), adapter_name=PAST)
    if loaded.unexpected_keys:
        raise StoreError(
            f"expected a model with the layers earlier tasks adapted, found none for '{loaded.unexpected_keys[0]}'; "
            "use the same base model"
        )


def _activate(model: PeftModel, adapter: str) -> None:
    """Let both adapters take part in the forward pass; only the new one stays trained."""
    model.base_model.set_adapter([adapter, PAST])
    model.set_requires_grad(PAST, requires_grad=False)


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    return lora_scalings(config, {layer: rank})[layer]


def _joined_config(
    model: PeftModel, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]
) -> dict[str, Any]:
    """Describe joined factors to PEFT, each layer with the scaling it had."""
    own = adapter_config(model, adapter)
    ranks = {name: len(down) for name, (down, _) in factors.items()}
    config = lora_config(
        ranks,
        base_model=own["base_model_name_or_path"],
        alphas={name: scales[name] * rank for name, rank in ranks.items()},
        modules=[name for name, _ in model.get_base_model().named_modules()],
        transposed=bool(own["fan_in_fan_out"]),
    )
    return {**config, "task_type": own["task_type"]}
