"""Packages that must fit each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

from everlora.doctor.findings import Finding, broken

__all__ = ["check_environment"]

_PINNED = re.compile(r"torch\s*\(?==\s*([0-9][0-9.]*)")


def check_environment() -> Iterator[Finding]:
    """A torchvision made for another torch: models of images then fail to load, everlora itself does not need it."""
    try:
        vision, torch = metadata.version("torchvision"), metadata.version("torch")
        required = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return
    wanted = next((found.group(1) for line in required if (found := _PINNED.match(line))), None)
    mend = "install the two that belong together, or uninstall torchvision, which everlora does not need"
    if wanted is not None and wanted != torch.partition("+")[0]:
        what = f"{vision} was made for torch {wanted}, and torch {torch} is installed"
        yield broken("torchvision", what, mend)
    elif (build := vision.partition("+")[2]) != torch.partition("+")[2] and build:
        yield broken("torchvision", f"{vision} is of another build than torch {torch}", mend)
