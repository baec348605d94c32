"""Models in float16, and quantized in every form there is, without calibration."""

from dataclasses import replace

import pytest
import torch

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.blockwise import rewrite
from optpipe.checkpoint import Checkpoint
from optpipe.linear import LARGEST, PER_TENSOR, Quantized, to_fp8

INPUT_SCALE = 0.0125732421875
"""Exact in float16."""


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """half(family) -> the tiny model in float16, which a checkpoint can hold bit by bit."""
    made = {}

    def folder(family="llama"):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            lm = model.load(Checkpoint(tiny(family))).half()
            lm.config.dtype = torch.float16
            lm.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def eight_bits(tmp_path):
    """eight_bits(folder, number=, group_size=, inputs=) -> an artifact whose blocks are so."""

    def make(folder, **form):
        layers = model.layers(Checkpoint(folder))
        planned = {
            name: before if name == "lm_head" else replace(before, bits=8, **form)
            for name, before in layers.items()
        }

        def change(name, layer, statistic):
            return layer if name == "lm_head" else eight_bit_layer(layer, planned[name])

        out = tmp_path / "eight"
        out.mkdir()
        source = Artifact(path=folder, format="hf", key="k")
        rewrite(source, out, planned, change, lambda *_: None)
        return Artifact(path=out, format="hf", key="k", lineage=("quant",))

    return make


def eight_bit_layer(layer, form):
    """Rounded to the nearest code, with scales from the largest weight."""
    largest = layer.weight.abs().amax(1, keepdim=True)
    if form.group_size == PER_TENSOR:
        largest = largest.amax(0, keepdim=True)
    scales = (largest * 1.001 / LARGEST["fp8" if form.number == "fp8" else "int8"]).half()
    numbers = layer.weight / scales.float()
    if form.number == "fp8":
        codes = to_fp8(numbers).view(torch.uint8)
    else:
        codes = (numbers.round().clamp(-128, 127) + 128).to(torch.uint8)
    quantized = Quantized(form, codes, scales)
    quantized.bias = layer.bias
    if form.static_inputs:
        quantized.input_scale = torch.tensor(INPUT_SCALE).half()
    return quantized
