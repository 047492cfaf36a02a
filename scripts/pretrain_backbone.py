"""Pretrain the small vision transformer that ships with everlora, measure it, and write its card.

```
# on a CPU, two threads
python scripts/pretrain_backbone.py train --data DATA/tiny-imagenet-32px --budget-seconds 4340
# on a GPU
python scripts/pretrain_backbone.py train --data DATA/tiny-imagenet-32px --device cuda --autocast --epochs 200 \
    --patch-size 4 --layers 7 --keep 1 --min-scale 0.3 --mixup 0.2 --erase 0.25
# then the figures and the card
python scripts/pretrain_backbone.py report --data DATA/tiny-imagenet-32px --cifar DATA/cifar100
```

`train` reads no validation image: there is no early stopping, and the last weights are the ones exported. `report`
looks at the validation images of Tiny ImageNet and the test images of CIFAR-100 only to state figures.

With `--epochs` the schedule counts steps and a run can be repeated; with `--budget-seconds` it follows the clock, so
that a run on a busy machine still ends with a learning rate of zero. The weights are exported every
`--export-seconds`, each file by one rename.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from backbone_data import augment, normalise, read_images
from backbone_report import public_command, report
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

FOLDER = Path(__file__).resolve().parents[1] / "everlora" / "weights" / "vit-tiny-imagenet-32"
IMAGE_SIZE = 32
logger = logging.getLogger("everlora.pretrain")


def sinusoidal_positions(grid: int, width: int) -> Tensor:
    """Return the fixed two-dimensional sine and cosine table of `(grid * grid, width)`; `width` is a multiple of 4."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = wave[:, None, :].expand(grid, grid, -1)
    columns = wave[None, :, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).reshape(grid * grid, width)


@torch.no_grad()
def mimetic_init(model: ViTForImageClassification) -> None:
    """Start attention near what trained transformers show: query-key near +identity, value-output near -identity.

    Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023, with its constants 0.7 and
    0.4; the position table is scaled by 0.5 so that it does not drown the patches.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    for layer in model.vit.layers:
        attention = layer.attention
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            target = 0.7 * torch.randn(width, width) / math.sqrt(width) + 0.7 * torch.eye(width)
            left, values, right = torch.linalg.svd(target)
            root = values[:size].sqrt()
            attention.q_proj.weight[rows] = (left[:, :size] * root).T
            attention.k_proj.weight[rows] = root[:, None] * right[:size]
        target = 0.4 * torch.randn(width, width) / math.sqrt(width) - 0.4 * torch.eye(width)
        left, values, right = torch.linalg.svd(target)
        attention.o_proj.weight.copy_(left * values.sqrt())
        attention.v_proj.weight.copy_(values.sqrt()[:, None] * right)
    embeddings = model.vit.embeddings
    patch = embeddings.patch_embeddings.projection
    nn.init.normal_(patch.weight, std=1.0 / math.sqrt(patch.weight[0].numel()))
    grid = config.image_size // config.patch_size
    embeddings.position_embeddings[0, 1:] = 0.5 * sinusoidal_positions(grid, width)


def build_model(options: argparse.Namespace, names: list[str]) -> ViTForImageClassification:
    """Return a freshly initialised Hugging Face ViT with a linear classifier on its class token."""
    config = ViTConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.width,
        image_size=IMAGE_SIZE,
        patch_size=options.patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    mimetic_init(model)
    return model


def forward(model: ViTForImageClassification, images: Tensor, keep: float) -> Tensor:
    """Return the logits, computed on a random share `keep` of the patches of each image (drawn per image)."""
    tokens = model.vit.embeddings(images)
    if keep < 1.0:
        count = tokens.shape[1] - 1
        order = torch.rand(tokens.shape[0], count, device=tokens.device).argsort(dim=1) + 1
        chosen = order[:, : round(count * keep), None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat([tokens[:, :1], tokens.gather(1, chosen)], dim=1)
    for layer in model.vit.layers:
        tokens = layer(tokens)
    logits: Tensor = model.classifier(model.vit.layernorm(tokens[:, 0]))
    return logits


def build_optimizers(model: ViTForImageClassification, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for the rest (embeddings, norms, biases, classifier)."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    hidden = {id(parameter) for parameter in matrices}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    decayed = [p for p in rest if p.ndim == 2]
    plain = [p for p in rest if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    return [Muon(matrices, options.lr, options.weight_decay), adamw]


@dataclass
class Clock:
    """Where the run stands: by steps when the number of epochs is set, by the wall clock when a budget is."""

    total_steps: int | None
    budget_seconds: float | None
    step: int = 0
    started: float = 0.0

    def seconds(self) -> float:
        """Return the wall-clock seconds since the start."""
        return time.monotonic() - self.started

    def progress(self) -> float:
        """Return the share of the run that is done, 1 or more at its end."""
        if self.total_steps is not None:
            return self.step / self.total_steps
        return self.seconds() / float(self.budget_seconds or 1.0)


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Return the rate after a linear warm-up over the share `warmup` of the run and a cosine down to zero."""
    if progress < warmup:
        return peak * (progress + 1e-3) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield index batches for ever, each epoch in an order of its own; a last short batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def batch_loss(
    model: ViTForImageClassification, pixels: Tensor, labels: Tensor, keep: float, options: argparse.Namespace
) -> Tensor:
    """Return the cross-entropy with label smoothing on one augmented batch, mixed with itself when `mixup` is set."""
    images = augment(normalise(pixels), options)
    share, partner = 1.0, labels
    if options.mixup > 0:
        share = float(torch.distributions.Beta(options.mixup, options.mixup).sample())
        order = torch.randperm(len(labels), device=labels.device)
        images, partner = share * images + (1 - share) * images[order], labels[order]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=options.autocast):
        logits = forward(model, images, keep)
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=options.smoothing)
    if share < 1.0:
        other = functional.cross_entropy(logits.float(), partner, label_smoothing=options.smoothing)
        loss = share * loss + (1 - share) * other
    return loss


def train(options: argparse.Namespace) -> None:
    """Train from scratch on the training split alone, and export as the run goes and at its end."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    pixels, labels, names = read_images(options.data, "train", "label", options.cache)
    pixels, labels = pixels[: options.limit].to(device), labels[: options.limit].to(device)
    model = build_model(options, names).to(device).train()
    average = build_model(options, names).to(device).eval()
    average.load_state_dict(model.state_dict())
    optimizers = build_optimizers(model, options)
    total = options.epochs * (len(labels) // options.batch_size) if options.epochs else None
    clock = Clock(total, options.budget_seconds, started=time.monotonic())
    logger.info("%d images, %.2f M parameters", len(labels), sum(p.numel() for p in model.parameters()) / 1e6)
    next_export, running = options.first_export_seconds, 0.0
    for indices in batches(len(labels), options.batch_size, options.seed):
        progress = clock.progress()
        if progress >= 1.0:
            break
        chosen = indices.to(device)
        keep = options.keep if progress < options.full_from else 1.0
        loss = batch_loss(model, pixels[chosen], labels[chosen], keep, options)
        loss.backward()
        take_step(optimizers, learning_rate(progress, options.lr, options.warmup), model, options.clip)
        update_average(average, model, min(options.average, (clock.step + 1) / (clock.step + 10)))
        clock.step += 1
        running += (loss.item() - running) / min(clock.step, 50)
        if clock.step % 50 == 0:
            speed = clock.step * options.batch_size / clock.seconds()
            logger.info("step %d  %.3f done  loss %.3f  %.0f images/s", clock.step, progress, running, speed)
        if clock.seconds() >= next_export:
            export(average, training_facts(clock, options, running, len(labels), done=False), options.out)
            next_export = clock.seconds() + options.export_seconds
    export(average, training_facts(clock, options, running, len(labels), done=True), options.out)


def take_step(optimizers: list[torch.optim.Optimizer], rate: float, model: nn.Module, clip: float) -> None:
    """Clip, set the rate, step and clear every optimiser."""
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the weights towards `model`."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def training_facts(
    clock: Clock, options: argparse.Namespace, loss: float, images: int, *, done: bool
) -> dict[str, object]:
    """Return what the card says of the run; every figure is read off the run itself."""
    seen = clock.step * options.batch_size
    return {
        "finished": done,
        "command": public_command(sys.argv),
        "seconds": round(clock.seconds(), 1),
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": options.seed,
        "steps": clock.step,
        "batch_size": options.batch_size,
        "images_in_training_set": images,
        "images_seen": seen,
        "epochs": round(seen / images, 2),
        "images_per_second": round(seen / clock.seconds(), 1),
        "last_running_loss": round(loss, 4),
    }


def device_name(device: str) -> str:
    """Return the accelerator's or the processor's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def export(model: ViTForImageClassification, facts: dict[str, object], out: Path) -> None:
    """Write backbone, classifier, image processor and the run's facts to `out`, each file by one rename.

    The backbone is a plain `ViTModel` in float16; the classifier over the 200 classes lies beside it, because inside
    `model.safetensors` it would be an unexpected weight to everyone who loads the backbone alone.
    """
    staging = out.parent / f".{out.name}.{os.getpid()}"
    staging.mkdir(parents=True, exist_ok=True)
    backbone = model.vit
    half = {name: value.detach().cpu().half().contiguous() for name, value in backbone.state_dict().items()}
    # Loading follows this entry: training in the float16 of the file would not be stable.
    backbone.config.dtype = torch.float32
    backbone.config.architectures = ["ViTModel"]
    backbone.config.save_pretrained(staging)
    save_file(half, staging / "model.safetensors", metadata={"format": "pt"})
    classifier = {name: value.detach().cpu().half() for name, value in model.classifier.state_dict().items()}
    save_file(classifier, staging / "classifier.safetensors", metadata={"format": "pt"})
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(staging)
    (staging / "training.json").write_text(json.dumps({"training": facts}, indent=2) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        file.replace(out / file.name)
    staging.rmdir()
    logger.info("exported to %s after %s s", out, facts["seconds"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    length = run.add_mutually_exclusive_group(required=True)
    length.add_argument("--budget-seconds", type=float, help="train for so long; the schedule follows the clock")
    length.add_argument("--epochs", type=int, help="train for so many passes; the schedule follows the steps")
    numbers = {
        "width": 192, "layers": 5, "heads": 3, "patch-size": 5, "batch-size": 256, "seed": 0, "shift": 4,
        "lr": 2e-3, "warmup": 0.05, "weight-decay": 0.05, "clip": 1.0, "smoothing": 0.1, "average": 0.996,
        "keep": 0.5, "full-from": 0.9, "min-scale": 1.0, "mixup": 0.0, "erase": 0.0,
        "first-export-seconds": 480.0, "export-seconds": 900.0,
    }  # fmt: skip
    for name, value in numbers.items():
        run.add_argument(f"--{name}", type=type(value), default=value, help=" ")
    run.add_argument("--autocast", action="store_true", help="bfloat16 autocast, for GPUs")
    for verb in (run, verbs.add_parser("report", formatter_class=argparse.ArgumentDefaultsHelpFormatter)):
        verb.add_argument("--data", type=Path, required=True, help="folder of Tiny ImageNet at 32x32, in parquet")
        verb.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "everlora", help="decoded pixels")
        verb.add_argument("--out", type=Path, default=FOLDER, help="the packaged folder")
        verb.add_argument("--limit", type=int, default=None, help="only the first images, to try the script")
        verb.add_argument("--device", default="cpu", help=" ")
        verb.add_argument("--threads", type=int, default=2, help="CPU threads")
    verbs.choices["report"].add_argument("--cifar", type=Path, required=True, help="folder of CIFAR-100, in parquet")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the verb of the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    {"train": train, "report": report}[options.verb](options)


if __name__ == "__main__":
    main()
