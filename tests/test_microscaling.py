"""Blocks with short scales, against ml_dtypes, compressed-tensors and, on request, modelopt."""

import os

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optpipe import microscaling
from optpipe.linear import Form, Quantized, decode, encode, round_inputs
from optpipe.microscaling import BITS, BLOCK
from optpipe.quant.clip import fit_clip
from optpipe.quant.grid import fit

SIZES = st.sampled_from([1e-6, 1e-3, 0.02, 1.0, 50.0])


def form(number, rows=6, cols=64, **more):
    return Form(rows=rows, cols=cols, bits=BITS[number], number=number,
                group_size=BLOCK[number], **more)  # fmt: skip


def random(seed, size=1.0, rows=6, cols=64):
    return size * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def quantized(weight, number):
    grid = fit(weight, form(number, *weight.shape))
    return grid.module(grid.encode(weight), nn.Linear(*weight.shape[::-1], bias=False)), grid


def test_every_half_becomes_the_code_that_ml_dtypes_gives_it():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    every = every[every.view(np.uint32) != 1 << 31]  # our zero has no sign
    expected = every.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = microscaling.encode(torch.from_numpy(every), "nvfp4")
    assert np.array_equal(codes.numpy(), expected)
    expected = every.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    codes = microscaling.encode(torch.from_numpy(every), "mxfp8")
    assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("number, dtype", [
    ("nvfp4", ml_dtypes.float4_e2m1fn), ("mxfp8", ml_dtypes.float8_e4m3fn),
])  # fmt: skip
def test_codes_say_what_ml_dtypes_says(number, dtype):
    codes = np.arange(2 ** BITS[number], dtype=np.uint8)
    ours = microscaling.numbers(torch.from_numpy(codes), number).numpy()
    assert np.array_equal(ours, codes.view(dtype).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("seed, size", [(0, 1e-4), (1, 0.02), (2, 1.0), (3, 50.0)])
def test_nvfp4_is_that_of_compressed_tensors_bit_by_bit(seed, size):
    """Codes, scales of blocks and the global one, which is stored there as its inverse."""
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    schemes = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    weight = random(seed, size, 32, 256)
    inverse = helpers.generate_gparam(weight.amin(), weight.amax())
    scheme = schemes.QuantizationScheme(targets=["Linear"], **schemes.NVFP4)
    blocks = weight.reshape(32, 16, 16)
    scales, _ = helpers.calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=inverse
    )
    state = {"weight": weight, "weight_scale": scales, "weight_global_scale": inverse}
    theirs = nvfp4.NVFP4PackedCompressor.compress(state, scheme)
    ours, _ = quantized(weight, "nvfp4")
    torch.testing.assert_close(1 / ours.global_scale, inverse[0], rtol=1e-6, atol=0)
    assert torch.equal(ours.scales.view(torch.uint8), theirs["weight_scale"].view(torch.uint8))
    packed = encode("x", ours, ours.form, torch.float16)["x.codes"]
    assert torch.equal(packed, theirs["weight_packed"])


@settings(deadline=None)
@given(seed=st.integers(0, 20), size=SIZES)
def test_mxfp8_has_the_least_power_of_two_that_holds_the_largest(seed, size):
    weight = random(seed, size)
    ours, _ = quantized(weight, "mxfp8")
    scales, largest = ours.scales.double(), weight.reshape(6, 2, 32).double().abs().amax(-1)
    assert ours.scales.dtype == torch.float8_e8m0fnu
    assert (largest <= 448 * scales).all() and (largest > 224 * scales).all()
    spread = scales.repeat_interleave(32, 1)
    expected = (weight / spread).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(ours.dequantize().double().numpy(), expected * spread.numpy())


def test_powers_of_two_are_their_own_scale():
    for exponent in (-20, -1, 0, 5):
        largest = torch.tensor([448 * 2.0**exponent, 448.5 * 2.0**exponent])
        scales = microscaling.block_scales(largest, "mxfp8", None).float()
        assert scales.tolist() == [2.0**exponent, 2.0 ** (exponent + 1)]


@pytest.mark.parametrize("number", BLOCK)
def test_zeros_and_what_is_far_below_the_largest(number):
    weight = random(0)
    weight[2] *= 1e-9
    weight[:, :32] = 0
    module, _ = quantized(weight, number)
    assert not module.dequantize()[:, :32].any() and torch.isfinite(module.dequantize()).all()
    assert (module.scales.float()[0, : 32 // BLOCK[number]] == 1).all()
    assert not quantized(torch.zeros(2, 32), number)[0].dequantize().any()


@pytest.mark.parametrize("number", BLOCK)
@pytest.mark.parametrize("inputs", [None, "fp8_tensor", "nvfp4_block", "mxfp8_block"])
def test_a_layer_comes_back_multiplies_as_its_formula_says_and_takes_its_bits(number, inputs):
    weight = random(1)
    grid = fit(weight, form(number, inputs=inputs))
    layer = grid.module(grid.encode(weight), nn.Linear(64, 6).half())
    static = {"fp8_tensor": torch.tensor(0.03).half(), "nvfp4_block": torch.tensor(0.001)}
    layer.input_scale = static.get(inputs)
    stored = encode("x", layer, layer.form, torch.float16)
    bits = sum(t.numel() * t.element_size() * 8 for n, t in stored.items() if n != "x.bias")
    assert bits == layer.form.stored_bits()
    weights, extra = 6 * 64, layer.form.other_bits
    assert (bits - extra) / weights == {"nvfp4": 4.5, "mxfp8": 8.25}[number]
    x = random(2)
    rounded = x if inputs is None else round_inputs(x, inputs, layer.input_scale)
    for one in (layer, decode("x", layer.form, stored.get)):
        torch.testing.assert_close(one(x), rounded @ layer.dequantize().T + layer.bias.float())
        assert one.scales.dtype == microscaling.SCALE[number]


@settings(deadline=None)
@given(seed=st.integers(0, 20), size=SIZES, number=st.sampled_from([*BLOCK]))
def test_inputs_are_rounded_as_a_weight_with_the_same_global_scale(seed, size, number):
    x = random(seed, size)
    largest = 2 * x.abs().amax()
    whole = microscaling.global_scale(largest) if number == "nvfp4" else None
    grid = fit(x, form(number), largest)
    expected = grid.decode(grid.encode(x))
    assert torch.equal(round_inputs(x, f"{number}_block", whole), expected)
    half = round_inputs(x.half(), f"{number}_block", whole)
    assert half.dtype == torch.half


@settings(deadline=None)
@given(seed=st.integers(0, 20))
def test_an_input_beyond_the_global_scale_saturates(seed):
    x = random(seed)
    whole = microscaling.global_scale(x.abs().amax() / 8)
    got = round_inputs(x, "nvfp4_block", whole)
    assert got.abs().amax() <= 6 * 448 * whole * (1 + 1e-6)
    assert (got * x >= 0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10), number=st.sampled_from([*BLOCK]))
def test_a_searched_scale_never_costs_more_and_keeps_the_global_one(seed, number):
    weight = random(seed)
    plain, searched = (fit_clip(weight, form(number), clip) for clip in ("minmax", "mse"))
    errors = [
        (g.decode(g.encode(weight)) - weight).square().reshape(6, -1, BLOCK[number]).sum(-1)
        for g in (plain, searched)
    ]
    assert (errors[1] <= errors[0]).all()
    if number == "nvfp4":
        assert errors[1].sum() < 0.95 * errors[0].sum()
        assert torch.equal(plain.global_scale, searched.global_scale)


@pytest.mark.parametrize("number", BLOCK)
def test_columns_one_by_one_get_the_same_codes(number):
    weight = random(3)
    module, grid = quantized(weight, number)
    codes, fixed = zip(*(grid.column(weight[:, c], c) for c in range(64)), strict=True)
    assert torch.equal(torch.stack(codes, 1), module.codes)
    assert torch.equal(torch.stack(fixed, 1), module.dequantize())
    assert isinstance(module, Quantized)


def test_codes_and_scales_are_those_of_modelopt():
    """Its import takes half a minute; set OPTPIPE_MODELOPT=1."""
    if os.environ.get("OPTPIPE_MODELOPT") != "1":
        pytest.skip("slow: the import of modelopt alone takes half a minute")
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor")
    for seed, size in ((0, 0.02), (1, 1.0), (2, 50.0)):
        weight = random(seed, size, 32, 256)
        weight[3, 16:32] = 0
        theirs, scales, whole = modelopt.NVFP4QTensor.quantize(weight.clone(), 16)
        ours, _ = quantized(weight, "nvfp4")
        assert torch.equal(ours.global_scale, whole)
        assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8))
        packed = encode("x", ours, ours.form, torch.float16)["x.codes"]
        assert torch.equal(packed, theirs._quantized_data)
        again = theirs.dequantize(torch.float32, scale=scales, double_scale=whole,
                                  block_sizes={-1: 16})  # fmt: skip
        assert torch.equal(again, ours.dequantize())
        theirs, scales = modelopt.MXFP8QTensor.quantize(weight)
        ours, _ = quantized(weight, "mxfp8")
        assert torch.equal(ours.scales.view(torch.uint8), scales)
        assert torch.equal(ours.codes.view(torch.float8_e4m3fn).float(),
                           theirs._quantized_data.float())  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("number", BLOCK)
def test_a_gpu_gives_the_same_bits(number):
    weight, x = random(4), random(5)
    whole = torch.tensor(0.001) if number == "nvfp4" else None
    made = []
    for device in ("cpu", "cuda"):
        moved = weight.to(device)
        grid = fit_clip(moved, form(number), "mse")
        module = grid.module(grid.encode(moved), nn.Linear(64, 6, bias=False)).to(device)
        rounded = round_inputs(x.to(device), f"{number}_block", whole)
        codes, _ = grid.column(moved[:, 17], 17)
        made.append([
            module.codes, module.scales.view(torch.uint8), module.dequantize(), rounded, codes
        ])  # fmt: skip
    assert all(torch.equal(one, other.cpu()) for one, other in zip(*made, strict=True))
