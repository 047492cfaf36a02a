"""Several processes that train one learner together, as `torchrun` starts them.

Every process holds all data and all that a method remembers, and does everything but three things: of an optimiser
step each computes a part, of a pass over data each goes through some of the batches, and only the first writes to the
disk. What was summed up or gathered in a pass is then added up over all, so that all go on with the same numbers.

Before any tensor is exchanged the processes tell each other whether one of them has failed. Whoever fails, wherever it
is, thus meets the others at their next exchange, and none waits for one that will not come.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, distributed, nn

from everlora.errors import ProcessError, UnsupportedError

__all__ = ["Processes", "device_of_process", "processes"]

_MESSAGE_BYTES = 2048


class Processes:
    """The processes of this run, as one of them sees them; a run of a single process exchanges nothing.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self._device = device or torch.device("cpu")
        self._known: BaseException | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def check(self, error: Exception | None = None) -> None:
        """Wait for all processes, and stop in each if one has failed.

        Args:
            error: why this process failed; None if it did not.

        Raises:
            Exception: `error` itself.
            ProcessError: another process failed; the message gives its reason.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        failed = torch.zeros(self.size, device=self._device)
        failed[self.rank] = error is not None
        first = int(self._reduce(failed, error).argmax())
        if not failed[first]:
            return
        reason = self._tell(first, error)
        known = error or ProcessError(
            f"process {first} of {self.size} failed and this one stopped with it; the reason there: {reason}"
        )
        self._known = known
        raise known

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; each must call this equally often."""
        if self.size == 1:
            return values
        self.check()
        return self._reduce(values.detach().to(self._device, copy=True)).to(values.device)

    def gather(self, state: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what all processes gathered, in their order; each must call this equally often.

        Args:
            state: name to tensor, which comes back on the CPU where there are several processes, or to a plain JSON
                value; names and shapes may differ between the processes.
        """
        if self.size == 1:
            return [dict(state)]
        own = _packed(state).to(self._device)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        counts = self.sum(sizes).tolist()
        parts = [torch.zeros(max(counts), dtype=torch.uint8, device=self._device) for _ in counts]
        padded = nn.functional.pad(own, (0, max(counts) - len(own)))
        with self._connected():
            distributed.all_gather(parts, padded)
        return [_unpacked(part[:count].cpu()) for part, count in zip(parts, counts, strict=True)]

    def own(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Those batches of a pass that this process goes through, every so-manieth.

        A batch stays whole, so that what is computed of it does not depend on how many processes there are.
        """
        return list(batches[self.rank :: self.size])

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Put the sum over all processes in place of every gradient, in one exchange.

        A parameter without a gradient counts as 0, and stays without one where no process has any.

        Args:
            parameters: the same ones in the same order in each process.
            loss: of this process's part of the step.

        Returns:
            The sum of the losses.
        """
        if self.size == 1:
            return loss
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        have = [float(p.grad is not None) for p in parameters]
        flat = torch.cat([part.reshape(-1).to(self._device, dtype) for part in parts])
        tail = torch.tensor([*have, loss], device=self._device, dtype=dtype)
        total = self._reduce(torch.cat([flat, tail]))
        *counts, summed = total[len(flat) :].tolist()
        pieces = torch.split(total[: len(flat)], [p.numel() for p in parameters])
        for parameter, piece, count in zip(parameters, pieces, counts, strict=True):
            if count:
                parameter.grad = piece.reshape(parameter.shape).to(parameter.device, parameter.dtype)
        return float(summed)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for each other at the end of a `with` block, and leave it with an error if one process failed in it."""
        try:
            yield
        except Exception as error:
            if not self._is_known(error):
                self.check(error)
            raise
        self.check()

    def _is_known(self, error: BaseException) -> bool:
        """Whether all processes have heard of a failure already, perhaps in the words of another error."""
        seen: BaseException | None = error
        while seen is not None and self.size > 1:
            if seen is self._known:
                return True
            seen = seen.__cause__ or seen.__context__
        return False

    def _reduce(self, values: Tensor, error: Exception | None = None) -> Tensor:
        with self._connected(error):
            distributed.all_reduce(values)
        return values

    @contextmanager
    def _connected(self, error: Exception | None = None) -> Iterator[None]:
        """Say in one sentence that another process is gone, or raise the error that was to be told."""
        try:
            yield
        except RuntimeError as broken:
            self._known = error or ProcessError(
                f"process {self.rank} of {self.size} lost the connection to another, which must have ended; see what "
                "that one printed last"
            )
            raise self._known from broken

    def _tell(self, first: int, error: Exception | None) -> str:
        """Send the reason of the first process that failed to all."""
        text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES]
        message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=self._device)
        message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8, device=self._device)
        distributed.broadcast(message, first)
        return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")


def processes(device: torch.device | str = "cpu") -> Processes:
    """Return the processes of this run; the first call in a run of several waits until all have called it.

    Args:
        device: what is computed on; decides by what the processes talk, gloo or nccl.

    Raises:
        UnsupportedError: several processes would have to share a GPU.
    """
    if _environment("WORLD_SIZE", 1) == 1:
        return _ALONE
    return _set_up(torch.device(device).type)


def device_of_process(name: str | None = None) -> str:
    """Return the name of a device: a GPU by default, where there is one; of several processes each has its own."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda" or _environment("WORLD_SIZE", 1) == 1:
        return device
    return f"cuda:{_environment('LOCAL_RANK', 0)}"


_ALONE = Processes()


@functools.cache
def _set_up(kind: str) -> Processes:
    here = _environment("LOCAL_WORLD_SIZE", 1)
    if kind == "cuda" and here > torch.cuda.device_count():
        raise UnsupportedError(
            f"{here} processes need a GPU each, found {torch.cuda.device_count()}; start fewer, or pass device='cpu'."
        )
    from accelerate import PartialState  # a run of one process has no need of it

    state = PartialState(cpu=kind != "cuda")
    return Processes(state.process_index, state.num_processes, state.device)


def _packed(state: Mapping[str, Any]) -> Tensor:
    """A state as bytes, `(n,)` uint8."""
    tensors = {f"tensors/{k}": v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, Tensor)}
    text = json.dumps({key: value for key, value in state.items() if not isinstance(value, Tensor)}).encode()
    data = save({**tensors, "values": torch.tensor(list(text), dtype=torch.uint8)})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _unpacked(data: Tensor) -> dict[str, Any]:
    """What `_packed` was given."""
    tensors = load(data.numpy().tobytes())
    values = json.loads(tensors.pop("values").numpy().tobytes())
    return {**{key.removeprefix("tensors/"): value for key, value in tensors.items()}, **values}


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
