"""Measure the exported backbone and write its card: no figure of the card is typed by hand."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from backbone_card import CLOSE_RELATIVES, SAME_THING, write_card
from backbone_data import normalise, read_images
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import ViTModel

PENALTIES = (1e-4, 1e-3, 1e-2)
TRIAL_ITERATIONS, FINAL_ITERATIONS = 60, 200
NEIGHBOURS = 20
logger = logging.getLogger("everlora.pretrain")


def report(options: argparse.Namespace) -> None:
    """Add the measured figures to `training.json` of the exported folder, and write its `README.md` from them."""
    started = time.monotonic()
    path = options.out / "training.json"
    facts = json.loads(path.read_text())
    model = ViTModel.from_pretrained(options.out, add_pooling_layer=False, dtype=torch.float32)
    model = model.to(options.device).eval()
    facts["model"] = model_facts(model, options.out)
    names = [model.config.id2label[index] for index in range(len(model.config.id2label))]
    facts["tiny_imagenet"] = measure_tiny_imagenet(model, options, names)
    facts["overlap"], related = overlap(names, read_images(options.cifar, "test", "label", options.cache)[2])
    facts["cifar100"] = measure_cifar100(model, options, related)
    facts["report"] = {
        "command": public_command(sys.argv),
        "seconds": round(time.monotonic() - started, 1),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    partial.replace(path)
    write_card(facts, options.out)
    logger.info("card written to %s", options.out / "README.md")


def public_command(arguments: list[str]) -> str:
    """Return the command line with every absolute path cut to its last part: the card names no machine's folders."""
    words = [Path(word).name if word.startswith(os.sep) else word for word in arguments[1:]]
    return "python scripts/pretrain_backbone.py " + shlex.join(words)


def model_facts(model: ViTModel, folder: Path) -> dict[str, object]:
    """Return shape, parameter count and bytes on disk."""
    config = model.config
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "patch_size": config.patch_size,
        "patches": (config.image_size // config.patch_size) ** 2,
        "pixels_unused_at_right_and_bottom": config.image_size % config.patch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
    }


@torch.no_grad()
def features(model: ViTModel, pixels: Tensor, device: str, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Return the class token and the mean of the patches, each `(n, d)` float32 on the CPU."""
    tokens, means = [], []
    for batch in pixels.split(batch_size):
        hidden = model(pixel_values=normalise(batch.to(device))).last_hidden_state
        tokens.append(hidden[:, 0].cpu())
        means.append(hidden[:, 1:].mean(dim=1).cpu())
    return torch.cat(tokens), torch.cat(means)


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Return the share of rows whose label is among the `top` highest scores."""
    hits = (scores.topk(top, dim=1).indices == labels[:, None]).any(dim=1)
    return round(float(hits.float().mean()), 4)


def measure_tiny_imagenet(model: ViTModel, options: argparse.Namespace, names: list[str]) -> dict[str, object]:
    """Score the validation images with the classifier of the pretraining run."""
    pixels, labels, stored = read_images(options.data, "validation", "label", options.cache)
    pixels, labels = pixels[: options.limit], labels[: options.limit]
    if stored != names:
        raise SystemExit(f"expected the class names of {options.out / 'config.json'} in {options.data}, found others")
    classifier = load_file(options.out / "classifier.safetensors")
    token, _ = features(model, pixels, options.device)
    scores = functional.linear(token, classifier["weight"].float(), classifier["bias"].float())
    result = {
        "validation_images": len(labels),
        "top1": accuracy(scores, labels),
        "top5": accuracy(scores, labels, 5),
    }
    logger.info("Tiny ImageNet: %s", result)
    return result


def fit_probe(inputs: Tensor, labels: Tensor, penalty: float, *, num_classes: int, iterations: int) -> Tensor:
    """Return `(d + 1, classes)` weights of multinomial logistic regression, fitted by L-BFGS.

    Args:
        inputs: `(n, d + 1)`, standardised, last column 1.
        labels: `(n,)` int64.
        penalty: factor of half the squared norm, beside the mean cross-entropy; the bias row is free.
        num_classes: number of columns.
        iterations: at most so many; it stops earlier at a vanishing gradient.
    """
    weight = torch.zeros(inputs.shape[1], num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight, labels) + 0.5 * penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int
) -> tuple[Tensor, dict[str, object]]:
    """Choose the penalty on a tenth of the training rows, refit on all of them, and return the test scores."""
    mean, deviation = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (torch.cat([(x - mean) / deviation, torch.ones(len(x), 1)], dim=1) for x in (train, test))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(train) // 10], order[len(train) // 10 :]
    trials = {}
    for penalty in PENALTIES:
        weight = fit_probe(
            train[kept], train_labels[kept], penalty, num_classes=num_classes, iterations=TRIAL_ITERATIONS
        )
        trials[penalty] = accuracy(train[held] @ weight, train_labels[held])
    best = max(trials, key=lambda penalty: trials[penalty])
    weight = fit_probe(train, train_labels, best, num_classes=num_classes, iterations=FINAL_ITERATIONS)
    facts: dict[str, object] = {"penalty": best, "held_out_accuracy": {f"{p:g}": value for p, value in trials.items()}}
    return test @ weight, facts


def measure_cifar100(model: ViTModel, options: argparse.Namespace, related: Tensor) -> dict[str, object]:
    """Measure how far the frozen features separate CIFAR-100.

    Args:
        model: the exported backbone.
        options: `cifar`, `cache`, `device`.
        related: `(100,)` bool, the classes whose subject pretraining has seen.
    """
    pixels, labels, _ = read_images(options.cifar, "train", "label", options.cache)
    test_pixels, test_labels, _ = read_images(options.cifar, "test", "label", options.cache)
    pixels, labels = pixels[: options.limit], labels[: options.limit]
    test_pixels, test_labels = test_pixels[: options.limit], test_labels[: options.limit]
    train, test = features(model, pixels, options.device), features(model, test_pixels, options.device)
    result: dict[str, object] = {"train_images": len(labels), "test_images": len(test_labels)}
    for name, inputs, test_inputs in (("class_token", train[0], test[0]), ("mean_of_patches", train[1], test[1])):
        scores, facts = linear_probe(inputs, labels, test_inputs, len(related))
        facts["test_accuracy"] = accuracy(scores, test_labels)
        seen = related[test_labels]
        facts["test_accuracy_on_shared_classes"] = accuracy(scores[seen], test_labels[seen])
        facts["test_accuracy_on_other_classes"] = accuracy(scores[~seen], test_labels[~seen])
        result[f"linear_probe_{name}"] = facts
        logger.info("CIFAR-100 probe, %s: %s", name, facts)
    result["nearest_class_mean_test_accuracy"] = nearest_mean(train[0], labels, test[0], test_labels)
    result["nearest_neighbours_test_accuracy"] = nearest_neighbours(train[0], labels, test[0], test_labels)
    return result


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of the nearest class mean, by cosine of class tokens."""
    members = functional.one_hot(labels).float()
    means = members.T @ functional.normalize(train, dim=1)
    return accuracy(functional.normalize(test, dim=1) @ functional.normalize(means, dim=1).T, test_labels)


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the test accuracy of a vote of the 20 nearest training images, by cosine of class tokens."""
    train, members = functional.normalize(train, dim=1), functional.one_hot(labels).float()
    votes = []
    for batch in functional.normalize(test, dim=1).split(500):
        near = (batch @ train.T).topk(NEIGHBOURS, dim=1)
        votes.append((near.values.div(0.07).exp()[:, :, None] * members[near.indices]).sum(dim=1))
    return accuracy(torch.cat(votes), test_labels)


def overlap(tiny: list[str], cifar: list[str]) -> tuple[dict[str, object], Tensor]:
    """Compare the class lists of the two data sets.

    Returns:
        The lists for the card, and `(100,)` bool: classes of CIFAR-100 whose subject stands in Tiny ImageNet.

    Raises:
        SystemExit: the table of related classes names a class that one of the lists does not hold.
    """
    plain = {name.replace("_", " ").lower(): name for name in cifar}
    identical = sorted(plain[name.lower()] for name in tiny if name.lower() in plain)
    for table in (SAME_THING, CLOSE_RELATIVES):
        unknown = [name for name in table if name not in cifar]
        unknown += [name for names in table.values() for name in names if name not in tiny]
        if unknown:
            raise SystemExit(f"expected class names of the two data sets in the overlap table, found {unknown}")
    shared = torch.tensor([name in identical or name in SAME_THING for name in cifar])
    facts: dict[str, object] = {
        "same_name": identical,
        "same_thing": SAME_THING,
        "close_relatives": CLOSE_RELATIVES,
        "shared_classes_of_cifar100": int(shared.sum()),
        "other_classes_of_cifar100": int((~shared).sum()),
    }
    return facts, shared
