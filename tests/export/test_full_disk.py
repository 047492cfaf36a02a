"""An export that cannot be written: one sentence, and nothing of it is left."""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

from everlora.backbones import load_backbone
from everlora.errors import StoreError
from everlora.export import export_merged, export_peft
from tests.export import language_builders
from tests.export.builders import CARD, make_head, teach
from tests.methods.conv_builders import save_resnet
from tests.tiny_models import save_tiny

Export = Callable[[Path], Any]
FORMATS = [f"{kind} {format}" for kind in ("vit", "bert", "resnet", "language") for format in ("merged", "peft")]
CASES = [name if name == "vit merged" else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture
def exporter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """What writes an export of a kind of model in a format."""
    kind, format = request.param.split()
    base = tmp_path_factory.mktemp("base")
    if kind == "language":
        model = language_builders.load_language_model(language_builders.save_language_model("llama", base))
        taught = language_builders.teach(model, variants=("fast", "slow") if format == "peft" else ())
        return lambda folder: language_builders.export(taught, model, folder, format)
    backbone = load_backbone(save_resnet(base) if kind == "resnet" else save_tiny(kind, base))
    layers, head = teach(backbone), make_head(backbone)
    write = export_merged if format == "merged" else export_peft
    return lambda folder: write(backbone, layers, head, folder, card=CARD)


class Disk:
    """Lets a number of steps through, then is full: no folder, name or file is made, and files end half-way."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        for name in ("mkdir", "rename", "replace", "chmod"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", self._open(builtins.open if module is builtins else io.open))
        patch.setattr(safetensors.torch, "serialize_file", self._serialize(safetensors.torch.serialize_file))

    @property
    def is_full(self) -> bool:
        return self.room < 0

    def take(self, name: object = None) -> None:
        self.room -= 1
        if self.is_full:
            raise OSError(errno.ENOSPC, FULL, None if name is None else str(name))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.take(args[0])
            return real(*args, **kwargs)

        return step

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = bool(set(mode) & set("wxa+"))
            if writes:
                self.take(file)
            found = real(file, mode, *args, **kwargs)
            if writes:
                self._limit(found)
            return found

        return opened

    def _limit(self, file: Any) -> None:
        write, first = file.write, iter([True])

        def half(data: Any) -> Any:
            try:
                if next(first, False):
                    self.take(file.name)
            except OSError:
                write(data[: len(data) // 2])
                raise
            return write(data)

        file.write = half

    def _serialize(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def written(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            try:
                self.take(filename)
            except OSError:
                Path(filename).touch()
                raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)") from None
            real(tensors, filename, *args, **kwargs)

        return written


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("exporter", CASES, indirect=True)
def test_every_write_on_a_full_disk(exporter: Export, tmp_path: Path) -> None:
    for room in range(400):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, room)
            try:
                exporter(tmp_path / "new" / "out")
            except StoreError as error:
                assert disk.is_full
                text = str(error)
            else:
                break
        assert FULL in text and text.startswith(f"the export to {tmp_path / 'new' / 'out'} failed") and "\n" not in text
        assert _names(tmp_path) == [], text
    assert not disk.is_full and room > 8
    assert _names(tmp_path)[:2] == ["new", "new/out"]


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """Let the system itself refuse what goes beyond a size, whatever writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("exporter", CASES, indirect=True)
def test_what_the_system_refuses(exporter: Export, tmp_path: Path) -> None:
    exporter(tmp_path / "whole")
    sizes = {path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    (tmp_path / "out").mkdir()
    for size in sorted(sizes - {0}):
        with _files_of_at_most(size - 1), pytest.raises(StoreError) as caught:
            exporter(tmp_path / "out")
        assert os.strerror(errno.EFBIG) in str(caught.value) and "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
        assert _names(tmp_path / "out") == [], "it was there and empty before"
    exporter(tmp_path / "out")
    assert _names(tmp_path / "out") == _names(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
@pytest.mark.parametrize("exporter", ["vit merged"], indirect=True)
def test_a_folder_that_may_not_be_written_to(exporter: Export, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"Permission denied; .*name another folder"):
            exporter(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)
