"""One optimiser step of each method, started by torchrun or alone; what it computed goes to a file per process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer

from everlora.callbacks import EverloraCallback, ILoraArguments, everlora_trainer
from tests.callbacks.builders import Watch, collate, lora_model, rows, trained, trainer


def main(shared: Path, states: Path, out: Path) -> None:
    """Learn 8 rows in one step, as many in each process."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    found = {}
    for method in ("i_lora", "ewc", "o_lora"):
        watch = Watch()
        given = {"callbacks": [watch]}
        cls: type[Trainer] = Trainer
        if method == "i_lora":
            cls = everlora_trainer(Trainer)
            given["ilora"] = ILoraArguments(
                previous_task_model=states / "i_lora", consistency_weight=5.0, ema_alpha=0.5, selective_update=True
            )
        else:
            given["callbacks"].insert(0, EverloraCallback(method, states / method))
        values = {"per_device_train_batch_size": 8 // world, "max_grad_norm": 0.0}
        if world > 1:
            values["ddp_backend"] = "gloo"
        made = trainer(lora_model(shared, seed=5), out, rows(8, key="second"), cls=cls, extra=given, **values)
        if made.accelerator.num_processes != world:
            raise SystemExit(f"expected {world} processes, found {made.accelerator.num_processes}")
        if method == "i_lora":
            # Who draws which row depends on the number of processes; all rows together must not.
            every = collate(rows(8, key="memory"))
            made.dual.memory.draw = lambda count, *, keys, rank, world, rows=every: {
                name: value[rank * count : (rank + 1) * count] for name, value in rows.items()
            }
        made.train()
        found.update({f"{method}/gradient/{name}": value for name, value in watch.gradients[0].items()})
        found.update({f"{method}/weight/{name}": value for name, value in trained(made.model).items()})
        if method == "i_lora":
            found.update({f"stable/{name}": p.detach() for name, p in made.dual.stable.parameters.items()})
            found.update({f"memory/{name}": value for name, value in made.dual.memory.state().items()})
            made.save_adapters(out / "saved")
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
