"""Grids against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe.linear import Form
from optpipe.quant.grid import fit
from optpipe.quant.rtn import Rtn

FORMS = st.builds(
    Form, rows=st.just(6), cols=st.just(64), bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, -1]), symmetric=st.booleans(),
)  # fmt: skip


def dequantized(weight, form):
    grid = fit(weight, form)
    return grid.module(grid.encode(weight), torch.nn.Linear(64, 6, bias=False)).dequantize(), grid


@settings(deadline=None)
@given(form=FORMS, seed=st.integers(0, 20), scale=st.sampled_from([1e-5, 1e-3, 0.02, 1.0, 50.0]))
def test_no_weight_moves_further_than_half_a_step(form, seed, scale):
    weight = scale * torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    rounded, grid = dequantized(weight, form)
    step = grid.scales_RG.float().repeat_interleave(64 // form.groups, 1)
    assert ((rounded - weight).abs() <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("std", [1e-1, 1e-3, 1e-4])
def test_small_weights_lose_no_more_than_large_ones(std):
    """Their scales are subnormal in float16, and must not be lifted to the normal ones."""
    weight = std * torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rounded, _ = dequantized(weight, Form(rows=6, cols=64, bits=8))
    assert (rounded - weight).norm() < 0.0075 * weight.norm()


@settings(deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), symmetric=st.booleans(), seed=st.integers(0, 20))
def test_weights_on_a_grid_come_back_bit_by_bit(bits, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    codes = torch.randint(1 if symmetric else 0, top + 1, (6, 64), generator=generator)
    codes[:, 0], codes[:, 1] = top, 0 if not symmetric else 1
    weight = (codes - 2 ** (bits - 1)) * 2.0 ** torch.randint(-12, 4, (6, 1), generator=generator)
    form = Form(rows=6, cols=64, bits=bits, symmetric=symmetric)
    assert torch.equal(dequantized(weight, form)[0], weight)


@settings(deadline=None)
@given(
    group_size=st.sampled_from([16, 32, -1, 0]),
    seed=st.integers(0, 20),
    size=st.sampled_from([1e-3, 0.02, 1.0, 50.0]),
)
def test_fp8_is_torch_s_own_cast_under_the_largest_magnitude(group_size, seed, size):
    weight = size * torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    form = Form(rows=6, cols=64, bits=8, number="fp8", group_size=group_size)
    rounded, grid = dequantized(weight, form)
    width = 384 if group_size == 0 else 64 // form.groups
    scales = grid.scales_RG.float().reshape(-1, 1)
    expected = (weight.reshape(-1, width) / scales).to(torch.float8_e4m3fn).float() * scales
    assert torch.equal(rounded, expected.reshape(6, 64))
    assert (weight.reshape(-1, width).abs().amax(-1) <= 448 * scales[:, 0]).all()
    codes, fixed = zip(*(grid.column(weight[:, c], c) for c in range(64)), strict=True)
    assert torch.equal(torch.stack(codes, 1), grid.encode(weight))
    assert torch.equal(torch.stack(fixed, 1), rounded)


@settings(deadline=None)
@given(form=FORMS, seed=st.integers(0, 20))
def test_rounding_again_changes_nothing(form, seed):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    once, grid = dequantized(weight, form)
    assert torch.equal(grid.encode(once), grid.encode(weight))


@settings(deadline=None)
@given(form=FORMS, seed=st.integers(0, 20))
def test_zero_stays_zero(form, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=generator) + 0.5
    gone = torch.rand(6, 64, generator=generator) < 0.5
    rounded, _ = dequantized(weight.masked_fill(gone, 0), form)
    assert not rounded[gone].any()


def test_against_torch_fake_quantize():
    weight = torch.randn(4, 32)
    form = Form(rows=4, cols=32, bits=4, group_size=32, symmetric=False)
    grid = fit(weight, form)
    expected = torch.fake_quantize_per_channel_affine(
        weight, grid.scales_RG[:, 0].float(), grid.zeros_RG[:, 0].int(), 0, 0, 15
    )
    module = grid.module(grid.encode(weight), torch.nn.Linear(32, 4))
    torch.testing.assert_close(module.dequantize(), expected, atol=1e-6, rtol=0)


def test_group_of_zeros_and_too_large_weights():
    form = Form(rows=2, cols=64, bits=4, group_size=32)
    assert not dequantized(torch.zeros(6, 64), Form(rows=6, cols=64, bits=4))[0].any()
    with pytest.raises(ValueError, match="float16"):
        fit(torch.full((2, 64), 1e6), form)


@pytest.mark.parametrize(
    "fields", [{"number": "fp8"}, {"number": "fp8", "bits": 8, "symmetric": False}]
)
def test_fp8_has_eight_bits_and_no_zero(fields):
    with pytest.raises(ValueError, match="number=fp8 takes bits=8 and symmetric=true, got bits="):
        Rtn(**fields)


@pytest.mark.parametrize(
    "fields", [{"number": "fp4"}, {"bits": 5}, {"bits": 16}, {"group_size": 100}]
)
def test_bad_fields_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} must be one of .* got '?{value}"):
        Rtn(**fields)
