"""Modules that every task has its own version of: one version is in place at a time, and switching copies nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from everlora.errors import DataError, ShapeError

__all__ = ["TaskModules"]


class TaskModules(nn.Module):
    """Versions of some modules of a network, one set a task.

    A version may hold modules by reference: the frozen base of an adapter, or a whole module of the original network or
    of an earlier task. What it shares is not part of its tensors. All versions are registered here, so they move to a
    device together.

    Args:
        model: the network; its modules are exchanged in place, none of their tensors is ever written.

    Attributes:
        active: the task whose version is in place; None for the original modules or some others.

    Source: section 2 of the reference on convolutional networks (`set_task`).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._network = [model]  # in a list, so that the network does not become a part of its own versions
        self._originals: dict[str, nn.Module] = {}
        self._versions = nn.ModuleList()
        self._paths: list[tuple[str, ...]] = []
        # By path all modules and parameters seen so far, and by task those of its own that were seen before it: kept
        # as tasks come, because looking through all earlier tasks would make each dearer than the last.
        self._seen: dict[str, set[int]] = {}
        self._own_paths: list[tuple[str, ...]] = []
        self._shared: list[frozenset[int]] = []
        self._counts: dict[int, int] = {}
        self._others_in_place = False
        self.active: int | None = None

    def __len__(self) -> int:
        """Number of tasks that have a version."""
        return len(self._paths)

    def add(self, modules: Mapping[str, nn.Module]) -> int:
        """Register the version of the next task, without putting it in place.

        Args:
            modules: qualified name in the network -> the module that stands there for this task. No name may lie below
                another one of this or an earlier task.

        Returns:
            The number of the task.
        """
        shared: set[int] = set()
        own = []
        for path, module in modules.items():
            original = self._originals.setdefault(path, self.original(path))
            seen = self._seen.setdefault(path, _ids(original))
            if id(module) not in seen:
                own.append(path)
            shared |= _ids(module) & seen
            seen |= _ids(module)
        self._own_paths.append(tuple(own))
        self._shared.append(frozenset(shared))
        self._paths.append(tuple(modules))
        self._versions.append(nn.ModuleList(modules.values()))
        return len(self._paths) - 1

    def original(self, path: str) -> nn.Module:
        """The module that stood at `path` before there were tasks."""
        return self._originals[path] if path in self._originals else self._network[0].get_submodule(path)

    def version(self, task: int) -> dict[str, nn.Module]:
        """The modules of one task by path.

        Raises:
            DataError: there is no such task.
        """
        if not 0 <= task < len(self._paths):
            raise DataError(f"there is no task {task}; {len(self._paths)} tasks were learned, counted from 0.")
        return dict(zip(self._paths[task], self._modules_of(task), strict=True))

    def own(self, task: int) -> dict[str, nn.Module]:
        """Those modules of a task that are neither original nor an earlier task's."""
        version = self.version(task)
        return {path: version[path] for path in self._own_paths[task]}

    def activate(self, task: int | None) -> None:
        """Put the modules of a task in place, or for None the original ones; a matter of pointers."""
        if task == self.active and not self._others_in_place:
            return
        self.put({} if task is None else self.version(task))
        self.active, self._others_in_place = task, False

    def put(self, modules: Mapping[str, nn.Module]) -> None:
        """Put some other modules in place, which belong to no task, and the original ones everywhere else."""
        for path in modules:
            self._originals.setdefault(path, self.original(path))
        for path, original in self._originals.items():
            parent, _, name = path.rpartition(".")
            setattr(self._network[0].get_submodule(parent), name, modules.get(path, original))
        self.active, self._others_in_place = None, True

    def tensors(self, task: int) -> Iterator[tuple[str, str, Tensor]]:
        """Yield `(path, name, tensor)` of all that a task's version shares with nothing before it."""
        for path, module in self.own(task).items():
            shared = self._shared[task]
            below = tuple(
                f"{name}." for name, part in module.named_modules(remove_duplicate=False) if id(part) in shared
            )
            tied = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in shared}
            for name, tensor in module.state_dict().items():
                if tensor.numel() and name not in tied and not name.startswith(below):
                    yield path, name, tensor

    def parameters_of(self, task: int) -> list[nn.Parameter]:
        """Parameters that a task's version shares with nothing before it, each once."""
        found: dict[int, nn.Parameter] = {}
        for module in self.own(task).values():
            found |= {id(p): p for p in module.parameters() if id(p) not in self._shared[task] and p.numel()}
        return list(found.values())

    def num_parameters(self, task: int) -> int:
        """How many numbers those parameters are; counted once for a task that others followed."""
        if task in self._counts:
            return self._counts[task]
        count = sum(parameter.numel() for parameter in self.parameters_of(task))
        if task < len(self) - 1:
            self._counts[task] = count
        return count

    def load(self, task: int, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """Write saved tensors, `(path, name) -> tensor`, into a version that was built anew.

        Raises:
            ShapeError: tensors are missing, left over, or of another shape.
        """
        mine = {(path, name): tensor for path, name, tensor in self.tensors(task)}
        wrong = sorted(mine.keys() ^ tensors.keys()) + [
            key for key in mine.keys() & tensors.keys() if mine[key].shape != tensors[key].shape
        ]
        if wrong:
            raise ShapeError(
                f"expected for task {task} the tensors of its modules, found {len(wrong)} missing, extra or misshapen, "
                f"first '{wrong[0][1]}' of '{wrong[0][0]}'; the learner was saved with other options or another model."
            )
        for key, tensor in tensors.items():
            mine[key].detach().copy_(tensor)

    def _modules_of(self, task: int) -> list[nn.Module]:
        modules = self._versions[task]
        return list(modules) if isinstance(modules, nn.ModuleList) else []


def _ids(module: nn.Module) -> set[int]:
    """All modules and parameters within a module; they keep their identity on another device, which tensors do not."""
    return {id(part) for part in (*module.modules(), *module.parameters())}
