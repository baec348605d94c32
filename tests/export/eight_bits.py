"""Layers in 8 bits by rounding, for tests and for the script that runs on a GPU."""

import torch

from optpipe.blockwise import largest_of
from optpipe.linear import LARGEST, PER_TENSOR, Quantized
from optpipe.microscaling import to_fp8

INPUT_SCALE = 0.0125732421875
"""Exact in float16."""


def eight_bit_layer(layer, form, input_scale=INPUT_SCALE):
    """Rounded to the nearest code, with scales from the largest weight."""
    largest = layer.weight.abs().amax(1, keepdim=True)
    if form.group_size == PER_TENSOR:
        joint = largest_of(layer)
        largest = (largest.amax() if joint is None else joint).reshape(1, 1)
    scales = (largest / LARGEST["fp8" if form.number == "fp8" else "int8"]).half()
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # rows of all but zeros
    numbers = layer.weight / scales.float()
    if form.number == "fp8":
        codes = to_fp8(numbers).view(torch.uint8)
    else:
        codes = (numbers.round().clamp(-128, 127) + 128).to(torch.uint8)
    quantized = Quantized(form, codes, scales)
    quantized.bias = layer.bias
    if form.static_inputs:
        quantized.input_scale = torch.tensor(input_scale).half()
    return quantized
