"""Giving a method back what a learner directory holds, and making sure that it is all of it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from everlora.errors import EverloraError, StoreError
from everlora.methods.base import Method, State
from everlora.methods.keys import task_key
from everlora.snapshot import join_state
from everlora.store import LearnerStore

__all__ = ["restore_state"]


def restore_state(method: Method, store: LearnerStore) -> None:
    """Load what a method wrote after the newest task, verified.

    Checksums say that the files are those that were written. That their tensors are those of this method, with this
    base model and these options, is seen by asking the method what it remembers now: names, shapes and types must be
    the same. A directory made by hand, or by other options, is found by that before anything is predicted.

    Args:
        method: newly made.
        store: of the learner.

    Raises:
        StoreError: a file is missing or changed, or holds other tensors than the method expects.
    """
    state = join_state(store)
    try:
        method.load_state(state)
        found = method.state() if store.tasks else {}
    except EverloraError:
        raise
    # Whatever a tensor of a wrong name or shape makes a method stumble over, it is the directory that is wrong.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StoreError(
            f"{store.root} holds tensors that its method cannot take ({type(error).__name__}: {reason}); restore it "
            "from a backup, or examine it with `everlora doctor`"
        ) from error
    if store.tasks:
        _compare(state, found, store)


def _compare(written: State, found: State, store: LearnerStore) -> None:
    before, after = _shapes(written), _shapes(found)
    newest = task_key(len(store.tasks) - 1, "")
    # A method may be done with what an earlier task added: factors that later ones went on from, for instance.
    before = {n: v for n, v in before.items() if n in after or not n.startswith("tasks/") or n.startswith(newest)}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise StoreError(
                f"{store.root} holds '{name}' as {before.get(name, 'nothing')}, where its method expects "
                f"{after.get(name, 'nothing')}; restore it from a backup, or examine it with `everlora doctor`"
            )


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    """Type and shape of every tensor; of other values that they are there."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else "value"
        for name, value in state.items()
    }
