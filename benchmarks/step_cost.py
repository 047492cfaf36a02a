"""Time of a training step with adapted layers, against plain LoRA of the same rank by PEFT on the same layers.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --json
    python benchmarks/step_cost.py --inference
    python benchmarks/step_cost.py --device cuda --blocks 12 --width 768 --batch 64 --dtype bfloat16

A vision transformer with random weights, query and value adapted in every block; a step is forward, cross-entropy,
backward and SGD with momentum. "Task n" has n - 1 past blocks of random factors. Each step is timed next to a step of
the PEFT model, in turns, and the figure is the median of the ratios of these pairs, so that a busy machine slows both
alike. `sd_lora_loop` is the published form of SD-LoRA: block after block, each on the activations.

Memory is what one step allocates at its peak, counted from the tensors alive (on a GPU as its allocator reports), so
weights and factors are not in it. `--inference` times forward passes of the model in evaluation mode against the same
model without adapters. `--dtype bfloat16` computes under autocast; weights stay in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
import transformers
from processor import processor
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from everlora.lowrank import LowRankLinear, attach, share_down

TARGETS = ("q_proj", "v_proj")
CLASSES = 100
TASKS = (1, 20, 50)
LOOP_ROUNDS = 3  # at most: the published form is slow, and far from the others

Step = Callable[[], None]
Ratios = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Setup:
    """What is measured, and on which device."""

    blocks: int
    width: int
    batch: int
    tokens: int
    rank: int
    device: torch.device
    dtype: torch.dtype

    def model(self) -> nn.Module:
        """Return a vision transformer, the same weights at every call."""
        torch.manual_seed(0)
        side = round((self.tokens - 1) ** 0.5)
        if side * side != self.tokens - 1:
            raise SystemExit(f"--tokens must be a square plus one, such as 197 or 65, got {self.tokens}")
        config = transformers.ViTConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(1, self.width // 64),
            image_size=4 * side,
            patch_size=4,
        )
        backbone = transformers.ViTModel(config, add_pooling_layer=False).requires_grad_(False)
        return Classifier(backbone, self.width).to(self.device).train()

    def images(self) -> Tensor:
        """Return one batch of random images."""
        size = 4 * round((self.tokens - 1) ** 0.5)
        return torch.randn(self.batch, 3, size, size, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def wait(self) -> None:
        """Let the device finish, so that the clock measures it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Classifier(nn.Module):
    """A backbone and a linear head on its class token."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(batch, CLASSES)`."""
        return cast(Tensor, self.head(self.backbone(pixel_values=images).last_hidden_state[:, 0]))


class LoopLinear(nn.Module):
    """SD-LoRA as published: every block is applied to the activations and scaled there."""

    def __init__(self, base: nn.Linear, past: list[tuple[Tensor, Tensor]], values: nn.Parameter, rank: int) -> None:
        super().__init__()
        self.base, self.values = base, values
        self.past = [(down, up, float((up @ down).norm())) for down, up in past]
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features).uniform_(-0.05, 0.05))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        y = cast(Tensor, self.base(x))
        for index, (down, up, norm) in enumerate(self.past):
            branch = functional.linear(functional.linear(x, down), up)
            y = y + self.values[index] / norm * branch
        return y + self.values[-1] * functional.linear(functional.linear(x, self.down), self.up)


def random_past(setup: Setup, task: int) -> list[tuple[Tensor, Tensor]]:
    """Return factors `(down, up)` of the blocks before `task`."""
    shapes = (setup.rank, setup.width), (setup.width, setup.rank)
    return [
        (torch.randn(shapes[0], device=setup.device) * 0.01, torch.randn(shapes[1], device=setup.device) * 0.01)
        for _ in range(task - 1)
    ]


def plain_lora(setup: Setup, task: int) -> nn.Module:
    """Return the model with LoRA by PEFT; it knows no tasks."""
    model = setup.model()
    config = peft.LoraConfig(r=setup.rank, lora_alpha=setup.rank, target_modules=list(TARGETS), lora_dropout=0.0)
    peft.inject_adapter_in_model(config, model)
    return keep_trainable(model, "lora_")


def inflora(setup: Setup, task: int, forward_mode: str = "auto") -> nn.Module:
    """Return the model with frozen down-projections, shared by the layers of a block, and a constant past."""
    model = setup.model()
    layers = attach(model, TARGETS, 0, forward_mode=forward_mode, train_down=False)
    for pair in pairs_of_a_block(layers):
        for layer in pair:
            downs, ups = zip(*random_past(setup, task), strict=True) if task > 1 else ((), ())
            layer.load_past(downs, ups)
            layer.start_block(setup.rank)
        share_down(pair)
    return model


def inflora_opt(setup: Setup, task: int) -> nn.Module:
    """Return what `inflora` does, always folded."""
    return inflora(setup, task, forward_mode="folded")


def sd_lora(setup: Setup, task: int) -> nn.Module:
    """Return the model with trained magnitudes of all blocks, shared by all layers."""
    model = setup.model()
    values = nn.Parameter(torch.ones(task, device=setup.device))
    model.register_parameter("magnitudes", values)
    for layer in attach(model, TARGETS, 0).values():
        past = random_past(setup, task)
        layer.load_past([down for down, _ in past], [up for _, up in past])
        gain = torch.tensor([1.0 / float((up @ down).norm()) for down, up in past])
        layer.start_block(setup.rank)
        layer.set_magnitudes(values, gain, torch.zeros(task - 1))
    return model


def sd_lora_loop(setup: Setup, task: int) -> nn.Module:
    """Return the model with the published form of `sd_lora`."""
    model = setup.model()
    values = nn.Parameter(torch.ones(task, device=setup.device))
    model.register_parameter("magnitudes", values)
    for name, module in list(model.named_modules()):
        if name.endswith(TARGETS) and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            layer = LoopLinear(module, random_past(setup, task), values, setup.rank)
            setattr(model.get_submodule(parent), child, layer)
    return model


METHODS: dict[str, Callable[[Setup, int], nn.Module]] = {
    "inflora": inflora,
    "inflora_opt": inflora_opt,
    "sd_lora": sd_lora,
    "sd_lora_loop": sd_lora_loop,
}


def keep_trainable(model: nn.Module, part: str) -> nn.Module:
    """Train the head and the parameters whose name holds `part`, nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name or name.startswith("head."))
    return model


def pairs_of_a_block(layers: dict[str, LowRankLinear]) -> Iterator[list[LowRankLinear]]:
    """Yield the layers that read the same tensor, block by block."""
    parents = {name.rpartition(".")[0] for name in layers}
    for parent in sorted(parents):
        yield [layer for name, layer in layers.items() if name.rpartition(".")[0] == parent]


def training_step(setup: Setup, model: nn.Module) -> Step:
    """Return one step of SGD on a fixed batch."""
    images, labels = setup.images(), torch.arange(setup.batch, device=setup.device) % CLASSES
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with setup.autocast():
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        setup.wait()

    return step


def forward_pass(setup: Setup, model: nn.Module) -> Step:
    """Return one evaluation of a fixed batch."""
    images = setup.images()
    model.eval()

    def step() -> None:
        with torch.no_grad(), setup.autocast():
            model(images)
        setup.wait()

    return step


def seconds(step: Step) -> float:
    """Time one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def paired_ratios(steps: dict[tuple[str, int], Step], baseline: Step, rounds: int) -> tuple[Ratios, float]:
    """Time all steps in turns, each next to the baseline.

    Returns:
        Method and task to the median of the paired ratios, and the baseline's median in seconds.
    """
    for step in (baseline, *steps.values()):  # the first run also makes the optimiser's state
        step()
    found: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    base: list[float] = []
    for index in range(rounds):
        for key, step in steps.items():
            if key[0].endswith("_loop") and index >= LOOP_ROUNDS:
                continue
            # Who goes first changes from round to round, lest one side always meet the warmer caches.
            first = seconds(step) if index % 2 else 0.0
            base.append(seconds(baseline))
            found[key].append((first or seconds(step)) / base[-1])
    ratios: Ratios = {}
    for (method, task), values in found.items():
        ratios.setdefault(method, {})[task] = statistics.median(values)
    return ratios, statistics.median(base)


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors made inside the block that are alive at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._alive = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {item.untyped_storage()._cdata for item in _tensors([*args, *(kwargs or {}).values()])}
        result = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:  # type: ignore[no-untyped-call]
            self._alive -= self._storages.pop(key)[1]
        for tensor in _tensors([result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._storages:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[storage._cdata] = reference, storage.nbytes()
                self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def step_bytes(setup: Setup, step: Step) -> int:
    """Return what one step allocates at its peak, beyond what lives on between steps."""
    step()
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as count:
        step()
    return int(count.peak)


def machine(setup: Setup) -> dict[str, str | int]:
    """Say where and with what it was measured."""
    device = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"machine": device, "cores": os.cpu_count() or 0, "threads": torch.get_num_threads(), **versions}


def print_ratios(ratios: Ratios, baseline: str) -> None:
    """Print one line for each method."""
    print(f"{'times ' + baseline:<24}" + "".join(f"{f'task {task}':>10}" for task in TASKS))
    for method, row in ratios.items():
        print(f"{method:<24}" + "".join(f"{row[task]:>10.3f}" for task in TASKS))


def print_memory(peaks: dict[tuple[str, int], int]) -> None:
    """Print what a step allocates at the first and the last task."""
    print(f"\n{'MiB allocated by a step':<24}{'task 1':>10}{'task 50':>10}{'growth':>10}")
    for method in dict.fromkeys(method for method, _ in peaks):
        first, last = (peaks[method, task] / 2**20 for task in (TASKS[0], TASKS[-1]))
        print(f"{method:<24}{first:>10.1f}{last:>10.1f}{last / first - 1:>10.1%}")


def measure_training(setup: Setup, rounds: int) -> tuple[Ratios, float, dict[tuple[str, int], int]]:
    """Return paired ratios to PEFT, its seconds a step, and the bytes of the first and the last task."""
    steps = {
        (method, task): training_step(setup, build(setup, task)) for method, build in METHODS.items() for task in TASKS
    }
    ratios, base = paired_ratios(steps, training_step(setup, plain_lora(setup, 1)), rounds)
    measured = [key for key in steps if key[1] in (TASKS[0], TASKS[-1])]
    return ratios, base, {key: step_bytes(setup, steps[key]) for key in measured}


def measure_inference(setup: Setup, rounds: int) -> tuple[Ratios, float]:
    """Return paired ratios to the model without adapters, and its seconds a batch."""
    names = [name for name in METHODS if not name.endswith("_loop")]
    steps = {(name, task): forward_pass(setup, METHODS[name](setup, task)) for name in names for task in TASKS}
    return paired_ratios(steps, forward_pass(setup, setup.model()), rounds)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=2, help="of the transformer (2)")
    parser.add_argument("--width", type=int, default=384, help="of the transformer (384, a ViT-S)")
    parser.add_argument("--batch", type=int, default=8, help="images in a step (8)")
    parser.add_argument("--tokens", type=int, default=197, help="of an image, the class token included (197)")
    parser.add_argument("--rank", type=int, default=10, help="of every block (10)")
    parser.add_argument("--rounds", type=int, default=11, help="pairs for each figure (11)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument("--inference", action="store_true", help="time evaluation against the model without adapters")
    parser.add_argument("--json", action="store_true", help="print {method: {task: ratio}} and nothing else")
    return parser.parse_args()


def main() -> None:
    """Measure, and print a table or JSON."""
    options = arguments()
    torch.set_num_threads(options.threads)
    shape = {name: getattr(options, name) for name in ("blocks", "width", "batch", "tokens", "rank")}
    setup = Setup(**shape, device=torch.device(options.device), dtype=getattr(torch, options.dtype))
    peaks: dict[tuple[str, int], int] = {}
    if options.inference:
        ratios, base = measure_inference(setup, options.rounds)
    else:
        ratios, base, peaks = measure_training(setup, options.rounds)
    if options.json:
        print(json.dumps(ratios))
        return
    print("\n".join(f"{name}: {value}" for name, value in {**machine(setup), **shape, "dtype": options.dtype}.items()))
    name = "the bare model" if options.inference else "PEFT's LoRA"
    print(f"{name}: {base * 1e3:.0f} ms\n")
    print_ratios(ratios, name)
    if peaks:
        print_memory(peaks)


if __name__ == "__main__":
    main()
