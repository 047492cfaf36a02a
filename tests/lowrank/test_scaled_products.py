from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from everlora.errors import OptionError, UnsupportedError
from everlora.lowrank import LowRankLinear, attach
from everlora.lowrank.scaled_products import takes_dense
from tests.lowrank.builders import CountProducts, rand
from tests.lowrank.magnitude_builders import CURRENT, IN, OUT, WAYS, close, loop, make, parameters


@pytest.mark.parametrize("options", CURRENT)
@pytest.mark.parametrize(("mode", "form"), WAYS)
@pytest.mark.parametrize("past", [(2, 0, 1), (), (0,), (3, 2, 4, 3)])
def test_every_form_equals_the_loop(mode, form, past, options):
    layer, values = make(mode, form, past=past, **options)
    x = rand(2, 4, IN, seed=2, dtype=torch.float64).requires_grad_()
    weight = rand(2, 4, OUT, seed=3, dtype=torch.float64)
    y, expected = layer(x), loop(layer, x, values, **options)
    assert close(y, expected, 1e-12)
    inputs = (x, *parameters(layer, values))
    got = torch.autograd.grad((y * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert close(a, b, 1e-10)
    merged = functional.linear(x, layer.effective_weight(), layer.base.bias)
    with torch.no_grad():
        assert close(layer(x), expected, 1e-12) and close(merged, expected, 1e-12)


@pytest.mark.parametrize("options", CURRENT)
@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_gradients_pass_the_numerical_check(mode, form, options):
    layer, values = make(mode, form, **options)
    x = rand(3, IN, seed=2, dtype=torch.float64).requires_grad_()
    tensors = [t.detach().clone().requires_grad_() for t in parameters(layer, values)]

    def run(x, values, up, down, bias):
        # gradcheck writes through `.data`, which no version counter sees; so each run has tensors of its own.
        own = copy.deepcopy(layer)
        gain, offset = layer._magnitudes.gain[:-1], layer._magnitudes.offset[:-1]
        own.set_magnitudes(values.clone(), gain, offset, **options)
        return functional_call(own, {"up": up.clone(), "down": down.clone(), "base.bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_frozen_parts_get_no_gradient_and_thawed_ones_do():
    x = rand(4, IN, seed=2, dtype=torch.float64)
    for mode, form in WAYS:
        layer, values = make(mode, form)
        layer(x).sum().backward()
        assert layer.base.weight.grad is None and layer.past_up.grad is None
        whole = [t.grad.clone() for t in parameters(layer, values)]
        for frozen in range(3):
            layer, values = make(mode, form)
            parameters(layer, values)[frozen].requires_grad_(False)
            layer(x).sum().backward()
            for index, (tensor, wanted) in enumerate(zip(parameters(layer, values), whole, strict=True)):
                assert tensor.grad is None if index == frozen else close(tensor.grad, wanted, 1e-12)
        for tensor in parameters(layer, values):
            tensor.requires_grad_(False)
        assert not layer(x).requires_grad


def test_a_current_block_of_rank_zero():
    for mode, form in WAYS:
        layer, values = make(mode, form, rank=0)
        x = rand(4, IN, seed=2, dtype=torch.float64).requires_grad_()
        wanted = torch.autograd.grad(loop(layer, x, values).square().sum(), (x, values))
        got = torch.autograd.grad(layer(x).square().sum(), (x, values))
        assert all(close(a, b, 1e-10) for a, b in zip(got, wanted, strict=True))
        assert got[1][-1] == 0


def products(layer, tokens):
    y = layer(rand(tokens, IN, seed=2, dtype=torch.float64))
    with CountProducts() as count:
        y.sum().backward()
    return count.shapes


def test_beyond_the_break_even_rank_one_full_product_serves_all():
    full = ((OUT, 50), (50, IN))
    assert full not in products(make(past=(), rank=1)[0], 50)
    assert full in products(make(past=(2,) * 4, rank=1)[0], 50)
    assert full in products(make(form="dense", past=(), rank=1)[0], 50)
    assert full not in products(make(form="thin", past=(2,) * 4, rank=1)[0], 50)
    frozen, values = make(past=(2,) * 40, rank=1)
    values.requires_grad_(False)  # then the past is no reason for it
    assert full not in products(frozen, 50)


def test_the_cost_rule_follows_width_rank_and_tokens():
    square = (384, 384)
    assert [takes_dense("auto", 1576, square, (r, 10)) for r in (0, 100, 200, 500)] == [False, False, True, True]
    assert not takes_dense("auto", 1576, (4096, 4096), (500, 10))
    assert not takes_dense("auto", 64, square, (500, 10))  # few tokens: the contractions of the full product are dearer
    layer, _ = make()
    layer.gradient_form = "thick"
    with pytest.raises(OptionError, match="gradient_form='thick'"):
        layer(rand(3, IN, dtype=torch.float64))
    with pytest.raises(OptionError, match="known: auto, dense, thin"):
        LowRankLinear(nn.Linear(4, 4), 1, gradient_form="x")


def saved_shapes(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    return saved


@pytest.mark.parametrize("form", ["thin", "dense"])
def test_saved_activations_do_not_grow_with_the_past(form):
    x = rand(50, IN, seed=2, dtype=torch.float64)
    sizes = {}
    for blocks in (1, 30):
        shapes = saved_shapes(make("folded", form, past=(2,) * blocks)[0], x)
        assert shapes.count((50, IN)) == 1
        # Apart from the magnitudes themselves, one number a block.
        sizes[blocks] = sorted(shape for shape in shapes if shape != (blocks + 1,))
    assert sizes[1] == sizes[30]
    layer, _ = make()
    with torch.no_grad():
        assert not saved_shapes(layer, x)


def test_forward_is_one_product_and_a_step_folds_once():
    layer, values = make(past=(2,) * 20)
    x = rand(7, IN, dtype=torch.float64)
    layer(x)
    with CountProducts() as count:
        layer(x)
    assert len(count.shapes) == 1
    with torch.no_grad():
        values.mul_(2.0)
    with CountProducts() as count:
        layer(x)
    assert sorted(count.shapes) == sorted([((OUT, 40), (40, IN)), ((OUT, 3), (3, IN)), ((7, IN), (IN, OUT))])


def test_accumulation_equals_one_large_batch():
    x = rand(8, IN, seed=2, dtype=torch.float64)
    whole, values = make()
    whole(x).square().sum().backward()
    parts, part_values = make()
    for part in x.chunk(4):
        parts(part).square().sum().backward()
    for a, b in zip(parameters(parts, part_values), parameters(whole, values), strict=True):
        assert close(a.grad, b.grad, 1e-12)


@pytest.mark.parametrize(("mode", "form"), WAYS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradients(mode, form, reentrant):
    layer, values = make(mode, form)
    x = rand(4, IN, seed=2, dtype=torch.float64).requires_grad_()
    tensors = (x, *parameters(layer, values))
    wanted = torch.autograd.grad(loop(layer, x, values).square().sum(), tensors)
    for tensor in tensors:
        tensor.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(close(t.grad, b, 1e-10) for t, b in zip(tensors, wanted, strict=True))


@pytest.mark.parametrize(("mode", "form"), WAYS)
@pytest.mark.parametrize("options", CURRENT)
def test_autocast_in_bf16(mode, form, options):
    layer, values = make(mode, form, dtype=torch.float32, past=(2, 0, 4), **options)
    x = rand(64, IN, seed=2).requires_grad_()
    weight = rand(64, OUT, seed=3)
    inputs = (x, *parameters(layer, values))
    expected = loop(layer, x, values, **options)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        got = torch.autograd.grad((y * weight).sum(), inputs)
    assert y.dtype == torch.bfloat16 and close(y.float(), expected, 2e-2)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_double_backward_is_refused(mode, form):
    layer, _ = make(mode, form)
    x = rand(3, IN, dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_after_a_rebuild_is_refused():
    layer, values = make()
    x = rand(3, IN, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        values.add_(1.0)
    layer(x)
    with pytest.raises(UnsupportedError, match="rebuilt between"):
        y.sum().backward()


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)) * 2)))


# The compiler looks at `.grad` of tensors between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mode", ["folded", "factored"])
def test_a_compiled_model_trains_like_the_plain_one(mode):
    torch.manual_seed(0)
    plain = Tiny()
    values = plain.values = nn.Parameter(rand(3, seed=40))
    for layer in attach(plain, ["first", "second"], 0, forward_mode=mode).values():
        layer.load_past([rand(2, IN, seed=5), rand(1, IN, seed=6)], [rand(IN, 2, seed=7), rand(IN, 1, seed=8)])
        layer.start_block(2, down=rand(2, IN, seed=9))
        layer.set_magnitudes(values, torch.ones(2), torch.zeros(2))
    model = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    x = rand(5, IN, seed=2)
    for _ in range(3):
        results = []
        for module, run in ((plain, plain), (model, compiled)):
            optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
            y = run(x)
            y.square().mean().backward()
            results.append([y, *(p.grad.clone() for p in module.parameters() if p.requires_grad)])
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))
    # One reason, met at each of the two layers by the frame and by what is resumed after it.
    assert list(counters["graph_break"].values()) == [4]
    torch._dynamo.reset()
