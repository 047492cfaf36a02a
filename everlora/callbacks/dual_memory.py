"""I-LoRA beside a trainer: the stable adapter, the memory, and what one optimiser step needs of both."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from everlora.callbacks.adapters import check_plain_lora, trained_adapter
from everlora.callbacks.arguments import ILoraArguments, resolve_layers
from everlora.callbacks.consistency import HiddenStates, distance, summed_cross_entropy
from everlora.callbacks.memory import TaskMemory
from everlora.callbacks.stable import StableAdapter
from everlora.callbacks.tokens import Batch, checked_batch, joined, num_supervised
from everlora.errors import OptionError, UnsupportedError
from everlora.lowrank import retention

__all__ = ["DualMemory"]

logger = logging.getLogger("everlora.callbacks")


class DualMemory:
    """What I-LoRA carries along a training: `k`, the stable adapter, the examples and the names of the tasks.

    Args:
        model: a PEFT causal language model with one trained LoRA adapter: the plastic one.
        arguments: checked.
        accelerator: of the trainer.
        seed: of draws and insertions.
        pad_token_id: fills rows up.

    Attributes:
        updates: how often the stable adapter was moved since the first task began, k.
        history: names of the tasks that are done.
        task_id: name of the task that is being learned.
        ema_alpha: weight of the old value after warm-up.

    Raises:
        UnsupportedError: see `check_plain_lora`.
        OptionError: a hidden state the model does not have.
    """

    def __init__(
        self, model: PeftModel, arguments: ILoraArguments, accelerator: Accelerator, *, seed: int, pad_token_id: int
    ) -> None:
        check_plain_lora(model)
        self.model = model
        self.arguments = arguments
        self.accelerator = accelerator
        self.adapter = trained_adapter(model)
        self.stable = StableAdapter(model)
        base = model.get_base_model()
        config = base.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        num_blocks = int(config.num_hidden_layers)
        layers = resolve_layers(arguments.hidden_state_layers, num_blocks)
        self.hidden = HiddenStates(base.base_model, layers, num_blocks=num_blocks)
        self._head = base.get_output_embeddings()
        self.memory = TaskMemory(
            arguments.ilora_buffer_size,
            policy=arguments.buffer_policy,
            seed=seed,
            vocab_size=self.vocab_size,
            pad_token_id=pad_token_id,
        )
        self.updates = 0
        self.history: list[str] = []
        self.task_id = arguments.current_task_id or "task-000"
        self.ema_alpha = arguments.ema_alpha
        self.last_retention: float | None = None
        self.is_finished = False
        self._queue: deque[Batch | None] = deque()
        self._num_attended = 0.0
        self._targets: tuple[Tensor, ...] = ()  # hidden states of memory rows, and all rows' last: the stable adapter's
        self._stable_last: Tensor | None = None
        self._mask: Tensor | None = None  # attention mask of the memory rows
        self._gate = torch.zeros(2, dtype=torch.float64)
        self._gates = [0, 0]  # open, all: since the last log
        self._distances = torch.zeros((), dtype=torch.float64)
        self._steps = 0

    def name_task(self) -> None:
        """Settle the name of the task, once the names of those before are known.

        Raises:
            OptionError: an earlier task has it.
        """
        self.task_id = self.arguments.current_task_id or f"task-{len(self.history):03d}"
        if self.task_id in self.history:
            raise OptionError(
                f"expected a new current_task_id, found '{self.task_id}' of an earlier task; choose another"
            )

    def begin_task(self, num_steps: int) -> None:
        """Set the retention for a task of `num_steps` optimiser steps, and warn where it is too slow for it."""
        horizon = self.arguments.ema_horizon
        if horizon is not None:
            self.ema_alpha = max(0.0, 1.0 - 1.0 / (horizon * max(num_steps, 1)))
            logger.info("ema_alpha is %.6f for %d steps", self.ema_alpha, num_steps)
        left = self.ema_alpha**num_steps
        warm = self.arguments.ema_warmup and retention(self.updates, self.ema_alpha, True) < self.ema_alpha
        if left > 0.5 and not warm:
            logger.warning(
                "after this task's %d steps the stable adapter will still be %.0f %% what it was before, with "
                "ema_alpha=%g; set ema_horizon=1/3 or a lower ema_alpha",
                num_steps,
                100 * left,
                self.ema_alpha,
            )

    def begin_step(
        self, batches: Sequence[Mapping[str, Any]], num_items: Any, *, step: int, average_over_processes: bool
    ) -> Any:
        """Draw the memory rows of all batches of an optimiser step.

        Args:
            batches: of this process.
            num_items: their supervised tokens, as the Trainer counts them.
            step: number of the optimiser step in this task.
            average_over_processes: the Trainer counts tokens of all processes together.

        Returns:
            `num_items` with the memory's supervised tokens.

        Raises:
            UnsupportedError: the Trainer does not count tokens, as the model's loss does not take the count.
        """
        self._queue.clear()
        if not len(self.memory) or not self.arguments.replay_ratio:
            return num_items
        if num_items is None:
            raise UnsupportedError(
                "expected a model whose loss takes num_items_in_batch, and batches with labels, found none: without "
                "the count, replayed rows cannot be weighed against current ones"
            )
        supervised = attended = 0
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for number, batch in enumerate(batches):
            count = round(self.arguments.replay_ratio * len(batch["input_ids"]))
            keys = (len(self.history), step, number)
            drawn = self.memory.draw(count, keys=keys, rank=rank, world=world)
            self._queue.append(drawn)
            if drawn is not None:
                supervised += num_supervised(drawn["labels"])
                attended += int(drawn["attention_mask"].sum())
        counts = torch.tensor([supervised, attended], device=self.accelerator.device)
        if average_over_processes and world > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._num_attended = float(counts[1])
        return num_items + counts[0]

    def next_rows(self) -> Batch | None:
        """Return the memory rows of the next batch of the step; None where there are none."""
        return self._queue.popleft() if self._queue else None

    def prepare(self, inputs: Mapping[str, Any], memory: Batch | None) -> Batch:
        """Join a batch and its memory rows, and compute what the stable adapter makes of them.

        Args:
            inputs: the current rows.
            memory: from `next_rows`.

        Raises:
            DataError, UnsupportedError: see `checked_batch`.
        """
        batch = current = checked_batch(inputs)
        self._targets, self._mask, self._stable_last = (), None, None
        if memory is not None:
            memory = {name: value.to(current["input_ids"].device) for name, value in memory.items()}
            batch = joined(current, memory, pad_token_id=self.memory.pad_token_id)
            self._mask = memory["attention_mask"]
        if self.arguments.selective_update:
            self._stable_last, states = self._stable_pass(batch)
            self._targets = tuple(state[len(current["input_ids"]) :] for state in states)
        elif memory is not None and self.arguments.consistency_weight:
            _, self._targets = self._stable_pass(memory)
        return batch

    def consistency(self, labels: Tensor, *, scale: float) -> Tensor | None:
        """Return this batch's part of the weighted distance between both adapters on memory rows; None without any.

        To be called after the plastic pass on what `prepare` returned.

        Args:
            labels: of all rows, for the gate of `selective_update`.
            scale: what the Trainer multiplies its own loss with.
        """
        if self._stable_last is not None:
            self._compare(labels, self._stable_last)
        mask = self._mask
        if mask is None or not self.arguments.consistency_weight:
            return None
        moved = [state[-len(mask) :] for state in self.hidden.states]
        one_sided = self.arguments.consistency_mode == "one_sided"
        value = distance(moved, self._targets, mask, one_sided=one_sided) / self._num_attended
        self._distances += value.detach().double().cpu()
        return self.arguments.consistency_weight * scale * value

    def after_step(self, *, skipped: bool) -> None:
        """Let the stable adapter follow, unless the step was skipped or the gate is shut."""
        self.hidden.states, self.hidden.last = (), None
        self._targets, self._stable_last = (), None
        self._steps += 1
        if not skipped and self._is_open():
            self.last_retention = retention(self.updates, self.ema_alpha, self.arguments.ema_warmup)
            self.stable.update(self.last_retention)
            self.updates += 1
        self._gate.zero_()

    def figures(self) -> dict[str, float]:
        """Return what is worth logging since the last call."""
        result = {"ema_updates": float(self.updates)}
        if self.last_retention is not None:
            result["ema_retention"] = self.last_retention
        if self._steps and len(self.memory) and self.arguments.consistency_weight:
            result["consistency"] = float(self._distances) / self._steps
        if self._gates[1]:
            result["gate_open_rate"] = self._gates[0] / self._gates[1]
        self._distances.zero_()
        self._steps, self._gates = 0, [0, 0]
        return result

    def _stable_pass(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self.stable.in_place(), self.accelerator.autocast():
            return self.hidden.compute(batch["input_ids"], batch["attention_mask"])

    def _compare(self, labels: Tensor, stable: Tensor) -> None:
        """Count the cross-entropy of both adapters on a batch's rows."""
        if self.hidden.last is None:
            raise UnsupportedError("expected the trainer to run the model with gradients, found that it did not")
        for place, hidden in enumerate((self.hidden.last, stable)):
            self._gate[place] += summed_cross_entropy(hidden.detach(), labels, self._head).double().cpu()

    def _is_open(self) -> bool:
        if not self.arguments.selective_update:
            return True
        sums = self._gate
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            sums = self.accelerator.reduce(sums.float().to(device), reduction="sum").cpu()
        plastic, stable = sums.tolist()
        gain = (stable - plastic) / max(stable, 1e-8)
        is_open = self.updates == 0 or gain > self.arguments.min_update_threshold
        self._gates = [self._gates[0] + is_open, self._gates[1] + 1]
        return is_open
