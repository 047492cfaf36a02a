"""Versions of modules: switching by pointer, what belongs to whom, and the way back from a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from everlora.errors import DataError, ShapeError
from everlora.isolation import TaskModules
from everlora.lowrank import LowRankLinear


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 3), nn.Tanh()))


def versions(model: nn.Module) -> TaskModules:
    """Task 0: an adapter, a norm, a copy. Task 1: an adapter on the same base, and the copy of task 0 by reference."""
    modules = TaskModules(model)
    whole = copy.deepcopy(model[2])
    modules.add({"0": LowRankLinear(model[0], 2), "1": copy.deepcopy(model[1]), "2": whole})
    modules.add({"0": LowRankLinear(model[0], 1), "2": whole})
    return modules


def test_switching_moves_pointers_only() -> None:
    model = network().eval()
    modules = versions(model)
    torch.nn.init.normal_(modules.version(0)["0"].up)
    torch.nn.init.normal_(modules.version(1)["0"].up)
    x = torch.randn(5, 4)
    tensors = {id(t): (t, t.data_ptr(), t._version) for m in (model, modules) for t in [*m.parameters(), *m.buffers()]}
    outputs: dict[int | None, torch.Tensor] = {}
    for task in (None, 0, 1, 0, None, 1, 1, 0, None):
        modules.activate(task)
        assert modules.active == task
        y = model(x)
        assert torch.equal(y, outputs.setdefault(task, y))
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[None])
    assert all(t.data_ptr() == pointer and t._version == version for t, pointer, version in tensors.values())


def test_other_modules_can_stand_in_and_leave_again() -> None:
    model = network().eval()
    modules = versions(model)
    modules.activate(0)
    modules.put({"2": nn.Identity()})
    assert modules.active is None and isinstance(model[2], nn.Identity) and model[0] is modules.original("0")
    modules.activate(None)
    assert model[2] is modules.original("2")
    modules.put({"2": nn.Identity()})
    modules.activate(0)
    assert model[2] is modules.version(0)["2"]


def test_only_what_is_new_belongs_to_a_task() -> None:
    model = network()
    modules = versions(model)
    names = [{(path, name) for path, name, _ in modules.tensors(task)} for task in (0, 1)]
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    first = {("0", "down"), ("0", "up"), *(("1", name) for name in norm), ("2", "0.weight"), ("2", "0.bias")}
    assert names == [first, {("0", "down"), ("0", "up")}]
    assert [sum(p.numel() for p in modules.parameters_of(task)) for task in (0, 1)] == [16 + 8 + 15, 8]
    assert set(modules.own(1)) == {"0"}
    # all tasks' tensors move together
    assert all(t.dtype == torch.float64 for t in modules.double().state_dict().values() if t.is_floating_point())


def test_tensors_go_back_into_a_version_built_anew() -> None:
    model = network()
    modules = versions(model)
    torch.nn.init.normal_(modules.version(0)["0"].up)
    saved = {(path, name): tensor.clone() for path, name, tensor in modules.tensors(0)}
    other = versions(network())
    other.load(0, saved)
    loaded = {(path, name): tensor for path, name, tensor in other.tensors(0)}
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in saved.items())
    for broken in ({**saved, ("0", "more"): torch.zeros(1)}, {**saved, ("1", "bias"): torch.zeros(9)}, {}):
        with pytest.raises(ShapeError, match="task 0 the tensors of its modules"):
            other.load(0, broken)
    with pytest.raises(DataError, match="no task 2"):
        other.version(2)
