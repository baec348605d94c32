"""Compressed checkpoints made by hand, so that these tests stand on no method of ours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for fake_builder.py

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.linear import Form, Quantized, encode


def round_to_nearest(weight, bits, group_size, symmetric, inputs=None):
    rows, cols = weight.shape
    groups = weight.reshape(rows, -1, cols if group_size == -1 else group_size)
    top = 2**bits - 1
    if symmetric:
        scales = (groups.abs().amax(-1) / (top // 2)).half()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None].float()
    form = Form(
        rows=rows, cols=cols, bits=bits, group_size=group_size, symmetric=symmetric, inputs=inputs
    )
    module = Quantized(form, codes.clamp(0, top).reshape(rows, cols), scales)
    module.zeros = None if symmetric else zeros.to(torch.uint8)
    return module


def float8(weight, group_size, inputs):
    rows, cols = weight.shape
    width = {-1: cols, 0: rows * cols}.get(group_size, group_size)
    groups = weight.reshape(-1, width)
    scales = (groups.abs().amax(-1, True) / 448).half()
    scales[scales == 0] = 1
    codes = (groups / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    form = Form(rows=rows, cols=cols, bits=8, number="fp8", group_size=group_size, inputs=inputs)
    scales = scales.reshape(1 if group_size == 0 else rows, -1)
    return Quantized(form, codes.view(torch.uint8).reshape(rows, cols), scales)


def scale_inputs(module, largest=4.0):
    """Where the form wants a scale beforehand; a few inputs are beyond it."""
    if module.form.static_inputs:
        top = 127 if module.form.inputs.startswith("int8") else 448
        module.input_scale = torch.tensor(largest / top).half()
    return module


def factors(weight, rank):
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return {"right": s[:rank, None] * v[:rank], "left": u[:, :rank].contiguous()}


@pytest.fixture
def compressed(tmp_path):
    """compressed(folder, bits, group_size, symmetric, number, inputs) -> folder of the result.

    The last layer of each MLP becomes two quantized factors of rank 32; the head is quantized.
    """

    def make(folder, bits, group_size, symmetric, number="int", inputs=None):
        source, out = Checkpoint(folder), tmp_path / "compressed"
        out.mkdir()
        lm, writer, forms = model.load(source), Writer(out, source), {}

        def add(name, weight, bias):
            if number == "fp8":
                module = float8(weight, group_size, inputs)
            else:
                module = round_to_nearest(weight, bits, group_size, symmetric, inputs)
            module = scale_inputs(module)
            module.bias = bias
            forms[name] = module.form
            writer.add(name, encode(name, module, module.form, source.dtype))

        for block in source.decoder.blocks:
            for name in block.linears:
                layer = lm.get_submodule(name)
                if name != block.mlp_out:
                    add(name, layer.weight, layer.bias)
                    continue
                parts = factors(layer.weight, 32)
                add(f"{name}.right", parts["right"], None)
                add(f"{name}.left", parts["left"], layer.bias)
        head = source.decoder.head
        add(head, lm.get_submodule(head).weight, None)
        replaced = {n for b in source.decoder.blocks for n in b.linears} | {head}
        rest = {n: source.get(n) for n in source.files if n.rpartition(".")[0] not in replaced}
        writer.add("rest", rest)
        writer.close(forms)
        return out

    return make
