from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from everlora.errors import NumericError, OptionError, ShapeError, UnsupportedError
from everlora.lowrank import Direction, LowRankLinear, attach, detach
from everlora.lowrank.factors import direction_norm
from tests.lowrank.builders import CountProducts, rand
from tests.lowrank.magnitude_builders import CURRENT, IN, OUT, WAYS, close, loop, make


@pytest.mark.parametrize("options", CURRENT)
def test_values_equal_central_differences(options):
    layer, values = make(**options)
    x = rand(4, IN, seed=2, dtype=torch.float64)
    layer(x).square().sum().backward()
    for k in range(len(values)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                values[k] += step
                sides.append(layer(x).square().sum())
                values[k] -= step
        assert values.grad[k].item() == pytest.approx(((sides[0] - sides[1]) / 2e-5).item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("mode", "form"), WAYS)
def test_layers_share_values_and_their_gradients_add_up(mode, form):
    shared = nn.Parameter(rand(4, seed=40, dtype=torch.float64))
    rows = nn.Parameter(shared.detach().expand(3, 4).clone())
    x = rand(4, IN, seed=2, dtype=torch.float64)
    total = 0
    for index in range(3):
        layer, _ = make(mode, form, seed=index, values=shared)
        own, _ = make(mode, form, seed=index, values=rows, row=index)
        (layer(x).square().sum() + own(x).square().sum()).backward()
        total = total + torch.autograd.grad(loop(layer, x, shared, seed=index).square().sum(), shared)[0]
        assert close(own.coefficients(), layer.coefficients(), 1e-15)
    assert close(shared.grad, total, 1e-10) and close(rows.grad.sum(0), total, 1e-10)
    assert (rows.grad != 0).tolist() == [[True, False, True, True]] * 3  # block 1 has rank 0


def test_a_block_at_its_start_changes_nothing_and_can_learn():
    for options in CURRENT:
        layer, _ = make(**options)
        with torch.no_grad():
            layer.up.zero_()
        x = rand(4, IN, seed=2, dtype=torch.float64)
        y = layer(x)
        y.square().sum().backward()
        assert layer.up.grad.isfinite().all() and layer.up.grad.abs().max() > 0
        assert not layer.down.grad.any()
        layer.settle_magnitudes()
        assert close(layer(x), y, 1e-12)


@pytest.mark.parametrize("mode", ["folded", "factored"])
def test_the_weight_is_rebuilt_once_for_each_change(mode):
    layer, values = make(mode, dtype=torch.float32)
    x = rand(4, IN, seed=2)

    def builds(change):
        before = layer._working.generation
        change()
        for _ in range(3):
            assert torch.allclose(layer(x), loop(layer, x, values), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer(x)
        return layer._working.generation - before

    optimizer = torch.optim.SGD([values, layer.up, layer.down], lr=0.01)

    def accumulate():
        for _ in range(3):
            layer(x).square().mean().backward()

    state = {name: value + 1 if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    builds(lambda: None)
    assert builds(accumulate) == 0
    changes = (optimizer.step, lambda: layer.load_state_dict(state), layer.invalidate)
    expected = 1 if mode == "folded" else 0
    assert [builds(change) for change in changes] == [expected] * 3
    values.data.add_(1.0)  # leaves no trace
    assert builds(layer.invalidate) == expected


def test_a_half_precision_base_keeps_float32_coefficients():
    for mode in ("factored", "folded"):
        layer, values = make(mode, dtype=torch.float32)
        x = rand(8, IN, seed=2)
        expected = loop(layer, x, values)
        layer.to(torch.bfloat16)
        assert layer._magnitudes.gain.dtype == torch.float32
        y = layer(x.bfloat16())
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and close(y.float(), expected, 2e-2)
        assert values.grad.dtype == torch.float32 and (values.grad != 0).tolist() == [True, False, True, True]
    layer.double()
    assert layer._magnitudes.gain.dtype == torch.float64
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("mode", ["folded", "factored"])
@pytest.mark.parametrize("options", CURRENT)
def test_settling_and_folding_keep_the_function(mode, options):
    layer, values = make(mode, dtype=torch.float32, **options)
    x = rand(7, IN, seed=2)
    before, coefficients = layer(x), layer.coefficients()
    scale = layer.settle_magnitudes()
    assert scale == coefficients[-1].item()
    layer.fold_block(scale)
    assert torch.allclose(layer(x), before, rtol=1e-6, atol=1e-6)
    assert torch.allclose(layer.coefficients()[:-1], coefficients[[0, 1, 2, 3]].where(layer.past_ranks > 0, 1.0))
    assert layer.coefficients()[-1] == 1.0
    with torch.no_grad():
        values.add_(1.0)
    assert torch.allclose(layer(x), before, rtol=1e-6, atol=1e-6)
    with pytest.raises(OptionError, match="no magnitudes"):
        layer.settle_magnitudes()


def test_coefficients_and_blocks_say_what_is_in_force():
    layer, values = make(current="normalised", soft_eps=0.5)
    gain, offset = rand(3, seed=41).abs().double(), (0.3 * rand(3, seed=42)).double()
    norm = direction_norm(Direction(layer.down, layer.up))
    wanted = torch.cat([values[:-1] * gain + offset, values[-1:] / math.hypot(norm, 0.5)]).detach()
    got = layer.coefficients()
    assert got.dtype == torch.float64 and not got.requires_grad
    assert torch.allclose(got, wanted, rtol=1e-12)
    for index, block in enumerate(layer.blocks()):
        assert torch.equal(block.scale, got[index].expand(len(block.scale)))
    plain = LowRankLinear(nn.Linear(IN, OUT), 0)
    assert plain.coefficients().tolist() == [1.0]
    plain.load_past([rand(2, IN), rand(0, IN)], [rand(OUT, 2), rand(OUT, 0)], [0.5, 3.0])
    assert plain.coefficients().tolist() == [0.5, 1.0, 1.0]
    plain.past_scale[0] = 2.0
    with pytest.raises(UnsupportedError, match="past block 0"):
        plain.coefficients()


def test_magnitudes_are_no_part_of_the_state():
    layer, values = make()
    names = set(layer.state_dict())
    assert values is not None and all(parameter is not values for parameter in layer.parameters())
    layer.settle_magnitudes()
    assert set(layer.state_dict()) == names
    assert "with magnitudes" in repr(make()[0]) and "with magnitudes" not in repr(layer)


def test_copies_and_pickles_are_independent_and_keep_what_was_shared():
    values = nn.Parameter(rand(4, seed=40, dtype=torch.float64))
    model = nn.ModuleList([make(values=values)[0], make(seed=1, values=values)[0]])
    model.values = values
    x = rand(4, IN, seed=2, dtype=torch.float64)
    before = [layer(x) for layer in model]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert clone[0]._magnitudes.values is clone[1]._magnitudes.values is clone.values
        assert all(torch.equal(layer(x), y) for layer, y in zip(clone, before, strict=True))
        with torch.no_grad():
            clone.values.add_(1.0)
        assert not any(torch.equal(layer(x), y) for layer, y in zip(clone, before, strict=True))
        assert all(torch.equal(layer(x), y) for layer, y in zip(model, before, strict=True))


def test_blocks_cannot_change_under_their_magnitudes():
    layer, _ = make()
    before = layer.coefficients()
    for action in (lambda: layer.start_block(1), layer.fold_block, lambda: layer.load_past([], [])):
        with pytest.raises(OptionError, match="settle_magnitudes first"):
            action()
    assert torch.equal(layer.coefficients(), before)
    other, _ = make(past=(1,))
    with pytest.raises(OptionError, match="3 past blocks, the layer now has 1"):
        layer.load_state_dict(other.state_dict())
        layer(rand(2, IN, dtype=torch.float64))


def test_a_state_with_other_ranks_is_taken_up():
    layer, values = make()
    other, _ = make(past=(1, 3, 2), rank=2)
    layer.load_state_dict(other.state_dict())
    x = rand(4, IN, seed=2, dtype=torch.float64)
    assert close(layer(x), loop(layer, x, values), 1e-12)


def test_detaching_drops_the_magnitudes():
    model = nn.Sequential(nn.Linear(IN, OUT))
    x = rand(3, IN)
    before = model(x)
    layer = attach(model, "0", 2)["0"]
    layer.set_magnitudes(nn.Parameter(torch.ones(1)), torch.zeros(0), torch.zeros(0))
    with torch.no_grad():
        layer.up.add_(1.0)
    assert not torch.allclose(model(x), before)
    detach(model)
    assert torch.equal(model(x), before)


def test_raw_magnitudes_compute_no_norm():
    for options, norms in (({}, 0), ({"current": "normalised"}, 1)):
        layer, _ = make(past=(2,) * 3, rank=2, **options)
        with CountProducts() as count:
            layer(rand(50, IN, dtype=torch.float64)).sum().backward()
        assert (((2, OUT), (OUT, 2)) in count.shapes) == bool(norms)


def test_a_zero_block_cannot_be_normalised_without_softening():
    layer, _ = make(current="normalised", soft_eps=0.0)
    x = rand(3, IN, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer.up.zero_()
    for use in (lambda: layer(x), layer.coefficients, layer.settle_magnitudes, layer.effective_weight):
        with pytest.raises(NumericError, match="soft_eps=0"):
            use()
    assert len(layer.blocks()) == 3


def test_bad_arguments_are_refused():
    layer, values = make()
    one = torch.ones(3)
    for arguments in ((values, torch.ones(2), one), (values, one, torch.ones(2)), (values[:-1], one, one)):
        with pytest.raises(ShapeError):
            layer.set_magnitudes(*arguments)
    with pytest.raises(ShapeError, match=r"\(rows, 4\)"):
        layer.set_magnitudes(values, one, one, row=0)
    with pytest.raises(OptionError, match="from 0 to 1"):
        layer.set_magnitudes(nn.Parameter(torch.ones(2, 4)), one, one, row=2)
    for wrong in ({"current": "row"}, {"norm": "f"}, {"soft_eps": -1.0}, {"soft_eps": math.nan}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            layer.set_magnitudes(values, one, one, **wrong)
