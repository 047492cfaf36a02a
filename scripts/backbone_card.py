"""The model card of the packaged backbone: its fixed text, filled from measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Class of CIFAR-100 -> classes of Tiny ImageNet that are kinds or other names of it, named by hand from the two lists.
SAME_THING = {
    "aquarium_fish": ["goldfish"],
    "bear": ["brown bear"],
    "beetle": ["ladybug"],
    "bottle": ["beer bottle", "pop bottle", "pill bottle"],
    "bridge": ["steel arch bridge", "suspension bridge", "viaduct"],
    "bus": ["school bus", "trolleybus"],
    "butterfly": ["monarch", "sulphur butterfly"],
    "camel": ["Arabian camel"],
    "cattle": ["ox"],
    "chair": ["rocking chair"],
    "elephant": ["African elephant"],
    "keyboard": ["computer keyboard"],
    "lamp": ["lampshade"],
    "lobster": ["American lobster", "spiny lobster"],
    "mountain": ["alp"],
    "rocket": ["projectile"],
    "sea": ["seashore"],
    "snake": ["boa constrictor"],
    "spider": ["black widow", "tarantula"],
    "sweet_pepper": ["bell pepper"],
    "table": ["dining table", "desk"],
    "telephone": ["pay-phone"],
    "train": ["bullet train", "freight car"],
}

# Neighbours in kind or in the picture, but not the same thing.
CLOSE_RELATIVES = {
    "clock": ["stopwatch", "hourglass"],
    "crab": ["American lobster", "spiny lobster"],
    "crocodile": ["American alligator"],
    "cup": ["espresso", "beaker"],
    "hamster": ["guinea pig"],
    "house": ["barn", "thatch"],
    "leopard": ["cougar"],
    "lizard": ["European fire salamander"],
    "oak_tree": ["acorn"],
    "pickup_truck": ["moving van", "police van"],
    "plain": ["lakeside"],
    "raccoon": ["lesser panda"],
    "streetcar": ["trolleybus"],
    "tiger": ["tabby", "lion", "cougar"],
    "trout": ["goldfish"],
    "wardrobe": ["chest"],
    "whale": ["dugong"],
    "wolf": ["German shepherd"],
}

TEMPLATE = """---
license: other
license_name: non-commercial-research-and-education
license_link: LICENSE-WEIGHTS.md
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [vit, image-feature-extraction, tiny-imagenet]
---

# vit-tiny-imagenet-32

A small vision transformer for 32x32 images, in the Hugging Face layout (`ViTModel`, no pooling layer), so that the
recipes of everlora have a pretrained network to adapt without a download. It is a tool for tests, demonstrations and comparisons of
continual-learning methods, not a competitive image model. This file is written from `training.json`, which the training script measures.
{draft}
| | |
| --- | --- |
| architecture | {layers} layers, width {width}, {heads} heads, MLP {mlp_width}, patches of {patch_size}x{patch_size} ({patches} and a class token) |
| parameters | {parameters:,} |
| `model.safetensors` | {weights_bytes:,} bytes, float16; `config.json` asks for float32 in memory |
| `classifier.safetensors` | the linear layer over the 200 pretraining classes, names in `config.json` |
| input | 32x32 RGB, `pixel / 127.5 - 1` (`preprocessor_config.json`: mean and deviation 0.5){unused} |

```python
import torch
from everlora.weights import packaged_model
from transformers import ViTModel

model = ViTModel.from_pretrained(packaged_model(), add_pooling_layer=False)
pixels = torch.zeros(1, 3, 32, 32)  # in [-1, 1]
class_token = model(pixel_values=pixels).last_hidden_state[:, 0]  # (1, {width})
```

## Figures

| measured on the exported weights | accuracy |
| --- | --- |
| Tiny ImageNet at 32x32, {validation_images:,} validation images, top 1 | **{top1:.2%}** |
| the same, top 5 | {top5:.2%} |
| CIFAR-100 linear probe on the class token, test | **{probe[test_accuracy]:.2%}** |
| of it, the {shared_classes_of_cifar100} classes shared with pretraining / the {other_classes_of_cifar100} others | {probe[test_accuracy_on_shared_classes]:.2%} / {probe[test_accuracy_on_other_classes]:.2%} |
| CIFAR-100 linear probe on the mean of the patches, test | {mean_probe[test_accuracy]:.2%} |
| of it, shared classes / the others | {mean_probe[test_accuracy_on_shared_classes]:.2%} / {mean_probe[test_accuracy_on_other_classes]:.2%} |
| CIFAR-100 20 nearest neighbours, class token, test | {nearest_neighbours_test_accuracy:.2%} |
| CIFAR-100 nearest class mean, class token, test | {nearest_class_mean_test_accuracy:.2%} |

The linear probe is multinomial logistic regression on standardised frozen features of all {train_images:,} training images; its penalty was
chosen among {num_penalties} values on a held-out tenth of the training images. No validation image of Tiny ImageNet and no test image of CIFAR-100
took part in any choice: they were read once, for this table.

## Recipe

{pretraining_text}

```
{train_command}
{report_command}
```

| | |
| --- | --- |
| training | {seconds:,.0f} s wall clock on {device}, {device_use}, torch {torch} |
| images seen | {images_seen:,} in {steps:,} steps of {batch_size} ({epochs:g} passes over {images_in_training_set:,}), {images_per_second:g} images/s |
| seed | {seed} |

Initialised after Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023), with a two-dimensional sinusoidal position
table as the start. Hidden matrices are trained by Muon (Jordan et al., 2024), the rest by AdamW; linear warm-up, cosine to zero; flips and
shifts; label smoothing; a random share of the patches is left out until the last part of the run; exported is a running average of the
weights.

## Data and licence

Trained on the training split of Tiny ImageNet-200 (Stanford CS231n), shrunk to 32x32: {images_in_training_set:,} images of 200 classes, a subset of
ImageNet, whose terms allow **non-commercial research and education only**. The weights are handed on under the same limits:
see `LICENSE-WEIGHTS.md`. The code of everlora is Apache-2.0; these weights are not.

## Class overlap with CIFAR-100

Pretraining has seen, with labels, many subjects of CIFAR-100, so results on CIFAR-100 with this network are **not** results on unseen
classes. The images come from different collections; that no single photograph is in both was not checked. Compared were the class names that
the two data files carry. {shared_classes_of_cifar100} of the 100 classes are shared, in one of two senses:

- **Same name** ({num_same_name}, compared by program, ignoring case and underscores): {same_name}.
- **Same thing under another name, or a kind of it** ({num_same_thing}, named by hand from the two lists): {same_thing}.

Not counted as shared, but close ({num_close}, by hand): {close_relatives}.

Fairer tests of new classes are sets of another kind, such as handwritten digits, or the {other_classes_of_cifar100} other classes alone.

## Limits

- {accuracy_text}
- 32x32 pixels, natural photographs, the biases of the source collection; not for decisions about people, nor for any use in production.
- Trained once, with one seed. {repeat_text}
"""


def write_card(facts: dict[str, Any], folder: Path) -> None:
    """Fill the card's template from the measured facts and replace `README.md` of the folder."""
    training, cifar, overlap = facts["training"], facts["cifar100"], facts["overlap"]
    values = {**facts["model"], **training, **facts["tiny_imagenet"], **cifar}
    text = TEMPLATE.format(
        **values,
        **wording(facts),
        probe=cifar["linear_probe_class_token"],
        mean_probe=cifar["linear_probe_mean_of_patches"],
        num_penalties=len(cifar["linear_probe_class_token"]["held_out_accuracy"]),
        train_command=training["command"],
        report_command=facts["report"]["command"],
        shared_classes_of_cifar100=overlap["shared_classes_of_cifar100"],
        other_classes_of_cifar100=overlap["other_classes_of_cifar100"],
        num_same_name=len(overlap["same_name"]),
        num_same_thing=len(overlap["same_thing"]),
        num_close=len(overlap["close_relatives"]),
        same_name=", ".join(name.replace("_", " ") for name in overlap["same_name"]),
        same_thing=listed(overlap["same_thing"]),
        close_relatives=listed(overlap["close_relatives"]),
    )
    partial = folder / "README.md.partial"
    partial.write_text(text)
    partial.replace(folder / "README.md")


def listed(table: dict[str, list[str]]) -> str:
    """Write a table of related classes as one phrase."""
    return "; ".join(f"{name.replace('_', ' ')} ({', '.join(others)})" for name, others in sorted(table.items()))


def wording(facts: dict[str, Any]) -> dict[str, str]:
    """Choose the sentences that depend on how the network was trained."""
    training, model = facts["training"], facts["model"]
    on_cpu = "--device" not in training["command"] or "--device cpu" in training["command"]
    unused = model["pixels_unused_at_right_and_bottom"]
    by_clock = "--budget-seconds" in training["command"]
    top1 = facts["tiny_imagenet"]["top1"]
    limit = "Trained for a short time on a processor, beside other work" if on_cpu else "Trained on an accelerator"
    return {
        "draft": "" if training["finished"] else "\n**A snapshot of a run that has not ended.**\n",
        "unused": f"; the last {unused} rows and columns of pixels fill no patch and are not seen" if unused else "",
        "device_use": f"{training['threads']} threads" if on_cpu else "one device",
        "pretraining_text": "Supervised classification from scratch; the last weights were taken, there was no early stopping.",
        "accuracy_text": f"{limit}: {top1:.1%} of the validation images of Tiny ImageNet is what it reached, and far from "
        "what networks of this size reach with long training."
        if on_cpu
        else f"{limit}: {top1:.1%} on Tiny ImageNet.",
        "repeat_text": "Its schedule followed the wall clock, so a second run gives similar, not equal, weights."
        if by_clock
        else "Its schedule counts steps, so a second run on the same device repeats it up to rounding.",
    }
