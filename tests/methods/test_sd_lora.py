"""SD-LoRA against a plain loop over directions, and the invariants of its reference page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everlora.errors import NumericError, OptionError
from everlora.methods.keys import keyed_generator
from everlora.methods.sd_lora import SDLoRA
from everlora.settings import Settings
from tests.methods.sd_lora_builders import (
    HALF,
    WIDTH,
    ToyEncoder,
    begin,
    collect,
    data,
    distance,
    info,
    learn,
    make,
    reload,
    train,
    weights,
)

MIXED = {"rank_schedule": {0: 3, 1: 1, 2: 4, 3: 2}}
CLOSE = 1e-6  # the heads' cross-entropy is in float32
PRESETS = ("everlora", "paper", "official", "libcontinual")


class LoopForm:
    """The published procedure, written out: every direction normalised and scaled by hand, gradients by autograd.

    Only for scope `network`; sealing as the public code does it (jump) or by an offset that keeps the function.
    """

    def __init__(self, encoder: ToyEncoder, *, norm: str, current: str, alpha_init: float, reset: bool, jump: bool):
        self.model = encoder.model
        self.names = ["0.query", "0.value", "1.query", "1.value"]
        self.base = {name: self.model.get_submodule(name).weight.detach().clone() for name in self.names}
        self.norm, self.current, self.alpha_init, self.reset, self.jump = norm, current, alpha_init, reset, jump
        self.blocks: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.offsets: list[dict[str, Tensor]] = []
        self.alpha: list[Tensor] = []

    def size(self, down: Tensor, up: Tensor) -> Tensor:
        return (up @ down).norm() if self.norm == "fro" else up.norm() * down.norm()

    def multiplier(self, down: Tensor, up: Tensor, alpha: Tensor) -> Tensor:
        return alpha if self.current == "raw" else alpha / (self.size(down, up) ** 2 + 1.0).sqrt()

    def weights(self, newest: dict[str, tuple[Tensor, Tensor]], alpha: list[Tensor]) -> dict[str, Tensor]:
        total = {}
        for name, base in self.base.items():
            weight = base
            for block, offset, value in zip(self.blocks, self.offsets, alpha, strict=False):
                down, up = block[name]
                weight = weight + (value + offset[name]) / self.size(down, up) * up @ down
            down, up = newest[name]
            total[name] = weight + self.multiplier(down, up, alpha[-1]) * up @ down
        return total

    def learn(self, task: int, starts: dict[str, Tensor], head: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Train one task with SGD and momentum; return the effective weights at its end."""
        start = torch.tensor(self.alpha_init, dtype=torch.float64)
        old = [start.clone() if self.reset else value for value in self.alpha]
        alpha = [value.clone().requires_grad_() for value in [*old, start]]
        newest = {name: (down.clone().requires_grad_(), self.zeros(name, len(down))) for name, down in starts.items()}
        weight, bias = (value.clone().requires_grad_() for value in head)
        factors = [factor for pair in newest.values() for factor in pair]
        optimizer = torch.optim.SGD([*factors, *alpha, weight, bias], lr=0.3, momentum=0.9)
        batch = data(task)
        for _ in range(6):
            optimizer.zero_grad()
            replaced = {f"{name}.weight": value for name, value in self.weights(newest, alpha).items()}
            features = torch.func.functional_call(self.model, replaced, (batch.inputs["x"],)).mean(1)
            nn.functional.cross_entropy(features @ weight.T + bias, batch.labels - 2 * task).backward()
            optimizer.step()
        alpha = [value.detach() for value in alpha]
        newest = {name: (down.detach(), up.detach()) for name, (down, up) in newest.items()}
        effective = self.weights(newest, alpha)
        self.seal(newest, alpha)
        return effective

    def seal(self, newest: dict[str, tuple[Tensor, Tensor]], alpha: list[Tensor]) -> None:
        after = [torch.tensor(self.alpha_init, dtype=torch.float64) if self.reset else value for value in alpha]
        zero = torch.zeros((), dtype=torch.float64)
        offsets = dict.fromkeys(self.names, zero)
        if not self.jump:
            for offset, before, value in zip(self.offsets, alpha, after, strict=False):
                for name in self.names:
                    offset[name] = offset[name] + before - value
            for name, (down, up) in newest.items():
                in_force = self.multiplier(down, up, alpha[-1]) * self.size(down, up)
                offsets[name] = in_force - after[-1]
        self.blocks.append(newest)
        self.offsets.append(offsets)
        self.alpha = after

    def zeros(self, name: str, rank: int) -> Tensor:
        return torch.zeros(self.base[name].shape[0], rank, dtype=torch.float64, requires_grad=True)


LOOPS: dict[str, dict[str, Any]] = {
    "everlora": {"norm": "fro", "current": "raw", "alpha_init": 1.0, "reset": False, "jump": False},
    "paper": {"norm": "fro", "current": "normalised", "alpha_init": 1.0, "reset": False, "jump": False},
    "official": {"norm": "factors", "current": "raw", "alpha_init": 0.8, "reset": True, "jump": True},
    "libcontinual": {"norm": "factors", "current": "raw", "alpha_init": 1.0, "reset": True, "jump": True},
}


@pytest.mark.parametrize("forward_mode", ["folded", "factored"])
@pytest.mark.parametrize("preset", PRESETS)
def test_four_tasks_agree_with_the_plain_loop_form(preset: str, forward_mode: str) -> None:
    method, encoder = make(preset=preset, forward_mode=forward_mode, **MIXED)
    loop = LoopForm(ToyEncoder(), **LOOPS[preset])
    for task in range(4):
        begin(method, encoder, task)
        starts = {name: layer.down.detach().clone() for name, layer in method.layers().items()}
        head = method.heads.linears[-1]
        rows = head.weight.detach().clone(), head.bias.detach().clone()
        train(method, task)
        method.end_task(info(task), collect)
        expected = loop.learn(task, starts, rows)
        assert distance(weights(method), expected) < CLOSE, task
        before = weights(method)
    assert [len(block.scale) for block in method.layers()["0.query"].blocks()] == [3, 1, 4, 2]
    begin(method, encoder, 4)
    # What the next task starts from: the function before it, or after the published jump.
    after = {name: base.clone() for name, base in loop.base.items()}
    for block, offset, value in zip(loop.blocks, loop.offsets, loop.alpha, strict=True):
        for name, (down, up) in block.items():
            after[name] += (value + offset[name]) / loop.size(down, up) * up @ down
    assert distance(weights(method), after) < CLOSE
    assert (distance(weights(method), before) > 1e-2) == loop.jump


@pytest.mark.parametrize("alpha", ["carry", "reset"])
@pytest.mark.parametrize("offset", ["add", "mul"])
@pytest.mark.parametrize("scope", ["network", "module"])
@pytest.mark.parametrize("current", ["raw", "normalised"])
def test_a_continuous_boundary_keeps_the_function(alpha: str, offset: str, scope: str, current: str) -> None:
    switches = {"alpha": alpha, "offset": offset, "scope": scope, "current": current, "norm": "factors"}
    method, encoder = make(**switches, **MIXED)
    for task in range(4):
        probe = encoder.features(data(9).inputs).detach()
        begin(method, encoder, task)
        torch.testing.assert_close(encoder.features(data(9).inputs).detach(), probe, rtol=1e-12, atol=1e-13)
        train(method, task)
        trained = encoder.features(data(9).inputs).detach()
        method.end_task(info(task), collect)
        torch.testing.assert_close(encoder.features(data(9).inputs).detach(), trained, rtol=1e-12, atol=1e-13)
    gamma, delta = method.past.sealed.gamma, method.past.sealed.delta
    if scope == "module" and alpha == "carry":
        assert bool((gamma == 1).all()) and not bool(delta.any())
    elif offset == "mul":
        assert not bool((gamma[:, :-1] == 1).all())
    else:
        assert bool((gamma == 1).all()) and bool(delta[:, :-1].abs().min() > 1e-6)


def test_mul_falls_back_to_an_offset_where_a_magnitude_is_almost_zero() -> None:
    method, encoder = make(offset="mul")
    begin(method, encoder, 0)
    train(method, 0)
    with torch.no_grad():
        method.magnitudes[0] = 1e-4
    method.end_task(info(0), collect)
    before = weights(method)
    begin(method, encoder, 1)
    assert distance(weights(method), before) < 1e-12
    sealed = method.past.sealed
    assert bool((sealed.gamma == 1).all()) and bool((sealed.delta != 0).all())


def test_the_paper_preset_without_softening_needs_no_offsets() -> None:
    method, encoder = make(preset="paper", soft_eps=0.0)
    for task in range(3):
        begin(method, encoder, task)
        with pytest.raises(NumericError, match="soft_eps"):
            method.loss(data(task))
        for layer in method.layers().values():  # a start other than zero, as only this form needs it
            with torch.no_grad():
                layer.up.uniform_(-1, 1, generator=torch.Generator().manual_seed(task))
        train(method, task)
        method.end_task(info(task), collect)
    begin(method, encoder, 3)
    assert float(method.past.sealed.delta.abs().max()) < 1e-12


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_what_is_frozen_stays_to_the_bit(optimizer: str) -> None:
    def made(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if optimizer == "momentum":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=0.05, weight_decay=0.1)

    method, encoder = make(scope="module")
    learn(method, encoder, 0, 1, optimizer=made)
    begin(method, encoder, 2)
    layers, sealed = method.layers(), method.past.sealed
    frozen = {f"{n} {k}": v for n, layer in layers.items() for k, v in layer.named_buffers() if k != "past_scale"}
    frozen |= {f"{n} base": layer.base.weight for n, layer in layers.items()}
    frozen |= {key: getattr(sealed, key) for key in ("norms", "gamma", "delta")}
    frozen |= {f"head {k}": v for index in (0, 1) for k, v in method.heads.linears[index].state_dict().items()}
    copies = {key: value.clone() for key, value in frozen.items()}
    method.heads.zero_grad()
    train(method, 2, optimizer=made)
    assert all(torch.equal(value, copies[key]) for key, value in frozen.items())
    trained = {id(p) for group in method.parameters().values() for p in group}
    everything = [*encoder.model.parameters(), *method.heads.parameters()]
    assert all(p.grad is None for p in everything if id(p) not in trained)
    assert method.magnitudes is not None and bool((method.magnitudes.grad != 0).all())
    assert {id(p) for p in everything if p.requires_grad} == trained - {id(method.magnitudes)}


@pytest.mark.parametrize("scope", ["network", "module"])
def test_the_trained_set_grows_by_one_magnitude_over_25_tasks(scope: str) -> None:
    method, encoder = make(scope=scope, rank_schedule={0: 3, 4: 2, 11: 1})
    sides = sum(layer.in_features + layer.out_features for layer in method.layers().values())
    for task in range(25):
        begin(method, encoder, task)
        expected = {
            "adapter": sides * (3 if task < 4 else 2 if task < 11 else 1),
            "magnitudes": (task + 1) * (1 if scope == "network" else len(method.layers())),
            "head": 2 * (HALF + 1),
        }
        assert {name: sum(p.numel() for p in group) for name, group in method.parameters().items()} == expected
        train(method, task, steps=1)
        method.end_task(info(task), collect)
    assert all(layer.total_rank == 3 * 4 + 2 * 7 + 14 for layer in method.layers().values())


def test_ranks_follow_the_schedule_also_after_a_reload() -> None:
    method, encoder = make(ToyEncoder(), name="sd_lora_rr", targets=("0.query",))
    wanted = [10] * 4 + [8] * 4 + [6] * 3
    for task, rank in enumerate(wanted):
        begin(method, encoder, task)
        assert method.options.rank_at(task) == rank == method.layers()["0.query"].rank
        method.end_task(info(task), collect)
        encoder = ToyEncoder()
        again = SDLoRA(method.options, encoder, seed=7)
        again.load_state(method.state())
        method = again
    plain, _ = make(rank_schedule={0: 5, 3: 2})
    assert [plain.options.rank_at(task) for task in (0, 2, 3, 50)] == [5, 5, 2, 2]


def test_a_block_that_was_never_trained_is_dropped() -> None:
    method, encoder = make()
    learn(method, encoder, 0)
    before = encoder.features(data(9).inputs)
    begin(method, encoder, 1)
    torch.testing.assert_close(encoder.features(data(9).inputs), before, rtol=1e-12, atol=1e-13)
    method.end_task(info(1), collect)
    torch.testing.assert_close(encoder.features(data(9).inputs), before, rtol=1e-12, atol=1e-13)
    assert all(layer.past_ranks.tolist() == [2, 0] for layer in method.layers().values())
    learn(method, encoder, 2)
    begin(method, encoder, 3)
    method.loss(data(3)).value.backward()
    assert all(torch.isfinite(p.grad).all() for group in method.parameters().values() for p in group)
    assert all(torch.isfinite(weight).all() for weight in weights(method).values())
    assert all(torch.isfinite(value).all() for value in method.past.sealed.gains())


def test_magnitudes_shared_by_all_modules_get_the_sum_of_their_gradients() -> None:
    gradients = {}
    for scope in ("network", "module"):
        method, encoder = make(preset="libcontinual", scope=scope)
        learn(method, encoder, 0, 1, steps=0)
        for layer in method.layers().values():
            layer.load_past(*_random_past(layer.in_features, layer.out_features))
        sealed = method.past.sealed
        sealed.norms.fill_(2.0)
        begin(method, encoder, 2)
        for layer in method.layers().values():
            with torch.no_grad():
                layer.up.fill_(0.3)
        method.loss(data(2)).value.backward()
        gradients[scope] = method.magnitudes.grad.reshape(-1, 3).sum(dim=0)
    torch.testing.assert_close(gradients["module"], gradients["network"], rtol=1e-10, atol=1e-14)
    assert bool((gradients["network"] != 0).all())


def _random_past(width: int, height: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    downs = [torch.randn(2, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    return downs, [torch.randn(height, 2, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_no_norm_is_computed_in_a_training_step_of_the_raw_form(monkeypatch: pytest.MonkeyPatch) -> None:
    method, encoder = make()
    learn(method, encoder, 0)
    begin(method, encoder, 1)
    calls: list[str] = []
    for place in ("everlora.methods.direction_history.direction_norm", "everlora.lowrank.factors.prepare"):
        monkeypatch.setattr(place, lambda *args, place=place: calls.append(place))
    train(method, 1)
    assert not calls
    with pytest.raises(TypeError):  # a norm is computed when the task ends
        method.end_task(info(1), collect)
    assert calls


def test_looking_at_the_model_more_often_does_not_change_what_is_trained() -> None:
    results = []
    for looks in (0, 3):
        method, encoder = make()
        for task in range(3):
            begin(method, encoder, task)
            for _ in range(looks):
                torch.rand(5)
                with torch.no_grad():
                    method.logits(data(task))
            train(method, task)
            method.end_task(info(task), collect)
            for _ in range(looks):
                method.panels()
                method.logits(data(0))
        results.append(weights(method))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_first_start_gives_every_task_the_first_rows_of_the_first_one() -> None:
    method, encoder = make(a_init="first", rank_schedule={0: 3, 1: 2})
    fresh, other = make(rank_schedule={0: 3, 1: 2})
    first: dict[str, Tensor] = {}
    for task in range(2):
        begin(method, encoder, task)
        begin(fresh, other, task)
        for name, layer in method.layers().items():
            start = first.setdefault(name, layer.down.detach().clone())
            assert torch.equal(layer.down.detach(), start[: layer.rank])
            assert torch.equal(layer.down.detach(), fresh.layers()[name].down.detach()) == (task == 0)
            bound = 1 / layer.in_features**0.5
            assert float(layer.down.detach().abs().max()) <= bound and not bool(layer.up.detach().any())
        method.end_task(info(task), collect)
        fresh.end_task(info(task), collect)


def test_new_head_rows_start_as_published() -> None:
    method, encoder = make()
    begin(method, encoder, 0)
    head = method.heads.linears[0]
    generator = keyed_generator(7, 0, "head")
    bound = (3 / HALF) ** 0.5
    assert float(head.weight.detach().abs().max()) <= bound and float(head.weight.detach().std()) > bound / 3
    assert not bool(head.bias.detach().any())
    zeros, other = make(head_init="zeros")
    begin(zeros, other, 0)
    assert not bool(zeros.heads.linears[0].weight.detach().any())
    assert torch.rand(1, generator=generator).shape == (1,)


def test_presets_fill_what_is_not_given() -> None:
    seen = {preset: make(preset=preset)[0].options for preset in PRESETS}
    assert [seen[p].alpha_init for p in PRESETS] == [1.0, 1.0, 0.8, 1.0]
    assert [seen[p].kd_weight for p in PRESETS] == ["in_force", "in_force", "alpha_init", "alpha_init"]
    assert [seen[p].kd_tau for p in PRESETS] == [0.03, 0.03, 9e-4, 9e-4]
    own = make(preset="official", alpha_init=0.5, boundary="continuous", kd_criterion="rho")[0].options
    assert (own.alpha_init, own.alpha, own.kd_weight, own.kd_tau) == (0.5, "reset", "in_force", 0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd_weight": "alpha_init"}, "kd_weight=alpha_init"),
        ({"preset": "official", "kd_weight": "alpha_init", "boundary": "continuous"}, "continuous forbids"),
        ({"offset": "mul", "alpha_init": 0.0}, "divides by alpha_init"),
        ({"offset": "mul", "preset": "official"}, "leave offset out"),
        ({"max_rank": 3}, "use at least 4"),
        ({"max_rank": 7, "rank_schedule": {0: 2, 3: 4}}, "use at least 8"),
        ({"rank_schedule": {1: 4}}, "must start at task 0"),
        ({"rank_schedule": {0: 0}}, "rank_schedule"),
        ({"soft_eps": -1}, "soft_eps"),
        ({"kd_tau": 0}, "kd_tau"),
        ({"preset": "offical"}, "preset"),
        ({"rank": WIDTH + 1}, "rank"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)


def test_training_defaults_are_those_of_the_preset_and_what_is_given_stands_above() -> None:
    ours, paper = Settings.of("sd_lora", {}).training, Settings.of("sd_lora", {"preset": "paper"}).training
    assert (ours.optimizer, ours.lr, ours.head_lr, ours.lr_schedule, ours.epochs) == ("sgd", 8e-3, None, "constant", 5)
    assert (paper.optimizer, paper.lr, paper.epochs, paper.batch_size) == ("adam", 8e-3, 20, 128)
    given = Settings.of("sd_lora_rr", {"preset": "official", "lr": 1e-2, "optimizer": "adamw", "epochs": 3})
    assert (given.training.lr, given.training.optimizer, given.training.epochs) == (1e-2, "adamw", 3)
    again = Settings.from_parts(given.method, given.as_parts())
    assert again == given and given.as_parts()["method"]["rank_schedule"] == {"0": 10, "4": 8, "8": 6}
    assert Settings.of("inflora", {}).training == Settings.of("ncm", {}).training


def test_figures_after_each_task() -> None:
    method, encoder = make(scope="module")
    learn(method, encoder, 0, 1)
    panels = method.panels()
    sealed = method.past.sealed
    assert list(panels["magnitude"]) == ["task 0", "task 1"] and set(panels) == {
        "magnitude",
        "true_magnitude",
        "total_rank",
    }
    assert panels["magnitude"]["task 1"] == pytest.approx(float(sealed.alpha[:, 1].mean()))
    added = [
        float((block.up * block.scale @ block.down).norm()) * float(block.scale[0].sign())
        for block in (layer.blocks()[1] for layer in method.layers().values())
    ]
    assert panels["true_magnitude"]["task 1"] == pytest.approx(sum(added) / len(added))
    assert set(panels["total_rank"].values()) == {4.0}
    assert reload(method)[0].panels() == panels
