from __future__ import annotations

import copy
import io
import math

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from everlora.errors import OptionError, ShapeError, UnsupportedError
from everlora.lowrank import GradientMemory, LowRankLinear, SecondMoment, attach, share_down
from tests.lowrank.builders import CountProducts, rand


def make(mode="auto", *, dtype=torch.float32, rank=3, past=(2, 0, 1), bias=True, train_down=True, d_in=6, d_out=5):
    """A layer with scaled past blocks and a current block away from its start."""
    torch.manual_seed(1)
    base = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    layer = LowRankLinear(base, 0, forward_mode=mode, train_down=train_down)
    layer.load_past(
        [rand(r, d_in, seed=10 + i) for i, r in enumerate(past)],
        [rand(d_out, r, seed=20 + i) for i, r in enumerate(past)],
        [0.5 + i for i in range(len(past))],
    )
    layer.start_block(rank, down=rand(rank, d_in, seed=30))
    with torch.no_grad():
        layer.up.copy_(rand(d_out, rank, seed=31))
    return layer


def explicit(layer, x, up=None, down=None):
    """The formula, term by term, by plain autograd."""
    up, down = layer.up if up is None else up, layer.down if down is None else down
    y = functional.linear(x, layer.base.weight.to(x.dtype), layer.base.bias)
    for block in layer.blocks():
        y = y + (x @ block.down.to(x.dtype).T * block.scale.to(x.dtype)) @ block.up.to(x.dtype).T
    return y + x @ down.to(x.dtype).T @ up.to(x.dtype).T


MODES = ("folded", "factored")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_equal_the_formula(mode, dtype, tolerance):
    layer = make(mode, dtype=dtype)
    x = rand(2, 4, 6, seed=2, dtype=dtype).requires_grad_()
    weight = rand(2, 4, 5, seed=3, dtype=dtype)
    y = layer(x)
    gradients = torch.autograd.grad((y * weight).sum(), (x, layer.up, layer.down))
    expected = explicit(layer, x)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, layer.up, layer.down))
    assert torch.allclose(y, expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("train_down", [True, False])
def test_gradients_pass_the_numerical_check(mode, train_down):
    layer = make(mode, dtype=torch.float64, train_down=train_down)
    x = rand(3, 6, seed=2, dtype=torch.float64).requires_grad_()
    down = layer.down.detach().clone().requires_grad_(train_down)
    up, bias = (t.detach().clone().requires_grad_() for t in (layer.up, layer.base.bias))

    def run(x, up, down, bias):
        # gradcheck writes through `.data`, which no version counter sees, and between a forward pass and its backward
        # pass; so each run has its own tensors and its own working weight.
        return functional_call(copy.deepcopy(layer), {"up": up.clone(), "down": down.clone(), "base.bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, up, down, bias))


def test_merged_equals_concatenated_equals_sum_of_branches():
    folded, factored = make("folded"), make("factored")
    x = rand(7, 6, seed=4)
    merged = functional.linear(x, folded.effective_weight(), folded.base.bias)
    for y in (folded(x), factored(x), merged):
        assert torch.allclose(y, explicit(folded, x), rtol=1e-5, atol=1e-5)


def test_auto_resolves_by_the_dtype_of_the_base_and_follows_a_move():
    modes = {
        dtype: LowRankLinear(nn.Linear(4, 4).to(dtype), 1).resolved_mode
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    assert list(modes.values()) == ["folded", "folded", "factored", "factored"]
    assert LowRankLinear(nn.Linear(4, 4), 1).to(torch.bfloat16).resolved_mode == "factored"


def test_the_base_is_never_written_in_any_dtype_or_mode():
    for dtype in (torch.float32, torch.bfloat16):
        for mode in MODES:
            layer = make(mode, dtype=dtype)
            before = {name: value.clone() for name, value in layer.base.state_dict().items()}
            x = rand(4, 6, seed=2, dtype=dtype)
            layer(x).sum().backward()
            with torch.no_grad():
                layer.up += 1
            layer(x)
            layer.fold_block()
            layer(x)
            assert all(torch.equal(value, before[name]) for name, value in layer.base.state_dict().items())
            assert not any(parameter.requires_grad for parameter in layer.base.parameters())


def test_factored_form_keeps_an_update_that_bf16_would_round_away():
    base = nn.Linear(8, 8, bias=False).bfloat16()
    with torch.no_grad():
        base.weight.fill_(1.0)
    results = {}
    for mode in MODES:
        layer = LowRankLinear(base, 1, forward_mode=mode)
        layer.start_block(1, down=torch.eye(1, 8))
        with torch.no_grad():
            layer.up.fill_(2.0**-10)
        x = torch.zeros(1, 8, dtype=torch.bfloat16)
        x[0, 0] = 1.0
        results[mode] = layer.effective_weight()[0, 0].item(), layer(x - 1 + 1).dtype
        if mode == "factored":
            x[0, 1] = -1.0  # the base cancels, the branch stays
            assert layer(x)[0, 0].item() == 2.0**-10
        else:
            x[0, 1] = -1.0
            assert layer(x)[0, 0].item() == 0.0
    assert set(results.values()) == {(1.0 + 2.0**-10, torch.bfloat16)}


def test_factors_stay_float32_masters_when_the_model_is_cast():
    layer = make()
    before = {name: getattr(layer, name).clone() for name in ("up", "down", "past_up", "past_down", "past_scale")}
    parameters = (layer.up, layer.down)
    layer.to(torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16
    assert all(torch.equal(getattr(layer, name), value) for name, value in before.items())
    assert layer.up is parameters[0] and layer.down is parameters[1]  # an optimiser made before keeps its grip
    y = layer(rand(2, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.up.grad.dtype == torch.float32
    layer.float()
    assert layer(rand(2, 6)).dtype == torch.float32
    assert layer.double()(rand(2, 6, dtype=torch.float64)).dtype == layer.up.dtype == torch.float64


def test_forward_is_one_product_whatever_the_past():
    for past in ((), (2,) * 20):
        layer = make("folded", past=past)
        x = rand(7, 6)
        with torch.no_grad():
            layer(x)
            with CountProducts() as count:
                layer(x)
        assert len(count.shapes) == 1


def test_training_uses_one_full_product_each_way_and_thin_ones():
    layer = make("folded", train_down=False, past=(2,) * 5, rank=2)
    x = rand(7, 6).requires_grad_()
    layer(x)
    with CountProducts() as forward:
        y = layer(x)
    with CountProducts() as backward:
        y.sum().backward()
    full = {((7, 6), (6, 5)), ((7, 5), (5, 6))}
    assert len(forward.shapes) == 2 and len([s for s in forward.shapes if s in full]) == 1  # and x down^T
    assert len(backward.shapes) == 2 and len([s for s in backward.shapes if s in full]) == 1  # and g^T P
    # No gradient of the size of the weight is ever formed from the tokens.
    assert ((5, 7), (7, 6)) not in backward.shapes


def test_first_layer_spends_nothing_on_the_gradient_of_its_input():
    layer = make("folded", train_down=False)
    y = layer(rand(7, 6))
    with CountProducts() as backward:
        y.sum().backward()
    assert backward.shapes == [((3, 7), (7, 5))]


def test_a_frozen_down_keeps_no_input_for_the_backward_pass():
    for train_down in (True, False):
        layer = make("folded", train_down=train_down)
        saved = []
        x = rand(7, 6).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=saved: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            layer(x)
        assert ((7, 6) in saved) == train_down
        assert (7, 3) in saved


def test_working_weight_is_rebuilt_only_when_a_factor_changes():
    layer = make("folded", past=(2, 2))
    x = rand(3, 6)
    layer(x)
    built = layer._working.generation
    for _ in range(3):
        layer(x)
    assert layer._working.generation == built
    with torch.no_grad():
        layer.up.mul_(2.0)
    with CountProducts() as count:
        layer(x.requires_grad_(False))
    assert layer._working.generation == built + 1
    assert ((5, 3), (3, 6)) in count.shapes and ((5, 4), (4, 6)) not in count.shapes  # the past is not folded again


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("foreach", [True, False])
def test_every_way_a_factor_changes_is_noticed(mode, foreach):
    layer, x = make(mode), rand(4, 6)

    def agrees():
        return torch.allclose(layer(x), explicit(layer, x), rtol=1e-5, atol=1e-5)

    optimizer = torch.optim.Adam([layer.up, layer.down], lr=0.1, foreach=foreach)
    for _ in range(3):
        before = layer(x)
        before.sum().backward()
        optimizer.step()
        assert not torch.equal(layer(x), before) and agrees()
    layer.past_scale.mul_(3.0)
    assert agrees()
    layer.load_state_dict(
        {name: value + 1 if value.dtype.is_floating_point else value for name, value in layer.state_dict().items()}
    )
    assert agrees()
    layer.load_past([rand(1, 6, seed=5)], [rand(5, 1, seed=6)])
    assert agrees()
    layer.fold_block(0.25)
    assert agrees()
    layer.start_block(2, generator=torch.Generator().manual_seed(0))
    assert agrees()
    layer.up = nn.Parameter(rand(5, 2, seed=7))
    assert agrees()
    layer.up.data.add_(1.0)
    layer.invalidate()
    assert agrees()


def test_memory_is_the_same_at_the_first_task_and_later():
    layer = LowRankLinear(nn.Linear(6, 5), 2, train_down=False)
    buffers = {id(layer._working._past), id(layer._working._weight)}
    pointer = layer._working._weight.data_ptr()
    for task in range(6):
        layer.start_block(2, down=rand(2, 6, seed=task))
        with torch.no_grad():
            layer.up.copy_(rand(5, 2, seed=task))
        layer(rand(3, 6))
        layer.fold_block()
    assert {id(layer._working._past), id(layer._working._weight)} == buffers
    assert layer._working._weight.data_ptr() == pointer


def test_a_new_block_leaves_the_output_bitwise_unchanged():
    layer, x = make(), rand(4, 6)
    layer.fold_block()
    before = layer(x)
    layer.start_block(4)
    assert torch.equal(layer(x), before)


def test_folding_copies_bit_for_bit_and_the_past_never_changes():
    layer = LowRankLinear(nn.Linear(6, 5), 2)
    kept = []
    for task, rank in enumerate((2, 0, 3, 1)):
        layer.start_block(rank, down=rand(rank, 6, seed=task))
        with torch.no_grad():
            layer.up.copy_(rand(5, rank, seed=40 + task))
        kept.append((layer.down.detach().clone(), layer.up.detach().clone(), task + 1.0))
        layer.fold_block(task + 1.0)
        assert layer.rank == 0 and not layer.up.requires_grad
    assert layer.total_rank == 6
    for block, (down, up, scale) in zip(layer.blocks(), kept, strict=True):
        assert torch.equal(block.down, down) and torch.equal(block.up, up)
        assert torch.equal(block.scale, torch.full((len(down),), scale))
    other = LowRankLinear(nn.Linear(6, 5), 0)
    other.load_past(*zip(*kept, strict=True))
    for mine, theirs in zip(layer.blocks(), other.blocks(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_backward_after_a_rebuild_is_a_clear_error_only_where_it_would_be_wrong(mode):
    layer, x = make(mode, train_down=False), rand(4, 6).requires_grad_()
    wanted = torch.autograd.grad(layer(x).sum(), x)[0]
    y = layer(x)
    with torch.no_grad():
        layer.up.add_(1.0)
    layer(x)
    if mode == "folded":
        with pytest.raises(UnsupportedError, match="rebuilt between"):
            y.sum().backward()
    else:
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], wanted)


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_double_use_and_checkpointing_give_the_plain_gradients(mode):
    layer = make(mode)
    x = rand(4, 6).requires_grad_()
    inputs = (x, layer.up, layer.down)
    wanted = torch.autograd.grad((explicit(layer, x) * 2 + explicit(layer, x * 2)).sum(), inputs)
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=False)):
        got = torch.autograd.grad((run(x) * 2 + run(x * 2)).sum(), inputs)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, wanted, strict=True))
    for scale in (2.0, 1.0):
        (layer(x * (2.0 if scale == 1.0 else 1.0)) * scale).sum().backward()
    assert torch.allclose(layer.up.grad, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_computes_in_bf16_with_float32_gradients(mode):
    layer, x = make(mode), rand(8, 6).requires_grad_()
    wanted = torch.autograd.grad(explicit(layer, x).sum(), (x, layer.up, layer.down))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        got = torch.autograd.grad(y.sum(), (x, layer.up, layer.down))  # backward inside autocast, too
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        again = layer(x)
    assert again.dtype == torch.bfloat16
    assert torch.allclose(again.float(), y.detach().float(), rtol=2e-2, atol=2e-2)
    assert torch.allclose(y.float(), explicit(layer, x), rtol=3e-2, atol=0.1)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.allclose(a, b, rtol=3e-2, atol=0.15)


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode_first_and_training_after(mode):
    layer, x = make(mode), rand(4, 6)
    with torch.inference_mode():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        layer.eval()
        y = layer(x)
    layer.train()
    again = layer(x)
    assert torch.allclose(again, y, atol=1e-5)
    again.sum().backward()
    with torch.no_grad():
        layer.up.add_(1.0)
    assert torch.allclose(layer(x), explicit(layer, x), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_copies_and_pickles_are_independent(mode):
    layer, x = make(mode), rand(4, 6)
    share_down([layer])
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for clone in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(clone(x), y)
        with torch.no_grad():
            clone.up.add_(1.0)
        assert torch.allclose(clone(x), explicit(clone, x), atol=1e-5)
        assert torch.equal(layer(x), y)


def test_double_backward_is_refused():
    layer, x = make(), rand(2, 6).requires_grad_()
    gradient = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_state_names_are_stable_and_ranks_travel_with_the_state():
    layer = make()
    names = ["down", "up", "past_down", "past_up", "past_scale", "past_ranks", "base.weight", "base.bias"]
    assert sorted(layer.state_dict()) == sorted(names)
    fresh = LowRankLinear(nn.Linear(6, 5), 1)
    fresh.load_state_dict(layer.state_dict())
    x = rand(3, 6)
    assert torch.equal(fresh(x), layer(x))
    assert fresh.rank == 3 and fresh.up.requires_grad and [b.down.shape[0] for b in fresh.blocks()] == [2, 0, 1]
    empty = LowRankLinear(nn.Linear(6, 5), 0)
    fresh.load_state_dict(empty.state_dict())
    assert fresh.rank == 0 and not fresh.up.requires_grad and fresh.blocks() == []
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(make(d_in=7).state_dict())


def test_rank_zero_is_the_base_itself_and_padded_rows_do_no_harm():
    for mode in MODES:
        layer = LowRankLinear(nn.Linear(6, 5), 0, forward_mode=mode)
        x = rand(3, 6).requires_grad_()
        assert torch.equal(layer(x), layer.base(x))
        layer(x).sum().backward()
        assert layer.up.grad is None and x.grad is not None
    layer = LowRankLinear(nn.Linear(6, 5), 0, train_down=False)
    layer.start_block(3, down=torch.cat([rand(2, 6), torch.zeros(1, 6)]))
    layer(rand(4, 6)).square().sum().backward()
    assert layer.up.grad[:, :2].abs().min() > 0 and not layer.up.grad[:, 2].any()


def test_the_start_of_a_block():
    layer = LowRankLinear(nn.Linear(300, 200), 0)
    layer.start_block(100, generator=torch.Generator().manual_seed(3))
    first = layer.down.detach().clone()
    assert not layer.up.any()
    assert first.square().sum(1).mean() == pytest.approx(1 / 3, rel=0.02)
    assert first.abs().max() <= 1 / math.sqrt(300)
    layer.start_block(100, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.down, first) and layer.down.requires_grad
    frozen = LowRankLinear(nn.Linear(6, 5), 2, train_down=False)
    assert not frozen.down.requires_grad and frozen.up.requires_grad


def test_a_parameter_given_as_down_is_shared_and_a_tensor_is_copied():
    first, second = LowRankLinear(nn.Linear(6, 5), 2, train_down=False), LowRankLinear(nn.Linear(6, 4), 0)
    second.start_block(2, down=first.down)
    assert second.down is first.down
    values = torch.ones(2, 6)
    second.start_block(2, down=values)
    values.zero_()
    assert second.down.min() == 1.0


class Quantised(nn.Linear):
    """Eight-bit weights with one scale, as quantised layers look from outside."""

    def __init__(self):
        super().__init__(6, 5)
        self.weight = nn.Parameter(torch.randint(-9, 9, (5, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype) / 10, self.bias)


def test_a_quantised_base_runs_factored_and_refuses_the_rest():
    layer = LowRankLinear(Quantised(), 2)
    assert layer.resolved_mode == "factored"
    with torch.no_grad():
        layer.up.add_(1.0)
    x = rand(3, 6)
    assert torch.allclose(layer(x), layer.base(x) + x @ layer.down.T @ layer.up.T, atol=1e-5)
    with pytest.raises(UnsupportedError, match="int8"):
        layer.effective_weight()
    with pytest.raises(UnsupportedError, match="int8"):
        LowRankLinear(Quantised(), 2, forward_mode="folded")


def test_bad_arguments_are_refused():
    base = nn.Linear(6, 5)
    for rank in (6, -1, True, 1.0):
        with pytest.raises(OptionError, match="rank"):
            LowRankLinear(base, rank)
    with pytest.raises(OptionError, match="did you mean 'folded'"):
        LowRankLinear(base, 1, forward_mode="fold")
    layer = LowRankLinear(base, 1)
    with pytest.raises(ShapeError):
        layer.start_block(2, down=torch.zeros(1, 6))
    with pytest.raises(OptionError):
        layer.fold_block(float("nan"))
    with pytest.raises(ShapeError):
        layer.load_past([torch.zeros(1, 6)], [])
    with pytest.raises(ShapeError, match="block 0"):
        layer.load_past([torch.zeros(1, 6)], [torch.zeros(5, 2)])


def test_one_step_on_up_moves_the_weight_inside_the_designed_space():
    memory = GradientMemory(6)
    x = rand(20, 6, dtype=torch.float64)
    down = memory.design(SecondMoment(6).update(x), 2)
    layer = LowRankLinear(nn.Linear(6, 5).double(), 0, train_down=False)
    layer.start_block(2, down=down)
    before = layer.effective_weight()
    weight = before.clone().requires_grad_()
    functional.linear(x, weight, layer.base.bias).square().sum().backward()
    layer(x).square().sum().backward()
    with torch.no_grad():
        layer.up -= 0.01 * layer.up.grad
    expected = -0.01 / 3 * weight.grad @ (3 * down.T @ down)
    assert torch.allclose(layer.effective_weight() - before, expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_training_outside_the_memory_leaves_old_outputs_unchanged(dtype, tolerance):
    old = (rand(50, 3, seed=1, dtype=torch.float64) @ rand(3, 8, seed=2, dtype=torch.float64)).to(dtype)
    new, target = rand(40, 8, seed=3, dtype=dtype), rand(40, 8, seed=3, dtype=dtype)[:, 3:] * 2
    memory = GradientMemory(8)
    memory.update(SecondMoment(8).update(old), 1.0)
    layer = LowRankLinear(nn.Linear(8, 5).to(dtype), 0, train_down=False)
    before, start = layer(old), functional.mse_loss(layer(new), target)
    layer.start_block(4, down=memory.design(SecondMoment(8).update(new), 4))
    optimizer = torch.optim.Adam([layer.up], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        functional.mse_loss(layer(new), target).backward()
        optimizer.step()
    assert functional.mse_loss(layer(new), target) < 0.8 * start
    assert (layer(old) - before).abs().max() < tolerance * before.abs().max()


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.k_proj(x)) + self.v_proj(x))


def test_the_same_factors_in_peft_give_the_same_logits():
    torch.manual_seed(0)
    model = Tiny()
    reference = copy.deepcopy(model)
    layers = attach(model, ["k_proj", "v_proj"], 3)
    for index, layer in enumerate(layers.values()):
        with torch.no_grad():
            layer.up.copy_(rand(6, 3, seed=index))
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["k_proj", "v_proj"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(reference, config)
    for name, layer in layers.items():
        other = wrapped.base_model.model.get_submodule(name)
        assert other.scaling["default"] == 1.0
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.down)
            other.lora_B["default"].weight.copy_(layer.up)
    x = rand(5, 6)
    assert torch.allclose(model(x), wrapped(x), rtol=1e-5, atol=1e-6)
