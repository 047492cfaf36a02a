"""What to do when a step needs more memory than there is: compute it in more, smaller pieces."""

from __future__ import annotations

import torch

from everlora.errors import ProcessError

__all__ = ["free_memory", "is_out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in this process or in one that trains along with it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, ProcessError):
        return torch.OutOfMemoryError.__name__ in str(error)
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size  # only a run in trouble has need of it

    return bool(should_reduce_batch_size(error))


def free_memory() -> None:
    """Let go of memory that nothing refers to any more."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
