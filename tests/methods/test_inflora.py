"""InfLoRA against an independent plain form of the official steps, and the invariants of its reference page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from everlora.errors import OptionError, TaskCountError
from everlora.methods import method_spec
from everlora.methods.base import Batch, Encoder, TaskInfo
from everlora.methods.inflora import InfLoRA
from tests.tiny_models import save_tiny
from tests.toy import tiny_model, toy_images, toy_learner, toy_tasks

WIDTH, RANK, TASKS = 12, 2, 4


class TwoProjections(nn.Module):
    """A layer with a key and a value projection of the same input, and a nonlinear mix of both."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.key(x)) * 0.5 + torch.relu(self.value(x))


class ToyEncoder:
    """Tokens `(n, 3, width)` through one pair of projections, mean over the real tokens."""

    output_head = None

    feature_dim = WIDTH
    default_targets = ("key", "value")

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = TwoProjections().double().requires_grad_(False)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["mask"].double()[..., None]
        return (self.model(batch["x"]) * mask).sum(1) / mask.sum(1)

    def token_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["mask"].bool()


def _data(task: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + task)
    mixing = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 3, 3, generator=generator, dtype=torch.float64) @ mixing
    x = x + 0.05 * torch.randn(40, 3, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.ones(40, 3, dtype=torch.bool)
    mask[::2, 2] = False
    labels = (x[:, 0, 0] > 0).long() + 2 * task
    return Batch({"x": x, "mask": mask}, labels)


def _collector(encoder: Encoder, data: Batch, calls: list[str]) -> Callable[..., int]:
    def collect(visit=None, *, stage, before=None, augment=True, max_batches=None) -> int:  # type: ignore[no-untyped-def]
        calls.append(stage)
        if before is not None:
            before(data)
        with torch.no_grad():
            features = encoder.features(data.inputs)
        if visit is not None:
            visit(data, features)
        return len(data.labels)

    return collect


def _train(method: InfLoRA, data: Batch, steps: int = 15, lr: float = 0.3) -> None:
    groups = method.parameters()
    optimizer = torch.optim.SGD([*groups["adapter"], *groups["head"]], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        method.loss(data).value.backward()
        optimizer.step()


def _run(tasks: int = TASKS, **options: object) -> tuple[InfLoRA, ToyEncoder, list[str]]:
    encoder, calls = ToyEncoder(), []
    method = _make(encoder, **options)
    for index in range(tasks):
        _learn_task(method, encoder, index, calls)
    return method, encoder, calls


def _make(encoder: ToyEncoder, **options: object) -> InfLoRA:
    spec = method_spec("inflora")
    method = InfLoRA(spec.options({"rank": RANK, "total_tasks": TASKS, **options}), encoder, seed=7)
    method.heads.double()
    return method


def _learn_task(method: InfLoRA, encoder: ToyEncoder, index: int, calls: list[str], steps: int = 15) -> None:
    data = _data(index)
    info = TaskInfo(index, f"task {index}", (2 * index, 2 * index + 1), len(data.labels))
    collect = _collector(encoder, data, calls)
    method.begin_task(info, collect)
    method.heads.double()
    _train(method, data, steps)
    method.end_task(info, collect)


class OfficialSteps:
    """The published procedure in its plain form: composed weights, SVD of the projected moment, DualGPM with its
    two stored kinds, all in numpy float64 with gradients by autograd over dense weights."""

    def __init__(self, encoder: ToyEncoder, heads: list[tuple[Tensor, Tensor]]) -> None:
        model = encoder.model
        self.base = {name: getattr(model, name).weight.clone() for name in ("key", "value")}
        self.bias = {name: getattr(model, name).bias.clone() for name in ("key", "value")}
        self.branches: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.heads = heads
        self.basis: np.ndarray | None = None
        self.kind = "remove"

    def weights(self, current: tuple[Tensor, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        blocks = self.branches + ([current] if current else [])
        return {n: w + sum((up[n] @ down for down, up in blocks), torch.zeros_like(w)) for n, w in self.base.items()}

    def features(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        x, mask = batch.inputs["x"], batch.inputs["mask"].double()[..., None]
        key = x @ weights["key"].T + self.bias["key"]
        value = x @ weights["value"].T + self.bias["value"]
        return ((torch.tanh(key) * 0.5 + torch.relu(value)) * mask).sum(1) / mask.sum(1)

    @staticmethod
    def moment(batch: Batch) -> np.ndarray:
        tokens = batch.inputs["x"][batch.inputs["mask"]].numpy()
        return tokens.T @ tokens / len(tokens)

    def learn(self, batch: Batch, task: int) -> None:
        matrix = self.moment(batch)
        projected = matrix
        if self.basis is not None:
            part = self.basis @ self.basis.T @ matrix
            projected = matrix - part if self.kind == "remove" else part
        left = np.linalg.svd(projected)[0][:, :RANK]
        down = torch.tensor(left.T / math.sqrt(3))
        ups = {name: torch.zeros(WIDTH, RANK, dtype=torch.float64, requires_grad=True) for name in self.base}
        weight, bias = (tensor.clone().requires_grad_() for tensor in self.heads[task])
        optimizer = torch.optim.SGD([*ups.values(), weight, bias], lr=0.3)
        for _ in range(15):
            optimizer.zero_grad()
            logits = self.features(batch, self.weights((down, ups))) @ weight.T + bias
            nn.functional.cross_entropy(logits, batch.labels - 2 * task).backward()
            optimizer.step()
        self.branches.append((down, {name: up.detach() for name, up in ups.items()}))
        self.heads[task] = (weight.detach(), bias.detach())
        self.protect(matrix, 0.95 + 0.05 * task / TASKS)

    def protect(self, matrix: np.ndarray, threshold: float) -> None:
        if self.basis is None:
            left, values, _ = np.linalg.svd(matrix)
            ratio = np.cumsum(values**2) / (values**2).sum()
            self.basis = left[:, : max(1, int((ratio < threshold).sum()))]
        elif self.kind == "remove":
            total = (np.linalg.svd(matrix)[1] ** 2).sum()
            left, values, _ = np.linalg.svd(matrix - self.basis @ self.basis.T @ matrix)
            captured, count = (total - (values**2).sum()) / total, 0
            while captured < threshold:
                captured, count = captured + values[count] ** 2 / total, count + 1
            self.basis = np.hstack([self.basis, left[:, :count]])
        else:
            total = (np.linalg.svd(matrix)[1] ** 2).sum()
            left, values, _ = np.linalg.svd(self.basis @ self.basis.T @ matrix)
            remaining, count = (values**2).sum() / total, 0
            while remaining >= 1 - threshold:
                remaining, count = remaining - values[count] ** 2 / total, count + 1
            inside = self.basis - left[:, :count] @ left[:, :count].T @ self.basis
            vectors, _, _ = np.linalg.svd(inside)
            self.basis = vectors[:, : self.basis.shape[1] - count]
        if self.kind == "remove" and self.basis.shape[1] > WIDTH / 2:
            vectors = np.linalg.svd(self.basis)[0]
            self.basis, self.kind = vectors[:, self.basis.shape[1] :], "retain"


def test_agrees_with_the_official_order_of_steps() -> None:
    encoder, calls = ToyEncoder(), []
    method = _make(encoder)
    starts: list[tuple[Tensor, Tensor]] = []
    official = OfficialSteps(ToyEncoder(), starts)
    for index in range(TASKS):
        data = _data(index)
        info = TaskInfo(index, "", (2 * index, 2 * index + 1), len(data.labels))
        collect = _collector(encoder, data, calls)
        method.begin_task(info, collect)
        method.heads.double()
        head = method.heads.linears[-1]
        starts.append((head.weight.detach().clone(), head.bias.detach().clone()))
        _train(method, data)
        method.end_task(info, collect)
        official.learn(data, index)
        composed = official.weights()
        for name, layer in method.layers().items():
            torch.testing.assert_close(layer.effective_weight(), composed[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(head.weight.detach(), official.heads[index][0], rtol=1e-6, atol=1e-7)
        memory = next(iter(method.memories.values()))
        occupied = np.eye(WIDTH) - official.basis @ official.basis.T
        occupied = occupied if official.kind == "retain" else np.eye(WIDTH) - occupied
        rows = torch.eye(WIDTH, dtype=torch.float64)
        np.testing.assert_allclose(np.eye(WIDTH) - memory.project_free(rows).numpy(), occupied, atol=1e-8)
    assert official.kind == "retain", "the sequence must cross the switch of the stored kind"
    assert calls[0] == "layer inputs" and calls[1:3] == ["inputs before training", "inputs after training"]


def test_key_and_value_share_one_down_and_their_memory() -> None:
    method, _, _ = _run(2)
    blocks = {name: layer.blocks() for name, layer in method.layers().items()}
    assert len(method.memories) == 1
    for task in range(2):
        assert torch.equal(blocks["key"][task].down, blocks["value"][task].down)
        assert not torch.equal(blocks["key"][task].up, blocks["value"][task].up)


def test_output_at_the_start_of_a_task_is_bitwise_that_before_it() -> None:
    method, encoder, calls = _run(2)
    probe = _data(3).inputs
    before = encoder.features(probe)
    data = _data(2)
    method.begin_task(TaskInfo(2, "", (4, 5), 40), _collector(encoder, data, calls))
    assert torch.equal(encoder.features(probe), before)
    trainable = {id(p) for group in method.parameters().values() for p in group}
    everything = [*encoder.model.parameters(), *method.heads.parameters()]
    assert {id(p) for p in everything if p.requires_grad} == trainable
    assert sum(p.numel() for group in method.parameters().values() for p in group) == 2 * WIDTH * RANK + 2 * (WIDTH + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "count"), [(10, 192_010), (20, 199_700)])
def test_trainable_parameters_of_the_published_settings(classes: int, count: int, tmp_path: Path) -> None:
    """Twelve blocks of width 768, adapted on keys and values with rank 10; the rest of the ViT is made small."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 8}
    model = save_tiny("vit", tmp_path / "model", **sizes)
    learner = toy_learner(tmp_path / "learner", model, "inflora", rank=10, epochs=1)
    learner.learn(toy_images([f"class {index}" for index in range(classes)], 2))
    assert learner.card()["tasks"][0]["cost"]["trainable_parameters"] == count


def test_folded_and_factored_give_the_same_function() -> None:
    folded, encoder, _ = _run(3, forward_mode="folded")
    factored, other, _ = _run(3, forward_mode="factored")
    probe = _data(3).inputs
    torch.testing.assert_close(encoder.features(probe), other.features(probe), rtol=1e-6, atol=1e-8)
    for name, layer in folded.layers().items():
        torch.testing.assert_close(layer.effective_weight(), factored.layers()[name].effective_weight())


def test_old_inputs_inside_the_memory_are_not_disturbed() -> None:
    """Invariant 9: inputs of exact rank q, threshold close to 1, all of the memory kept."""
    encoder, calls = ToyEncoder(), []
    method = _make(encoder, threshold="constant", threshold_start=1 - 1e-12, first_task="reach")
    exact = torch.randn(3, WIDTH, dtype=torch.float64)
    tokens = torch.randn(40, 3, 3, dtype=torch.float64) @ exact
    first = Batch({"x": tokens, "mask": torch.ones(40, 3)}, torch.arange(40) % 2)
    collect = _collector(encoder, first, calls)
    method.begin_task(TaskInfo(0, "", (0, 1), 40), collect)
    method.heads.double()
    _train(method, first)
    method.end_task(TaskInfo(0, "", (0, 1), 40), collect)
    before = encoder.features(first.inputs)
    _learn_task(method, encoder, 1, calls, steps=60)
    assert float((encoder.features(first.inputs) - before).abs().max()) < 1e-6
    assert float((encoder.features(_data(2).inputs)).abs().max()) > 0


def test_without_the_projection_old_inputs_are_disturbed_more() -> None:
    def drift(projection: bool) -> float:
        encoder, calls = ToyEncoder(), []
        method = _make(encoder, projection=projection, threshold_start=0.999)
        _learn_task(method, encoder, 0, calls)
        before = encoder.features(_data(0).inputs)
        for index in range(1, 3):
            _learn_task(method, encoder, index, calls)
        return float((encoder.features(_data(0).inputs) - before).norm())

    assert drift(True) < 0.7 * drift(False)


def test_threshold_schedules_and_too_many_tasks() -> None:
    with pytest.raises(TaskCountError):
        _run(TASKS + 1)
    open_ended, _, _ = _run(TASKS + 2, total_tasks=None, rank=1, threshold_start=0.8)
    assert len(open_ended.heads.classes) == TASKS + 2
    with pytest.raises(OptionError, match="needs total_tasks"):
        _make(ToyEncoder(), threshold="linear", total_tasks=None)


def test_a_full_memory_leaves_a_smaller_branch_and_then_none() -> None:
    options = {"threshold": "constant", "threshold_start": 1 - 1e-12, "first_task": "reach", "rank": 5}
    encoder, calls = ToyEncoder(), []
    method = _make(encoder, **options)
    with pytest.warns(UserWarning, match="free input directions"):
        for index in range(3):
            _learn_task(method, encoder, index, calls)
    ranks = next(iter(method.layers().values())).past_ranks.tolist()
    assert ranks[0] == 5 and ranks[-1] < 5
    assert all(torch.isfinite(layer.effective_weight()).all() for layer in method.layers().values())


def test_a_reserve_leaves_every_task_its_whole_branch(recwarn: pytest.WarningsRecorder) -> None:
    options = {"threshold": "constant", "threshold_start": 1 - 1e-12, "first_task": "reach", "rank": 5}
    method, _, _ = _run(4, reserve=5, total_tasks=None, **options)
    assert not [w for w in recwarn if "free input directions" in str(w.message)]
    assert next(iter(method.layers().values())).past_ranks.tolist() == [5] * 4
    assert {memory.free_rank for memory in method.memories.values()} == {5}
    restored = _make(ToyEncoder(), reserve=5, total_tasks=None, **options)
    restored.load_state(method.state())
    for memory, twin in zip(method.memories.values(), restored.memories.values(), strict=True):
        assert torch.equal(memory.basis, twin.basis) and memory.updates == twin.updates
    with pytest.raises(OptionError, match=f"reserve={WIDTH} leaves nothing to protect of the {WIDTH} input directions"):
        _make(ToyEncoder(), reserve=WIDTH)


def test_a_layer_that_read_only_zeros_has_its_first_task_still_to_come() -> None:
    method, _, _ = _run(1)
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in method.state().items()}
    [memory] = [key for key in state if "/memory/" in key]
    for columns, updates in ((state[memory], 1), (state[memory][:, :0], 0)):
        restored = _make(ToyEncoder())
        restored.load_state({**state, memory: columns})
        [replayed] = restored.memories.values()
        assert replayed.updates == updates and replayed.occupied_rank == columns.shape[1]


def test_state_round_trip_is_bitwise_and_goes_on_identically() -> None:
    method, encoder, calls = _run(2)
    other = ToyEncoder()
    restored = _make(other)
    restored.load_state({k: v.clone() if isinstance(v, Tensor) else v for k, v in method.state().items()})
    restored.heads.double()
    for (name, layer), twin in zip(method.layers().items(), restored.layers().values(), strict=True):
        assert torch.equal(layer.past_up, twin.past_up) and torch.equal(layer.past_down, twin.past_down), name
    _learn_task(method, encoder, 2, calls)
    _learn_task(restored, other, 2, calls)
    old, new = method.state(), restored.state()
    assert old.keys() == new.keys()
    for key, value in old.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, new[key], rtol=1e-9, atol=1e-10)
        else:
            assert value == new[key], key
    for key in old:
        if "/memory/" in key or key.endswith("/down"):
            assert torch.equal(old[key], new[key]), f"{key} must be the same to the bit"


def test_alignment_changes_heads_only(tmp_path: Path) -> None:
    model = tiny_model("vit", tmp_path / "model")
    plain = toy_learner(tmp_path / "plain", model, "inflora")
    aligned = toy_learner(tmp_path / "aligned", model, "inflora", alignment=True)
    for learner in (plain, aligned):
        for index, task in enumerate(toy_tasks("image", 2)):
            learner.learn(task, name=f"task {index}")
    one, two = plain.method.state(), aligned.method.state()
    factors = [key for key in one if "/adapter/" in key]
    assert factors and all(torch.equal(one[key], two[key]) for key in factors)
    assert not torch.equal(one["tasks/000/head/weight"], two["aligned/000/weight"])
    assert sum("/statistics/" in key for key in two) == 2 * 4


def test_the_second_pass_can_be_left_out() -> None:
    _, _, calls = _run(2, second_pass=False)
    assert "inputs after training" not in calls and calls.count("inputs before training") == 2


def test_images_of_one_class_more(tmp_path: Path) -> None:
    model = tiny_model("vit", tmp_path / "model")
    learner = toy_learner(tmp_path / "learner", model, "inflora", strict_new_classes=True)
    learner.learn(toy_images(["a", "b"]))
    with pytest.raises(ValueError, match="strict_new_classes"):
        learner.learn(toy_images(["b", "c"]))
