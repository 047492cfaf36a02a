"""I-LoRA: a fast adapter learns, a slow one follows it as a moving average and keeps what it knows (Ren et al., 2024).

For causal language models. The plastic adapter is trained on the task and on rows of earlier tasks; its hidden states
on these are held close to those of the stable adapter, which is interpolated towards it after every step and predicts.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everlora.errors import OptionError, UnsupportedError, nearest
from everlora.lowrank import exchanged
from everlora.methods.base import Batch, Collect, Encoder, Loss, Recalled, State, TaskInfo
from everlora.methods.classifiers import heads_state, load_heads
from everlora.methods.consistency import StepTokens
from everlora.methods.dual_loss import DualLoss
from everlora.methods.earlier import ContinuesEarlierModel, EarlierFolders, EarlierModel
from everlora.methods.forgetting import Forgetting, forget_rows
from everlora.methods.i_lora_presets import PRESETS
from everlora.methods.keys import task_key
from everlora.methods.language_targets import language_targets
from everlora.methods.moving_average import MovingAverage
from everlora.methods.registry import register
from everlora.methods.rehearsal import Rehearsal
from everlora.methods.stable import (
    Factors,
    StableAdapter,
    check_scales,
    factors_of,
    factors_state,
    factors_under,
    set_factors,
)
from everlora.methods.task_ids import TaskHistory
from everlora.methods.tuned import TunedMethod

__all__ = ["ILora", "ILoraOptions"]

_CARRIED = "stable/"  # where the state keeps a stable adapter that no task's folder shall hold


@dataclass(frozen=True)
class ILoraOptions:
    """Options of I-LoRA; those that are none by default take the value of the preset.

    Attributes:
        use_ilora: False trains one adapter and nothing else, as plain fine-tuning does. The method's name sets it.
        ema_alpha: retention: weight of the old stable value in an update, so the larger, the slower.
        consistency_weight: weight of the distance between the hidden states of both adapters; 0 skips the stable
            pass.
        ilora_buffer_size: rows kept of earlier tasks; 0 replays nothing. In the paper, 500.
        selective_update: update the stable adapter only after steps on which the plastic one is better.
        min_update_threshold: relative gain in cross-entropy on the step's rows that counts as better.
        hidden_state_layers: numbers of the hidden states to compare, 0 being the embeddings and -1 the last, after the
            final norm; or `all`. In the paper, the last.
        save_ema_adapter: write the stable adapter as a PEFT adapter of its own; it is remembered either way.
        ema_adapter_path: name of the folder it is written to, within the task's folder, and read from, within
            `previous_task_model`; `stable` by default. A full path is read from only.
        previous_task_model: folder to go on from before the first task: a learner, the folder of one of its tasks, a
            folder with `plastic` and `stable` in it, or a plain PEFT adapter.
        current_task_id: id of the one task that will be learned; by default tasks are numbered.
        prev_task_id: id that the last task in `previous_task_model` must have; without it no stable adapter may be
            found there.
        preset: sets the switches that are not given: `paper`, the default, or what the two public implementations
            really compute, `llmcl_effective` and `easycl`.
        ema_warmup: begin with the plain mean of all plastic adapters so far, until `ema_alpha` takes over.
        ema_horizon: set the retention anew for each task of S steps, to 1 - 1 / (ema_horizon * S); 1/3 suits.
        ema_update: update after every optimiser `step`, or copy at each `task_end`.
        consistency_mode: squared distance (`mse`), or only where the stable value is the larger (`one_sided`).
        consistency_tokens: tokens that are compared: the `attended`, the `supervised`, or `all`, padding included.
        consistency_rows: rows that are compared: those of the `memory`, the `current` ones, or `all`.
        ce_reduction: cross-entropy as the mean over all tokens (`union_token`), or the mean of the means over the
            tokens of the batch and of the memory (`mean_of_means`).
        replay_ratio: rows of the memory drawn for each row of the batch.
        replay_per_task: draw so many for each earlier task.
        buffer_policy: keep each row that went by with the same probability (`reservoir`), or as many of each task
            (`balanced`).
        buffer_insert: when a task's rows go by the buffer: each once, at the `task_end` or `online`, when it was first
            trained on; or before `every_step` that trains on it.
        save_buffer: write the buffer, which holds training rows; without it a reopened learner cannot learn on.
        inference_adapter: which adapter predicts when none is named: `stable`, `plastic`, or `both`, the stable one
            first.
        plastic_init: a task's plastic adapter goes on where it is (`continue`), or starts as a copy of the stable one.
        reset_optimizer: begin each task with a new optimiser.
        rank: rank of the adapters.
        alpha: the adapters count with alpha over rank. In the paper, 16.
        lora_dropout: share of the inputs of the plastic adapter that are dropped in training. In the paper, 0.
        targets: name patterns of the layers to adapt, `attention` or `all-linear`; None takes queries and values.
        forward_mode: how an adapted layer computes.
    """

    use_ilora: bool = False
    ema_alpha: Annotated[float, Field(ge=0, le=1)] = 0.999
    consistency_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    ilora_buffer_size: Annotated[int, Field(ge=0)] | None = None
    selective_update: bool = False
    min_update_threshold: Annotated[float, Field(ge=-math.inf)] = 0.1  # so anything but NaN
    hidden_state_layers: tuple[int, ...] | Literal["all"] | None = None
    save_ema_adapter: bool = True
    ema_adapter_path: str | None = None
    previous_task_model: str | None = None
    current_task_id: str | None = None
    prev_task_id: str | None = None
    preset: Literal["paper", "llmcl_effective", "easycl"] | None = None
    ema_warmup: bool = True
    ema_horizon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ema_update: Literal["step", "task_end"] | None = None
    consistency_mode: Literal["mse", "one_sided"] | None = None
    consistency_tokens: Literal["attended", "supervised", "all"] | None = None
    consistency_rows: Literal["memory", "current", "all"] | None = None
    ce_reduction: Literal["union_token", "mean_of_means"] | None = None
    replay_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    replay_per_task: bool | None = None
    buffer_policy: Literal["reservoir", "balanced"] = "reservoir"
    buffer_insert: Literal["task_end", "online", "every_step"] | None = None
    save_buffer: bool = True
    inference_adapter: Literal["stable", "plastic", "both"] | None = None
    plastic_init: Literal["continue", "from_stable"] = "continue"
    reset_optimizer: bool = True
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    targets: tuple[str, ...] | None = None
    forward_mode: Literal["auto", "folded", "factored"] = "auto"

    def __post_init__(self) -> None:
        """Fill in what the preset says, so that the stored options are complete."""
        for name, value in PRESETS[self.preset or "paper"].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    # What every method with one fine-tuned encoder is asked for, and a language model leaves no choice in.
    @property
    def train(self) -> Literal["adapter"]:
        """What of the encoder is trained."""
        return "adapter"

    @property
    def bn(self) -> Literal["frozen_eval"]:
        """What of batch norms is trained."""
        return "frozen_eval"

    @property
    def loss(self) -> Literal["seen"]:
        """What classes compete."""
        return "seen"

    @property
    def head_init(self) -> Literal["zeros"]:
        """How a new head starts."""
        return "zeros"


@register("i_lora", presets={"i_lora": {"use_ilora": True}}, aliases={"ilora": "i_lora"})
class ILora(TunedMethod, ContinuesEarlierModel):
    """I-LoRA (arXiv 2402.18865); the order of steps is that of section 6 of the reference page."""

    options_type: ClassVar[type] = ILoraOptions
    suits = frozenset({"language"})
    path_options = ("previous_task_model",)
    options: ILoraOptions

    def __init__(self, options: ILoraOptions, encoder: Encoder, *, seed: int) -> None:
        targets = language_targets(encoder, options.targets)
        super().__init__(dataclasses.replace(options, targets=targets), encoder, seed=seed)
        layers = self.tuned.layers
        for layer in layers.values():
            layer.dropout = options.lora_dropout or 0.0
        self.stable = StableAdapter(layers)
        self.dual = DualLoss(options, encoder, self.heads, layers=layers, stable=self.stable)
        self.counts_padding = options.consistency_tokens == "all"
        self.history = TaskHistory(options)
        self.average = MovingAverage(options)
        self.rehearsal: Rehearsal | None = None
        if options.use_ilora:
            self.variants = ("plastic", "stable") if options.inference_adapter == "plastic" else ("stable", "plastic")
            self.rehearsal = _rehearsal(options, seed)
        self._moments: State = {}
        self._collect: Collect | None = None
        self._task_id = ""
        self._continued = False

    def adopt(self, factors: Factors) -> None:
        """Let both adapters start from a plain LoRA, whose scaling is in `up`; nothing is remembered with it."""
        layers = self.tuned.layers
        known = {
            name: (down, up / layers[name].scale if name in layers else up) for name, (down, up) in factors.items()
        }
        self._start_from(known, known)

    def earlier_folders(self) -> EarlierFolders | None:
        """The folders that `previous_task_model` and `ema_adapter_path` name."""
        return self.history.folders()

    def continue_from(self, earlier: EarlierModel) -> None:
        """Take over both adapters, the buffer, and how many updates and tasks there were."""
        if not earlier.is_plain or earlier.second is not None:
            self.history.check_earlier(earlier)
        for factors, scales in ((earlier.adapter, earlier.scales), (earlier.second or {}, earlier.second_scales)):
            check_scales(self.tuned.layers, factors, scales)
        self._start_from(earlier.adapter, earlier.second or earlier.adapter)
        if not earlier.carried:
            warnings.warn(f"{earlier.source} holds adapters alone: no memory and no count of updates", stacklevel=2)
            self.average.settled = earlier.second is not None
        held, size = len(earlier.carried.get("buffer/labels", ())), self.options.ilora_buffer_size or 0
        if held > size > 0:
            raise OptionError(
                f"{earlier.source} kept {held} rows of its tasks, more than ilora_buffer_size={size}; give at least as "
                "many."
            )
        self._carry_on(earlier.carried)

    def begin_task(self, task: TaskInfo, collect: Collect) -> None:
        """Go on from where the plastic adapter is; before the very first step the stable one is its copy."""
        if not self.heads.classes:
            self.history.require_continued(self._continued)
        self._task_id = self.history.next_id()
        super().begin_task(task, collect)
        self._collect = collect
        if not self.options.use_ilora:
            return
        if task.index == 0 and not self._continued:
            self.stable.follow(0.0)
        elif self.options.plastic_init == "from_stable":
            self.stable.lead()
        self.average.begin_task(task)
        if self.rehearsal is not None:
            self.rehearsal.begin_task(self._numbered(task), collect)

    def before_step(self, rows: Tensor) -> None:
        """Note the rows of the step, and let them go by the buffer, if that is done now."""
        collect = self._collect
        if collect is not None:
            self.dual.begin_step(lambda recalled: StepTokens(collect.rows(rows)[0], recalled))
        if self.rehearsal is not None:
            self.rehearsal.before_step(rows)

    def recall(self, count: int, generator: torch.Generator) -> Recalled | None:
        """Draw rows of earlier tasks from the buffer; a step that is begun anew draws them again."""
        self.dual.cross_entropies.zero_()
        if self.rehearsal is None:
            return None
        newest = len(self.history.entries)
        times = newest if self.options.replay_per_task else 1
        wanted = round((self.options.replay_ratio or 0.0) * count * times)
        self.dual.recalled = self.rehearsal.recall(wanted, generator, newest=newest)
        return self.dual.recalled

    def loss(self, batch: Batch) -> Loss:
        """Cross-entropy over batch and memory, and the distance between the adapters' hidden states."""
        if not self.options.use_ilora:
            return super().loss(batch)
        return self.dual(batch, len(self.history.entries))

    def after_step(self, stepped: bool) -> None:
        """Let the stable adapter follow, and the step's rows go by the buffer, if that is done online."""
        if not self.options.use_ilora:
            return
        if stepped:
            self.average.after_step(self.stable, self.dual.cross_entropies, self.processes.sum)
        self.dual.begin_step(None)
        if self.rehearsal is not None:
            self.rehearsal.after_step()

    def progress_state(self) -> State:
        """The stable adapter, its updates so far, and the buffer where rows go by it during training."""
        if not self.options.use_ilora:
            return {}
        memory: State = {}
        if self.rehearsal is not None and self.options.save_buffer:
            memory = self.rehearsal.progress_state()
        return {**factors_state(_CARRIED, self.stable.factors()), **self.average.state(), **memory}

    def load_progress_state(self, state: State) -> None:
        """Put back what `progress_state` returned.

        Raises:
            UnsupportedError: rows of the task went by a memory that was not saved.
        """
        if not state:
            return
        if self.rehearsal is not None and not self.options.save_buffer and self.rehearsal.insert != "task_end":
            raise UnsupportedError(
                "the rows of this task that went by the memory were not saved (save_buffer=False), so it cannot go on "
                "within the task; begin the task anew with discard_unfinished, or save the buffer."
            )
        self.stable.set(factors_under(_CARRIED, state))
        self.average.load_state(state)
        if self.rehearsal is not None:
            self.rehearsal.load_progress_state(state)

    def end_task(self, task: TaskInfo, collect: Collect) -> None:
        """Let the task's rows go by the buffer, and note the task."""
        super().end_task(task, collect)
        if self.options.use_ilora:
            self.average.end_task(self.stable)
        if self.rehearsal is not None:
            self.rehearsal.end_task(self._numbered(task))
        self.history.add(self._task_id, task)
        self._collect = None

    @contextmanager
    def predicting(self, variant: str | None = None) -> Iterator[None]:
        """Put the stable or the plastic adapter in place.

        Raises:
            OptionError: there is no such adapter.
        """
        if variant is not None and variant not in self.variants:
            raise OptionError(f"there is no adapter '{variant}'; {nearest(variant, self.variants)}")
        if (variant or next(iter(self.variants), "plastic")) == "plastic":
            yield
            return
        with exchanged(self.tuned.layers, self.stable.factors()):
            yield

    def optimizer_state(self) -> State | None:
        """What the optimiser knew after the last task, if it is to go on from there."""
        return None if self.options.reset_optimizer or not self.options.use_ilora else self._moments

    def keep_optimizer(self, state: State) -> None:
        """Keep what the optimiser knows."""
        self._moments = dict(state)

    def panels(self) -> dict[str, dict[str, float]]:
        """Figures of the moving average and of the buffer."""
        if not self.options.use_ilora:
            return {}
        figures = self.average.panels()
        return figures if self.rehearsal is None else {**figures, **self.rehearsal.panels(len(self.history.entries))}

    def state(self) -> State:
        """Both adapters as the newest task left them, the buffer, and the counts."""
        count = len(self.heads.classes)
        if not self.options.use_ilora or not count:
            return {**super().state(), **(self.history.state() if count else {})}
        layers, newest = self.tuned.layers, count - 1
        state = {**heads_state(self.heads, None), **self.history.state(), **self.average.state()}
        state[task_key(newest, "alphas")] = {name: layer.scale * layer.rank for name, layer in layers.items()}
        state[task_key(newest, "task_id")] = self.history.entries[-1]["id"]
        state |= factors_state(task_key(newest, "plastic/adapter/"), factors_of(layers))
        saved = task_key(newest, f"{self.history.stable_folder}/adapter/")
        state |= factors_state(saved if self.options.save_ema_adapter else _CARRIED, self.stable.factors())
        if self.rehearsal is not None and self.options.save_buffer:
            state |= self.rehearsal.state()
        return state | {f"optimizer/{name}": value for name, value in self._moments.items()}

    def load_state(self, state: State) -> None:
        """Put back what `state` returned."""
        if not self.options.use_ilora:
            super().load_state(state)
            self.history.entries = list(state.get("history", []))
            return
        count = load_heads(self.heads, None, state)
        if not count:
            return
        newest = count - 1
        plastic = factors_under(task_key(newest, "plastic/adapter/"), state)
        saved = task_key(newest, f"{self.history.stable_folder}/adapter/")
        self._start_from(plastic, factors_under(saved if self.options.save_ema_adapter else _CARRIED, state))
        self._carry_on(state)
        self.history.entries = list(state["history"])

    def forget(self, request: Forgetting) -> dict[str, int]:
        """Let rows leave the buffer."""
        earlier = len(self.history.entries) - len(self.heads.classes)
        return {**super().forget(request), **forget_rows(request, first_task=earlier)}

    def _start_from(self, plastic: Factors, stable: Factors) -> None:
        """Put both adapters in place; they are not drawn any more."""
        self.tuned.start()
        set_factors(self.tuned.layers, stable)
        self.stable.follow(0.0)
        set_factors(self.tuned.layers, plastic)
        self._continued = True

    def _carry_on(self, state: State) -> None:
        """Take over what is no adapter."""
        self.average.load_state(state)
        self._moments = {k.removeprefix("optimizer/"): v for k, v in state.items() if k.startswith("optimizer/")}
        if self.rehearsal is not None:
            self.rehearsal.load_state(state, required=bool(state))

    def _numbered(self, task: TaskInfo) -> TaskInfo:
        """The task, numbered with those of earlier runs."""
        return dataclasses.replace(task, index=len(self.history.entries))


def _rehearsal(options: ILoraOptions, seed: int) -> Rehearsal | None:
    """The memory that the options ask for."""
    if not options.ilora_buffer_size:
        if options.consistency_weight and options.consistency_rows == "memory":
            warnings.warn(
                "ilora_buffer_size=0 keeps no rows to compare the adapters on, so consistency_weight has no effect; "
                "set it to 0, or keep some rows.",
                stacklevel=4,
            )
        return None
    return Rehearsal(
        options.ilora_buffer_size,
        seed=seed,
        insert=options.buffer_insert or "task_end",
        balanced=options.buffer_policy == "balanced",
        by_task=True,
    )
