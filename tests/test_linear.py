"""The forms of a layer: packing, and back from disk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optpipe.linear import (
    INPUTS,
    Form,
    LowRank,
    Quantized,
    decode,
    dense,
    encode,
    pack,
    round_inputs,
    unpack,
)
from optpipe.microscaling import to_fp8


@given(
    bits=st.integers(1, 8), rows=st.integers(1, 4), cols=st.integers(1, 40), seed=st.integers(0, 9)
)
def test_packing_takes_exactly_the_bits_and_comes_back(bits, rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-cols * bits // 8))
    assert torch.equal(unpack(packed, bits, cols), codes)


def test_low_bits_come_first():
    assert pack(torch.tensor([[0x1, 0xF, 0x2]]), 4).tolist() == [[0xF1, 0x02]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]]), 1).tolist() == [[1, 1]]
    assert pack(torch.tensor([[0b001, 0b010, 0b100]]), 3).tolist() == [[0b00010001, 0b1]]


def back(module, form, dtype=torch.float16):
    return decode("x", form, encode("x", module, form, dtype).get)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_quantized_layer_comes_back_and_multiplies_as_its_formula_says(bits, symmetric, masked):
    form = Form(rows=6, cols=64, bits=bits, group_size=32, symmetric=symmetric,
                pattern="row" if masked else None)  # fmt: skip
    layer = Quantized(form, torch.randint(2**bits, (6, 64)), torch.rand(6, 2) + 0.1)
    layer.zeros = None if symmetric else torch.randint(2**bits, (6, 2)).to(torch.uint8)
    layer.mask = torch.rand(6, 64) < 0.5 if masked else None
    layer.bias = torch.randn(6).half()
    zeros = torch.full((6, 2), 2 ** (bits - 1)) if symmetric else layer.zeros
    spread = [t.float().repeat_interleave(32, 1) for t in (zeros, layer.scales)]
    weight = (layer.codes.float() - spread[0]) * spread[1]
    x = torch.randn(3, 64)
    for one in (layer, back(layer, form)):
        torch.testing.assert_close(one(x), x @ weight.T + layer.bias.float())
        assert (one.mask is None) or torch.equal(one.mask, layer.mask)


@pytest.mark.parametrize("group_size", [16, 64, -1, 0])
@pytest.mark.parametrize("inputs", [None, *INPUTS])
def test_an_fp8_layer_comes_back_and_multiplies_as_torch_s_own_type_does(group_size, inputs):
    form = Form(rows=6, cols=64, bits=8, number="fp8", group_size=group_size, inputs=inputs)
    weight = (40 * torch.randn(6, 64)).to(torch.float8_e4m3fn)
    scales = torch.rand(1 if group_size == 0 else 6, form.groups).half() + 0.1
    layer = Quantized(form, weight.view(torch.uint8), scales)
    layer.bias = torch.randn(6).half()
    layer.input_scale = torch.tensor(0.03).half() if form.static_inputs else None
    if inputs == "nvfp4_block":
        layer.input_scale = torch.tensor(0.001)
    x = torch.randn(2, 3, 64)
    wide = weight.float() * scales.float().repeat_interleave(64 // form.groups, 1)
    rounded = x if inputs is None else round_inputs(x, inputs, layer.input_scale)
    stored = encode("x", layer, form, torch.float16)
    bits = sum(t.numel() * t.element_size() * 8 for n, t in stored.items() if n != "x.bias")
    assert bits == form.stored_bits()
    for one in (layer, decode("x", form, stored.get)):
        torch.testing.assert_close(one(x), rounded @ wide.T + layer.bias.float())
        assert one.form == form


@given(st.integers(0, 2**16 - 1))
def test_every_half_becomes_the_nearest_fp8(bits):
    """Against a search through all numbers; even ones win ties."""
    x = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    if not torch.isfinite(x):
        return
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    gaps = (numbers - x.clamp(-448, 448)).abs().nan_to_num(float("inf"))
    nearest = (gaps == gaps.min()).nonzero().flatten()
    assert to_fp8(x).view(torch.uint8).item() in [
        c for c in nearest if len(nearest) == 1 or c % 2 == 0
    ]


@given(
    inputs=st.sampled_from([i for i in INPUTS if not i.endswith("block")]),
    seed=st.integers(0, 20),
    size=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_inputs_are_rounded_to_the_nearest_multiple_of_their_scale(inputs, seed, size):
    x = size * torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    top = 127 if inputs.startswith("int8") else 448
    scale = x.abs().amax() / top if inputs.endswith("tensor") else x.abs().amax(-1, True) / top
    scale = scale + (scale == 0)
    if top == 127:
        expected = torch.fake_quantize_per_tensor_affine(x / scale, 1.0, 0, -128, 127) * scale
    else:
        expected = (x / scale).to(torch.float8_e4m3fn).float() * scale  # none is beyond 448
    got = round_inputs(x, inputs, scale if inputs.endswith("tensor") else None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_inputs_beyond_the_scale_saturate():
    x = torch.tensor([[-1e4, -3.0, 0.5, 1.5, 2.5, 1e4]])
    int8 = round_inputs(x, "int8_tensor", torch.tensor(1.0))
    assert int8.tolist() == [[-128.0, -3.0, 0.0, 2.0, 2.0, 127.0]]
    assert round_inputs(x, "fp8_tensor", torch.tensor(1.0)).tolist() == [
        [-448, -3, 0.5, 1.5, 2.5, 448]
    ]


@pytest.mark.parametrize("masked", [True, False])
def test_a_dense_or_sparse_layer_comes_back_bit_by_bit(masked):
    mask = torch.rand(5, 19) < 0.3 if masked else None
    weight = torch.randn(5, 19).half()
    layer = dense(weight if mask is None else weight * mask, torch.randn(5).half(), mask)
    form = Form(rows=5, cols=19, pattern="row" if masked else None)
    stored = encode("x", layer, form, torch.float16)
    assert ("x.weight" in stored) != masked
    again = decode("x", form, stored.get)
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)
    if masked:
        assert stored["x.values"].numel() == int(mask.sum())
        bits = sum(t.numel() * t.element_size() * 8 for n, t in stored.items() if "bias" not in n)
        expected = form.stored_bits(16, float(mask.float().mean()))
        assert abs(bits - expected) < 8 * 5  # rows of the mask are padded to bytes


def test_low_rank_is_the_product_of_its_factors():
    right, left = torch.randn(3, 8), torch.randn(5, 3)
    layer = LowRank(dense(right, None), dense(left, torch.ones(5)))
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), x @ (left @ right).T + 1)
