"""I-LoRA in a Hugging Face or TRL trainer: a subclass, since a callback cannot change the loss."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from everlora.callbacks.adapters import refuse_sharded, trained_adapter
from everlora.callbacks.arguments import ILoraArguments
from everlora.callbacks.dual_folder import load_checkpoint, load_task, save_checkpoint, save_task
from everlora.callbacks.dual_memory import DualMemory
from everlora.errors import OptionError, StoreError, UnsupportedError

__all__ = ["everlora_trainer"]

_FOLDER = "everlora"  # in each of the Trainer's checkpoints


@functools.cache
def everlora_trainer(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return a subclass of a trainer that learns by I-LoRA.

    It takes one argument more, `ilora=ILoraArguments(...)`, and has one method more, `save_adapters(folder)`.

    Args:
        trainer_class: `transformers.Trainer`, `trl.SFTTrainer` or a subclass; its `compute_loss` must run the model
            once on the batch it is given and normalise by `num_items_in_batch`.

    Raises:
        OptionError: not a Trainer class.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise OptionError(
            f"expected a subclass of transformers.Trainer, found {trainer_class!r}; pass the class itself"
        )
    return type(f"ILora{trainer_class.__name__}", (_DualMemoryTrainer, trainer_class), {})


class _DualMemoryTrainer(Trainer):  # type: ignore[misc]  # transformers comes without types
    """Replay, consistency and the moving average around the loss of whatever trainer comes next in the order.

    Args:
        ilora: parameters of the method; None for their defaults.
        args, kwargs: of the trainer.

    Raises:
        ModelError: not a PEFT model with one trained adapter.
        OptionError: a parameter is out of range.
        StoreError: the folder of the task before is damaged or does not fit.
        UnsupportedError: an adapter or a way of training that the method cannot work with.
    """

    def __init__(self, *args: Any, ilora: ILoraArguments | None = None, **kwargs: Any) -> None:
        self.ilora = (ilora or ILoraArguments()).checked()
        self.dual: DualMemory | None = None
        super().__init__(*args, **kwargs)
        if not self.ilora.use_ilora:
            return
        _refuse(self.args)
        trained_adapter(self.model)
        pad = self.model.config.get_text_config().pad_token_id
        self.dual = DualMemory(
            self.model, self.ilora, self.accelerator, seed=self.args.seed, pad_token_id=0 if pad is None else int(pad)
        )
        if self.ilora.previous_task_model is not None:
            load_task(Path(self.ilora.previous_task_model), self.dual, output_dir=Path(self.args.output_dir))
        self.dual.name_task()
        self.add_callback(_Moments(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Learn the task, then let its examples go by the memory.

        Raises:
            UnsupportedError: the task is learned already, or its examples cannot be kept.
        """
        if self.dual is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if self.dual.is_finished:
            raise UnsupportedError(
                f"expected a new trainer for a new task, found one that has learned '{self.dual.task_id}'; call "
                "save_adapters, and pass its folder to the next as previous_task_model"
            )
        if resume_from_checkpoint:
            named = isinstance(resume_from_checkpoint, str | Path)
            folder = resume_from_checkpoint if named else get_last_checkpoint(self.args.output_dir)
            if folder is not None:
                load_checkpoint(Path(folder) / _FOLDER, self.dual)
        self.dual.memory.check(self.train_dataset, self.data_collator)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.dual.memory.insert(self.train_dataset, self.data_collator, task=len(self.dual.history))
        self.dual.history.append(self.dual.task_id)
        self.dual.is_finished = True
        return result

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Add the memory's rows to those of an optimiser step, so that all are counted together."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.dual is not None and samples:
            average = self.args.average_tokens_across_devices
            step = self.state.global_step
            num_items = self.dual.begin_step(samples, num_items, step=step, average_over_processes=average)
        return samples, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the trainer's loss on current and memory rows together, and add the consistency on memory rows."""
        dual = self.dual
        if dual is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = dual.next_rows()
        if rows is None and not self.ilora.selective_update:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # First the stable pass: what checkpointing computes again in the backward pass must meet the plastic adapter.
        batch = dual.prepare(inputs, rows)
        with dual.hidden.recording():
            result = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        added = dual.consistency(batch["labels"], scale=self._loss_scale())
        if added is None:
            return result
        return (result[0] + added, *result[1:]) if return_outputs else result + added

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the adapter that `inference_adapter` names."""
        if self.dual is None or self.ilora.inference_adapter == "plastic":
            return super().evaluation_loop(*args, **kwargs)
        with self.dual.stable.in_place():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the method's figures along with the loss."""
        if self.dual is not None and "loss" in logs:
            logs.update(self.dual.figures())
        super().log(logs, *args, **kwargs)

    def save_adapters(self, folder: str | Path) -> None:
        """Write `stable/` and `plastic/`, which plain PEFT loads, and `state/` for the next task.

        Raises:
            StoreError: the task is not learned yet, or the folder holds something.
        """
        if self.dual is None:
            raise StoreError("expected a trainer with use_ilora=True to save adapters of, found one without")
        if not self.dual.is_finished:
            raise StoreError("expected a task that is learned, found one that is not; call train() first")
        if self.accelerator.is_main_process:
            save_task(Path(folder), self.dual, output_dir=Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()

    def _loss_scale(self) -> float:
        """What the Trainer multiplies its loss with, so that processes' averaged gradients are those of the sum."""
        return float(self.accelerator.num_processes) if self.args.average_tokens_across_devices else 1.0


class _Moments(TrainerCallback):  # type: ignore[misc]  # transformers comes without types
    """Tells the method when a task begins, a step is done and a checkpoint is written."""

    def __init__(self, trainer: _DualMemoryTrainer) -> None:
        self.trainer = trainer

    @property
    def dual(self) -> DualMemory:
        if self.trainer.dual is None:
            raise UnsupportedError("expected a trainer with use_ilora=True, found one without; make a new one")
        return self.trainer.dual

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dual.begin_task(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dual.after_step(skipped=self.trainer.accelerator.optimizer_step_was_skipped)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.is_main_process:
            save_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER, self.dual)


def _refuse(args: Any) -> None:
    """Refuse ways of training that the method cannot work with."""
    refuse_sharded(args)
    if args.load_best_model_at_end:
        raise UnsupportedError(
            "expected load_best_model_at_end=False, found True: it would bring an earlier plastic adapter back and "
            "leave the stable one; set it to False"
        )
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"expected one device for each process, found {args.n_gpu} under DataParallel; start with torchrun, or "
            "make one device visible"
        )
