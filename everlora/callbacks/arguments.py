"""The parameters of I-LoRA in a Trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from everlora.errors import OptionError
from everlora.methods.registry import parse_options

__all__ = ["ILoraArguments", "resolve_layers"]


@dataclass(frozen=True)
class ILoraArguments:
    """How `everlora_trainer` keeps what earlier tasks taught; the first twelve are the documented parameters.

    Attributes:
        use_ilora: False leaves the trainer as it is without everlora. (True here, as passing these arguments says it.)
        ema_alpha: weight of the old value as the stable adapter follows the plastic one.
        consistency_weight: weight of the distance between the two adapters' hidden states on memory rows; 0 skips
            the stable pass.
        ilora_buffer_size: examples kept of earlier tasks; 0 replays nothing.
        selective_update: let the stable adapter follow only after steps on which the plastic one is better.
        min_update_threshold: relative gain in cross-entropy that counts as better.
        hidden_state_layers: which hidden states, 0 (embeddings) to the number of blocks, negative from the end, or
            `all`. Those in between are residual streams, whose few large channels rule the distance.
        save_ema_adapter: write the stable adapter as a PEFT folder; False keeps it in `state/` alone.
        ema_adapter_path: where the stable adapter is written to and read from instead of `stable/`; relative to the
            trainer's `output_dir`.
        previous_task_model: folder that `save_adapters` wrote after the task before, or a plain PEFT folder.
        current_task_id: name of this task; None numbers it.
        prev_task_id: what the last task in that folder must be called; None does not ask.
        ema_warmup: begin with the plain mean of all plastic adapters so far, until `ema_alpha` takes over.
        ema_horizon: set `ema_alpha` by the task's steps S instead, to `1 - 1 / (ema_horizon * S)`; 1/3 suits.
        consistency_mode: `mse`, or `one_sided`, which counts only where the stable adapter's value is the larger.
        replay_ratio: memory rows for each row of the batch.
        buffer_policy: `reservoir` keeps each example that went by with the same chance; `balanced` gives each task
            the same room.
        inference_adapter: which adapter `evaluate` and `predict` use.
        save_buffer: write the memory's examples along; without them the next task replays nothing.

    Raises:
        OptionError: a value is of the wrong type or out of range.

    Source: section 3 of the reference on I-LoRA.
    """

    use_ilora: bool = True
    ema_alpha: Annotated[float, Field(ge=0, le=1)] = 0.999
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    ilora_buffer_size: Annotated[int, Field(ge=0)] = 500
    selective_update: bool = False
    min_update_threshold: float = 0.1
    hidden_state_layers: tuple[int, ...] | Literal["all"] = (-1,)
    save_ema_adapter: bool = True
    ema_adapter_path: str | Path | None = None
    previous_task_model: str | Path | None = None
    current_task_id: str | None = None
    prev_task_id: str | None = None
    ema_warmup: bool = True
    ema_horizon: Annotated[float, Field(gt=0)] | None = None
    consistency_mode: Literal["mse", "one_sided"] = "mse"
    replay_ratio: Annotated[float, Field(ge=0)] = 1.0
    buffer_policy: Literal["reservoir", "balanced"] = "reservoir"
    inference_adapter: Literal["stable", "plastic"] = "stable"
    save_buffer: bool = True

    def checked(self) -> ILoraArguments:
        """Return these arguments with each value checked and brought to its type.

        Raises:
            OptionError: see the class; also a former task's name without the folder it is to be found in.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        checked = parse_options(ILoraArguments, values, "ILoraArguments")
        if checked.prev_task_id is not None and checked.previous_task_model is None:
            raise OptionError(
                f"expected previous_task_model along with prev_task_id={checked.prev_task_id!r}, found none; name the "
                "folder of the task before"
            )
        return checked

    def plain(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def resolve_layers(layers: tuple[int, ...] | str, num_blocks: int) -> tuple[int, ...]:
    """Resolve hidden-state numbers to 0..`num_blocks`, each once, in ascending order.

    Raises:
        OptionError: one is out of range, or there are none.
    """
    if isinstance(layers, str):
        return tuple(range(num_blocks + 1))
    wrong = [layer for layer in layers if not -num_blocks - 1 <= layer <= num_blocks]
    if wrong or not layers:
        raise OptionError(
            f"expected hidden_state_layers from {-num_blocks - 1} to {num_blocks}, as the model has {num_blocks} "
            f"blocks, found {wrong[0] if wrong else 'none'}"
        )
    return tuple(sorted({layer % (num_blocks + 1) for layer in layers}))
