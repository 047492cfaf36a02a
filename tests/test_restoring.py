"""A directory whose checksums are right and whose tensors are not those of its method is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everlora.errors import EverloraError, StoreError
from everlora.methods import method_spec
from everlora.methods.base import Method
from everlora.record import load_base
from everlora.restoring import restore_state
from everlora.settings import Settings
from everlora.store import LearnerStore
from tests.durability.damage import change_arrays, reseal
from tests.toy import tiny_model, toy_learner, toy_tasks

Arrays = dict[str, "np.ndarray[Any, Any]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learners of two tasks, one folder for each method."""
    place = tmp_path_factory.mktemp("made")
    model = tiny_model("bert", place / "base")
    for method in METHODS:
        learner = toy_learner(place / method, model, method, epochs=1)
        for number, task in enumerate(toy_tasks("text", 2)):
            learner.learn(task, name=f"task {number}")
    return place


# files that the newest task wrote, by method
METHODS: dict[str, tuple[str, ...]] = {
    "inflora": ("tasks/001-task-1/adapter_model.safetensors", "tasks/001-task-1/added.safetensors"),
    "sd_lora": ("tasks/001-task-1/adapter_model.safetensors", "tasks/001-task-1/added.safetensors"),
    "replay": ("tasks/001-task-1/adapter_model.safetensors", "state/001/arrays.safetensors"),
}


def restored(folder: Path) -> Method:
    store = LearnerStore.open(folder)
    settings = Settings.from_parts(method_spec(store.header["method"]), store.header["options"])
    backbone = load_base(store.header, None, settings)
    method: Method = settings.method.method_class(settings.method_options, backbone, seed=settings.training.seed)
    restore_state(method, store)
    return method


def _drop(arrays: Arrays, name: str) -> None:
    del arrays[name]


def _lengthen(arrays: Arrays, name: str) -> None:
    arrays[name] = np.append(arrays[name].reshape(-1), arrays[name].reshape(-1)[:1])


def _add(arrays: Arrays, name: str) -> None:
    arrays["stranger"] = arrays[name].copy()


@pytest.mark.parametrize("change", [_drop, _lengthen, _add])
@pytest.mark.parametrize(("method", "file"), [(method, file) for method, files in METHODS.items() for file in files])
def test_other_tensors_are_refused(
    method: str, file: str, change: Callable[[Arrays, str], None], made: Path, tmp_path: Path
) -> None:
    names: list[str] = []
    change_arrays(made / method / file, lambda arrays: names.extend(sorted(arrays)))
    # Rows of a buffer are whatever they were; a method cannot say how many there should be.
    for number, name in enumerate([name for name in names if not name.startswith("buffer/")][::3]):
        folder = Path(shutil.copytree(made / method, tmp_path / str(number)))
        change_arrays(folder / file, lambda arrays, name=name: change(arrays, name))
        reseal(folder)
        with pytest.raises(EverloraError) as caught:
            restored(folder)
        assert "\n" not in str(caught.value)
        shutil.rmtree(folder)


@pytest.mark.parametrize("method", list(METHODS))
def test_what_was_written_is_taken(method: str, made: Path) -> None:
    assert restored(made / method).state()


def test_what_a_method_stumbles_over_becomes_one_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_arguments: object) -> None:
        raise KeyError("tasks/000/memory")

    monkeypatch.setattr(method_spec("inflora").method_class, "load_state", stumble)
    with pytest.raises(StoreError, match=r"holds tensors that its method cannot take \(KeyError: 'tasks/000/memory'\)"):
        restored(made / "inflora")
