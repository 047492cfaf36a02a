"""Adapted convolutions: sections 3.1 to 3.3 of the reference and invariants 5, 7, 8, 9 and 10."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call

from everlora.errors import OptionError, ShapeError, TargetError, UnsupportedError
from everlora.lowrank import LowRankConv2d, LowRankLinear, rank_cap
from tests.lowrank.builders import rand
from tests.lowrank.conv_builders import KINDS, PLAIN, convolution, explicit, images, make

# torch tells of a slower way for even kernels, once.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

MODES = ("folded", "factored")
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-4, 1e-5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients_equal_the_formula_and_the_merged_layer(kind, mode, dtype):
    layer, x = make(kind, mode, dtype=dtype), images(kind, dtype).requires_grad_()
    y = layer(x)
    wanted = explicit(layer, x)
    rtol, atol = TOLERANCES[dtype]
    assert torch.allclose(y, wanted, rtol=rtol, atol=atol)
    merged = copy.deepcopy(layer.base)
    merged.weight = nn.Parameter(layer.effective_weight())
    assert merged.weight.shape == layer.base.weight.shape
    assert torch.allclose(y, merged(x), rtol=rtol, atol=atol)
    mix = rand(*y.shape, seed=6, dtype=dtype)
    sources = x, layer.up, layer.down
    got = torch.autograd.grad((y * mix).sum(), sources)
    expected = torch.autograd.grad((wanted * mix).sum(), sources)
    for one, two in zip(got, expected, strict=True):
        assert torch.allclose(one, two, rtol=rtol, atol=atol * 10 * max(1.0, float(two.abs().max())))


@pytest.mark.parametrize("kind", ["stride", "same", "groups_2", "depthwise"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("train_down", [True, False])
def test_gradients_pass_the_numerical_check(kind, mode, train_down):
    layer = make(kind, mode, train_down=train_down, past=(1,))
    x = images(kind, count=1)[..., :4, :5].clone().requires_grad_()
    down = layer.down.detach().clone().requires_grad_(train_down)
    up = layer.up.detach().clone().requires_grad_()

    def run(x, up, down):
        # gradcheck writes through `.data`, which no version counter sees, so each run has a layer of its own.
        return functional_call(copy.deepcopy(layer), {"up": up.clone(), "down": down.clone()}, (x,))

    assert torch.autograd.gradcheck(run, (x, up, down))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_new_layer_computes_the_base_bit_for_bit(kind, mode, dtype):
    base, x = convolution(kind, dtype), images(kind, dtype)
    wanted, kept = base(x), base.weight.clone()
    layer = LowRankConv2d(base, 1, forward_mode=mode, scale=3.0)
    assert torch.equal(layer(x), wanted)
    with torch.no_grad():
        layer.up.add_(1.0)
    assert not torch.equal(layer(x), wanted)
    layer.fold_block()
    layer(x)
    assert torch.equal(base.weight, kept) and not base.weight.requires_grad


@pytest.mark.parametrize("layer_kind", ["linear", "plain", "groups_2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_scale_of_the_current_block_is_a_factor(layer_kind, mode):
    if layer_kind == "linear":
        layer, x = LowRankLinear(nn.Linear(6, 5).double(), 2, forward_mode=mode, scale=0.5), rand(3, 6).double()
        with torch.no_grad():
            layer.up.copy_(rand(5, 2, seed=1))
    else:
        layer, x = make(layer_kind, mode, past=()), images(layer_kind)
    base = layer.base(x)
    once = layer(x) - base
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.up)
    (down_gradient,) = torch.autograd.grad(layer(x).sum(), layer.down)
    layer.scale = 2 * layer.scale
    twice = layer(x) - base
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), layer.up)[0], 2 * gradient)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), layer.down)[0], 2 * down_gradient)
    assert layer.coefficients().tolist() == [1.0]
    before = layer(x)
    layer.fold_block()  # counts as before
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert bool((layer.past_scale == 1.0).all()) and layer.scale == 1.0
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match="finite"):
            layer.scale = wrong


def test_more_rank_with_zero_rows_and_the_same_scale_changes_nothing():
    small, x = make("plain", past=(), scale=4 / 2), images()
    large = LowRankConv2d(convolution(), 4, scale=8 / 4)
    large.start_block(4, down=torch.cat([small.down.detach(), torch.zeros_like(small.down)]))
    with torch.no_grad():
        large.up[:, :2] = small.up
    torch.testing.assert_close(large(x), small(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_follow_one_formula_for_any_number_of_groups(kind):
    conv = convolution(kind)
    layer = LowRankConv2d(conv, 1)
    height, width = conv.kernel_size
    assert layer.down.numel() + layer.up.numel() == conv.in_channels * height * width + conv.out_channels
    assert layer.size.full_rank == min(conv.out_channels // conv.groups, conv.weight[0].numel())
    with pytest.raises(OptionError, match="rank must be an integer from 0 to"):
        layer.start_block(layer.size.full_rank + 1)
    with pytest.raises(ShapeError, match="expected down"):
        layer.start_block(1, down=torch.zeros(layer.groups + 1, layer.in_features))


def test_the_first_draw_is_that_of_peft():
    generator = torch.Generator().manual_seed(3)
    layer = LowRankConv2d(nn.Conv2d(4, 6, 3), 2, generator=generator)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"])
    theirs = peft.get_peft_model(model, config).base_model.model[0].lora_A["default"].weight
    assert tuple(layer.as_kernels(layer.down, layer.up)[0].shape) == tuple(theirs.shape)
    bound = 1 / 36**0.5
    assert layer.down.abs().max() <= bound and theirs.abs().max() <= bound
    assert layer.down.abs().max() > 0.8 * bound


@pytest.mark.parametrize("kind", ["plain", "stride", "one", "same", "rectangle"])
def test_plain_peft_computes_the_same_from_the_kernels(kind):
    layer, x = make(kind, dtype=torch.float32, past=()), images(kind, torch.float32)
    layer.require_peft()
    first, second = layer.as_kernels(layer.down.detach(), layer.up.detach())
    model = nn.Sequential(copy.deepcopy(layer.base))
    config = peft.LoraConfig(r=2, lora_alpha=layer.scale * 2, target_modules=["0"])
    theirs = peft.get_peft_model(model, config)
    state = {"base_model.model.0.lora_A.weight": first, "base_model.model.0.lora_B.weight": second}
    peft.set_peft_model_state_dict(theirs, state)
    torch.testing.assert_close(theirs(x), layer(x), rtol=1e-4, atol=1e-5)
    back = layer.as_rows(first, second)
    assert torch.equal(back[0], layer.down) and torch.equal(back[1], layer.up)
    with pytest.raises(ShapeError, match="expected kernels"):
        layer.as_rows(first[:, :-1], second)


@pytest.mark.parametrize("kind", ["dilation", "reflect", "groups_2", "depthwise"])
def test_what_peft_would_drop_is_refused(kind):
    with pytest.raises(UnsupportedError, match="cannot be written for PEFT"):
        make(kind).require_peft()


def test_the_change_lies_in_the_set_of_the_other_published_form():
    """Section 3.2: any branch of this form is one of loralib's, entry for entry."""
    layer, k, rank = make("plain", past=()), 3, 2
    outputs, chunk = 6, 4 * k
    with torch.no_grad():  # whole numbers, so that no order of summation rounds
        layer.down.mul_(10).round_()
        layer.up.mul_(10).round_()
    down, up = layer.down.detach(), layer.up.detach()
    ours = up @ down
    wide_up, wide_down = torch.zeros(outputs * k, rank * k).double(), torch.zeros(rank * k, chunk).double()
    for a in range(k):
        for rho in range(rank):
            wide_up[a::k, rho * k + a] = up[:, rho]
            wide_down[rho * k + a] = down[rho, a * chunk : (a + 1) * chunk]
    theirs = (wide_up @ wide_down).view(outputs, 4, k, k)
    assert torch.equal(theirs, ours.view_as(theirs)) and bool(ours.any())
    change = layer.effective_weight() - layer.base.weight
    assert int(torch.linalg.matrix_rank(change.reshape(outputs, -1))) == rank


@pytest.mark.parametrize("kind", ["plain", "groups_2", "depthwise"])
def test_blocks_are_kept_bit_for_bit_and_saved_with_their_ranks(kind):
    layer, x = make(kind), images(kind)
    kept = (layer.down.detach().clone(), layer.up.detach().clone())
    before = layer(x)
    layer.fold_block()
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    newest = layer.blocks()[-1]
    assert torch.equal(newest.down, kept[0]) and torch.equal(newest.up, kept[1]) and layer.rank == 0
    layer.start_block(1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LowRankConv2d(convolution(kind), 0, forward_mode="factored")
    other.load_state_dict(torch.load(file))
    assert (other.rank, other.total_rank) == (1, layer.total_rank)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-12, atol=1e-12)
    other.load_past(*zip(*((b.down, b.up, b.scale) for b in layer.blocks()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other.past_down, layer.past_down, strict=True))
    down, up = layer.factors()
    again = LowRankConv2d(convolution(kind), 0)
    again.load_past([down], [up])
    torch.testing.assert_close(again(x), layer(x), rtol=1e-12, atol=1e-12)


def test_a_step_is_seen_and_a_late_backward_pass_refused():
    layer, x = make("stride"), images("stride").requires_grad_()
    optimizer = torch.optim.SGD([layer.up, layer.down], lr=0.1)
    for _ in range(2):
        before = layer(x)
        before.sum().backward()
        optimizer.step()
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), explicit(layer, x), rtol=1e-12, atol=1e-12)
    late = layer(x)
    optimizer.step()
    layer(x)
    for wanted in (x, layer.up):
        with pytest.raises(UnsupportedError, match="rebuilt between"):
            torch.autograd.grad(late.sum(), wanted, retain_graph=True)


def test_half_precision_keeps_float32_factors_and_small_updates():
    conv = nn.Conv2d(1, 1, 1, bias=False).bfloat16()
    with torch.no_grad():
        conv.weight.fill_(1.0)
    layer = LowRankConv2d(conv, 1)
    layer.start_block(1, down=torch.ones(1, 1))
    with torch.no_grad():
        layer.up.fill_(2.0**-10)
    assert layer.resolved_mode == "factored" and layer.up.dtype == torch.float32
    assert layer.effective_weight().item() == 1.0 + 2.0**-10
    x = torch.full((1, 1, 2, 2), 2.0**-3, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.up.grad.dtype == torch.float32


def test_autocast_computes_narrow_and_gives_wide_gradients():
    layer, x = make("plain", dtype=torch.float32), images(dtype=torch.float32)
    wanted = torch.autograd.grad(layer(x).square().sum(), (layer.up, layer.down))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().square().sum(), (layer.up, layer.down))
    for one, two in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        assert float((one - two).norm() / two.norm()) < 0.05


def test_other_memory_layouts_and_single_images():
    layer, x = make("plain"), images()
    wanted = explicit(layer, x)
    torch.testing.assert_close(layer(x[0]), wanted[0], rtol=1e-12, atol=1e-12)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(layer)(x), wanted, rtol=1e-12, atol=1e-12)
    merged = layer.effective_weight()
    torch.testing.assert_close(torch.nn.functional.conv2d(x, merged, layer.bias, padding=1), wanted)


@pytest.mark.parametrize("kind", ["plain", "groups_2"])
@pytest.mark.parametrize("mode", MODES)
def test_magnitudes_on_convolutions_equal_scaled_blocks(kind, mode):
    layer, x = make(kind, mode, past=(1, 0, 2), scale=1.0), images(kind)
    values = nn.Parameter(rand(4, seed=40, dtype=torch.float64))
    gain, offset = rand(3, seed=41).abs().double(), 0.3 * rand(3, seed=42).double()
    layer.set_magnitudes(values, gain, offset)
    y = layer(x)
    plain = make(kind, "factored", past=(1, 0, 2), scale=1.0)
    trained = torch.cat([values[:-1] * gain + offset, values[-1:]])
    columns = torch.repeat_interleave(torch.arange(3), plain.past_ranks)
    up = torch.cat([plain.past_up * trained[columns], plain.up * trained[-1]], dim=1)
    whole = make(kind, past=(), rank=0)
    wanted = explicit(whole, x, up=up / whole.scale, down=_joined(plain))
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    mix = rand(*y.shape, seed=6, dtype=torch.float64)
    got = torch.autograd.grad((y * mix).sum(), (values, layer.up, layer.down))
    expected = torch.autograd.grad((wanted * mix).sum(), (values, plain.up, plain.down))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    with pytest.raises(OptionError, match="settle_magnitudes first"):
        layer.scale = 2.0
    layer.fold_block(layer.settle_magnitudes())
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


def _joined(layer):
    """Past and current rows, group by group."""
    groups, width = layer.groups, layer.in_features
    parts = [part.reshape(groups, -1, width) for part in (layer.past_down, layer.down)]
    return torch.cat(parts, dim=1).reshape(-1, width)


def test_magnitudes_refuse_a_scale_and_norms_of_groups():
    one = torch.ones(0)
    with pytest.raises(OptionError, match="take the place of scale"):
        make(past=(), scale=0.5).set_magnitudes(nn.Parameter(torch.ones(1)), one, one)
    layer = make("groups_2", past=(), scale=1.0)
    with pytest.raises(UnsupportedError, match="in 2 groups"):
        layer.set_magnitudes(nn.Parameter(torch.ones(1)), one, one, current="normalised")


def test_other_bases_are_refused():
    with pytest.raises(TargetError, match="expected a Conv2d to adapt, found a Linear"):
        LowRankConv2d(nn.Linear(3, 3), 1)
    with pytest.raises(TargetError, match="expected a Linear to adapt, found a Conv2d"):
        LowRankLinear(nn.Conv2d(3, 3, 1), 1)


@pytest.mark.parametrize(
    ("channels", "outputs", "cap"), [(3, 16, 10), (16, 16, 14), (16, 32, 26), (32, 32, 28), (32, 64, 52), (64, 64, 57)]
)
def test_the_rank_cap_is_the_break_even_of_the_reference(channels, outputs, cap):
    conv = nn.Conv2d(channels, outputs, 3)
    assert rank_cap(conv, 1000) == cap and rank_cap(conv, 4) == 4 and rank_cap(conv, 0) == 0
    assert rank_cap(LowRankConv2d(conv, 1), 1000) == cap
    cost = LowRankConv2d(conv, 1).down.numel() + outputs
    assert cap * cost <= conv.weight.numel() < (cap + 1) * cost


def test_the_rank_cap_of_other_layers():
    assert rank_cap(nn.Conv2d(8, 8, 3, groups=8), 4) == 0
    assert rank_cap(nn.Conv2d(64, 64, 3, groups=4), 100) == 14  # 9216 weights, 640 a unit; full rank 16
    assert rank_cap(nn.Linear(10, 30), 100) == 7
    assert rank_cap(nn.Linear(100, 1), 100) == 0
    with pytest.raises(OptionError, match="at least 0"):
        rank_cap(nn.Linear(3, 3), -1)
    with pytest.raises(TargetError, match="found a ReLU"):
        rank_cap(nn.ReLU(), 1)


def test_the_layers_of_the_residual_network_cost_what_the_reference_counts():
    """Section 9: 6331 parameters a unit of rank in 20 layers, 99118 at rank 16, where narrow layers are capped."""
    shapes = [(3, 16)] + [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)] + [(64, 64)] * 5
    convs = [nn.Conv2d(i, o, 3) for i, o in shapes]
    for rank, wanted in ((1, 6331), (4, 25324), (16, 99118)):
        layers = [LowRankConv2d(conv, rank_cap(conv, rank)) for conv in convs]
        assert sum(layer.down.numel() + layer.up.numel() for layer in layers) == wanted


@pytest.mark.parametrize("kind", PLAIN)
def test_a_convolution_is_a_matrix_product_of_its_input_rows(kind):
    layer, x = make(kind), images(kind)
    y = layer(x)
    rows = layer.input_rows(x)
    assert rows.shape == (y.shape[0] * y[0, 0].numel(), layer.in_features)
    flat = rows @ layer.effective_weight().flatten(1).T
    flat = flat if layer.bias is None else flat + layer.bias
    got = flat.reshape(len(x), -1, layer.out_features).transpose(1, 2).reshape(y.shape)
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)


def test_input_rows_of_linear_layers_and_groups():
    layer = LowRankLinear(nn.Linear(6, 5), 1)
    assert torch.equal(layer.input_rows(torch.arange(36.0).reshape(2, 3, 6)), torch.arange(36.0).reshape(6, 6))
    with pytest.raises(UnsupportedError, match="groups=2"):
        make("groups_2").input_rows(images("groups_2"))
