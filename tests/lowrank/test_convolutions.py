"""Convolutions as linear layers on patches: invariant 22 of the InfLoRA reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import everlora.lowrank.moments as moments_module
from everlora.errors import NumericError, UnsupportedError
from everlora.lowrank import GradientMemory, LowRankConv2d, SecondMoment, record_moments
from everlora.lowrank.patches import unfold_patches


def test_a_one_by_one_convolution_has_the_moment_of_the_linear_layer_on_positions() -> None:
    conv, x = nn.Conv2d(5, 3, 1).double(), torch.randn(4, 5, 6, 7, dtype=torch.float64)
    with record_moments({"conv": conv}) as moments:
        conv(x)
    tokens = x.permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(moments["conv"].matrix, SecondMoment(5).update(tokens).matrix, rtol=1e-12, atol=1e-12)
    assert moments["conv"].count == 4 * 6 * 7


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((1, 2), (2, 1), (2, 1))])
def test_a_designed_branch_as_two_convolutions_equals_unfold_and_linear(stride, padding, dilation) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=stride, padding=padding, dilation=dilation).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    patches = unfold_patches(x, conv)
    plain = patches @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(plain.transpose(1, 2), conv(x).flatten(2))
    with record_moments({"conv": conv}) as moments:
        conv(x)
    down = GradientMemory(36).design(moments["conv"], 2)
    up = torch.randn(6, 2, dtype=torch.float64)
    settings = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    thin = functional.conv2d(x, down.reshape(2, 4, 3, 3), **settings)
    branch = functional.conv2d(thin, up[..., None, None])
    torch.testing.assert_close(branch.flatten(2), (patches @ down.T @ up.T).transpose(1, 2))


def test_a_linear_layer_on_patches_has_the_same_moment_as_the_convolution() -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    with record_moments({"conv": conv}) as moments:
        conv(x)
    expected = SecondMoment(18).update(unfold_patches(x, conv)).matrix
    torch.testing.assert_close(moments["conv"].matrix, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": (2, 1), "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_patches_are_padded_as_the_convolution_pads(options) -> None:
    conv = nn.Conv2d(4, 6, (3, 5), **options).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    rows = unfold_patches(x, conv) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(rows.transpose(1, 2), conv(x).flatten(2), rtol=1e-12, atol=1e-12)


def test_an_adapted_convolution_has_the_moment_of_its_input_rows() -> None:
    layer, x = LowRankConv2d(nn.Conv2d(3, 4, 3, padding=1, stride=2).double(), 2), torch.randn(7, 3, 6, 6).double()
    with record_moments({"conv": layer}) as moments:
        layer(x)
    rows = layer.input_rows(x)
    assert moments["conv"].count == len(rows) == 7 * 9
    torch.testing.assert_close(moments["conv"].matrix, rows.T @ rows / len(rows), rtol=1e-12, atol=1e-12)


def test_many_patches_are_counted_some_images_at_a_time(monkeypatch) -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1).double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    seen = []
    monkeypatch.setattr(moments_module, "_UNFOLDED", 2 * 18 * 16)
    monkeypatch.setattr(moments_module, "unfold_patches", lambda x, c: seen.append(len(x)) or unfold_patches(x, c))
    with record_moments({"conv": conv}) as moments:
        conv(x)
        conv(x[0])  # one image without a batch axis
    assert seen == [2, 2, 1, 1] and moments["conv"].count == 6 * 16


def test_several_groups_are_refused() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(UnsupportedError, match="not defined"):
        unfold_patches(torch.randn(1, 4, 5, 5), conv)
    with (
        pytest.raises(UnsupportedError, match=r"'layer\.conv', a convolution with 2 groups"),
        record_moments({"layer.conv": conv}),
    ):
        pass


def test_numbers_that_are_not_finite_are_reported_with_the_layer() -> None:
    conv = nn.Conv2d(1, 1, 3)
    with pytest.raises(NumericError, match="input group 'stem'"), record_moments({"stem": conv}):
        conv(torch.full((1, 1, 4, 4), float("nan")))
