"""The model card of the packaged backbone: the text of `backbone_card.md`, filled from measured figures."""

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

TEMPLATE = Path(__file__).with_suffix(".md")


def write_card(facts: dict[str, Any], folder: Path) -> None:
    """Fill the card's template from the measured facts and replace `README.md` of the folder."""
    training, cifar, overlap = facts["training"], facts["cifar100"], facts["overlap"]
    values = {**facts["model"], **training, **facts["tiny_imagenet"], **cifar}
    text = TEMPLATE.read_text(encoding="utf-8").format(
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
    far = ", well below what long training with strong augmentation gives" if on_cpu else ""
    return {
        "draft": "" if training["finished"] else "\n**A snapshot of a run that has not ended.**\n",
        "unused": f"; the last {unused} rows and columns of pixels fill no patch and are not seen" if unused else "",
        "device_use": f"{training['threads']} threads" if on_cpu else "one device",
        "pretraining_text": "Supervised classification from scratch; the last weights were taken, none chosen.",
        "accuracy_text": f"{limit}: it reached {top1:.1%} on the validation images of Tiny ImageNet{far}.",
        "repeat_text": "Its schedule followed the wall clock, so a second run gives similar, not equal, weights."
        if by_clock
        else "Its schedule counts steps, so a second run on the same device repeats it up to rounding.",
    }
