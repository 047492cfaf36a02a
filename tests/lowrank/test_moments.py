from __future__ import annotations

import itertools
import socket

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from everlora.errors import NumericError, OptionError, ShapeError, TargetError
from everlora.lowrank import LowRankLinear, SecondMoment, record_moments


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_closed_form():
    moment = SecondMoment(2).update(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert moment.count == 2
    assert torch.equal(moment.matrix, torch.tensor([[5.0, -0.5], [-0.5, 2.5]], dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 60), max_size=4), shards=st.integers(1, 4))
def test_any_split_and_merge_equals_one_shot(seed, cuts, shards):
    x = tokens(60, 5, seed=seed)
    whole = SecondMoment(5).update(x).matrix
    parts = [SecondMoment(5) for _ in range(shards)]
    bounds = [0, *sorted(cuts), 60]
    for index, (a, b) in enumerate(itertools.pairwise(bounds)):
        parts[index % shards].update(x[a:b])
    merged = SecondMoment(5)
    for part in parts:
        merged.merge(part)
    assert merged.count == 60
    assert torch.allclose(merged.matrix, whole, rtol=1e-12, atol=1e-12 * float(whole.abs().max()))


def test_shuffling_tokens_changes_nothing():
    x = tokens(40, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(SecondMoment(4).update(x).matrix, SecondMoment(4).update(x[order]).matrix, rtol=1e-12)


def test_masked_tokens_equal_removed_tokens_and_may_hold_anything():
    x = tokens(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    removed = SecondMoment(5).update(x[mask])
    x[~mask] = torch.nan
    for given_mask in (mask, mask.long()):
        masked = SecondMoment(5).update(x, given_mask)
        assert masked.count == removed.count == 7
        assert torch.equal(masked.matrix, removed.matrix)


def test_matrix_is_exactly_symmetric_and_positive_semidefinite():
    matrix = SecondMoment(7).update(tokens(30, 7, dtype=torch.float32)).matrix
    assert torch.equal(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_equals_upcasting_first(dtype):
    x = tokens(50, 6, dtype=dtype)
    assert torch.equal(SecondMoment(6).update(x).matrix, SecondMoment(6).update(x.float()).matrix)


def test_float64_input_stays_in_float64():
    x = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert SecondMoment(2).update(x + 1).matrix[1, 1] == (1 + 1e-9) ** 2


def test_autocast_and_reduced_precision_do_not_touch_the_product():
    x = tokens(50, 6, dtype=torch.float32)
    expected = SecondMoment(6).update(x).matrix
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(SecondMoment(6).update(x).matrix, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_single_token_and_empty_batch():
    moment = SecondMoment(3).update(torch.ones(3)).update(torch.zeros(0, 3))
    assert moment.count == 1
    assert torch.equal(moment.matrix, torch.ones(3, 3, dtype=torch.float64))


def test_no_token_has_no_matrix():
    moment = SecondMoment(3).update(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(NumericError, match="at least one token"):
        _ = moment.matrix


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_values_are_refused_and_nothing_is_added(bad):
    moment = SecondMoment(3).update(torch.ones(2, 3))
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(NumericError, match="finite"):
        moment.update(x)
    assert moment.count == 2
    assert torch.equal(moment.matrix, torch.ones(3, 3, dtype=torch.float64))


def test_wrong_shapes_and_options_are_refused():
    moment = SecondMoment(3)
    for x, mask in (
        (torch.ones(2, 4), None),
        (torch.ones(2, 3, dtype=torch.int64), None),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.bool)),
        (torch.ones(2, 3), torch.ones(2)),
    ):
        with pytest.raises(ShapeError):
            moment.update(x, mask)
    with pytest.raises(ShapeError, match="dim 4"):
        moment.merge(SecondMoment(4))
    for dim in (0, True, 2.0):
        with pytest.raises(OptionError):
            SecondMoment(dim)
    with pytest.raises(OptionError):
        SecondMoment(3, dtype=torch.float16)


def test_state_round_trip_and_reset():
    moment = SecondMoment(4).update(tokens(9, 4))
    copy = SecondMoment(4)
    copy.load_state_dict(moment.state_dict())
    assert copy.count == 9 and torch.equal(copy.matrix, moment.matrix)
    moment.reset()
    assert moment.count == 0 and torch.equal(moment.state_dict()["sum"], torch.zeros(4, 4, dtype=torch.float64))
    assert copy.count == 9
    with pytest.raises(ShapeError):
        SecondMoment(5).load_state_dict(copy.state_dict())
    with pytest.raises(ShapeError, match="sum"):
        copy.load_state_dict({"dim": 4, "count": 1})
    with pytest.raises(NumericError):
        copy.load_state_dict({"dim": 4, "count": 1, "sum": torch.full((4, 4), torch.nan)})
    assert copy.count == 9


def test_all_reduce_without_processes_changes_nothing():
    moment = SecondMoment(4).update(tokens(9, 4))
    before = moment.matrix
    moment.all_reduce()
    assert moment.count == 9 and torch.equal(moment.matrix, before)


def _reduce(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    moment = SecondMoment(6).update(tokens(30, 6)[rank * 11 : 11 + rank * 19])
    moment.all_reduce()
    results[rank] = moment.state_dict()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one():
    from everlora.lowrank import GradientMemory

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_reduce, args=(port, results), nprocs=2)
        states = [results[0], results[1]]
    whole = SecondMoment(6).update(tokens(30, 6))
    alone = GradientMemory(6)
    count = alone.update(whole, 0.9)
    for state in states:
        moment = SecondMoment(6)
        moment.load_state_dict(state)
        assert moment.count == 30
        assert torch.allclose(moment.matrix, whole.matrix, rtol=1e-12, atol=1e-12)
        memory = GradientMemory(6)
        assert memory.update(moment, 0.9) == count
        assert torch.allclose(memory.project_free(torch.eye(6)), alone.project_free(torch.eye(6)), atol=1e-6)


def test_recording_listens_only_inside_the_block_and_takes_the_mask_of_the_batch():
    model = nn.Sequential(nn.Linear(4, 5), LowRankLinear(nn.Linear(5, 3), 2))
    x, mask = tokens(2, 3, 4, dtype=torch.float32), torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        with record_moments({"a": model[0], "b": model[1]}, mask=lambda: mask) as moments:
            model(x)
            model(x)
        model(x)
        inner = model[0](x)
    assert {name: moment.count for name, moment in moments.items()} == {"a": 6, "b": 6}
    assert torch.allclose(moments["a"].matrix, SecondMoment(4).update(x, mask).matrix)
    assert torch.allclose(moments["b"].matrix, SecondMoment(5).update(inner, mask).matrix)


def test_recording_fits_the_mask_to_flattened_and_pooled_inputs():
    layer = nn.Linear(4, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    with record_moments({"layer": layer}, mask=lambda: mask) as moments:
        layer(tokens(6, 4, dtype=torch.float32))  # batch * tokens
        assert moments["layer"].count == 3
        layer(tokens(2, 4, dtype=torch.float32))  # one vector a row
        assert moments["layer"].count == 5


def test_recording_under_inference_mode_can_go_on_outside():
    layer = nn.Linear(4, 2)
    with record_moments({"layer": layer}) as moments, torch.inference_mode():
        layer(torch.ones(3, 4))
    moments["layer"].update(torch.ones(1, 4))
    assert moments["layer"].count == 4


def test_recording_names_the_group_and_removes_hooks_after_an_error():
    layer = nn.Linear(4, 2)
    with pytest.raises(NumericError, match=r"'encoder\.key'"), record_moments({"encoder.key": layer}):
        layer(torch.full((1, 4), torch.nan))
    assert not layer._forward_pre_hooks
    with pytest.raises(ShapeError, match="'layer'"), record_moments({"layer": layer}, lambda: torch.ones(5) > 0):
        layer(torch.ones(2, 3, 4))
    with pytest.raises(TargetError, match="ReLU"), record_moments({"act": nn.ReLU()}):
        pass


@pytest.mark.parametrize("power", [1, 2])
def test_the_share_of_the_leading_direction(power):
    for scale in (1.0, 30.0):
        moment = SecondMoment(6).update(tokens(200, 6) * torch.tensor([scale, 3.0, 1, 1, 0.5, 0.1]))
        values = torch.linalg.eigvalsh(moment.matrix) ** power
        assert moment.leading_share(power) == pytest.approx(float(values[-1] / values.sum()), rel=0.01)
    assert SecondMoment(3).update(torch.zeros(2, 3)).leading_share() == 0.0


def test_recording_can_scale_vectors_to_length_one():
    layer, x = nn.Linear(4, 2), 100 * tokens(3, 5, 4, dtype=torch.float32)
    with record_moments({"layer": layer}, normalize=True) as moments:
        layer(x)
    expected = SecondMoment(4).update(nn.functional.normalize(x, dim=-1)).matrix
    assert torch.allclose(moments["layer"].matrix, expected) and float(expected.trace()) == pytest.approx(1.0, rel=1e-6)
