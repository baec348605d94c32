"""Checkpoints for vLLM and TensorRT-LLM read back: the weights that their tensors stand for.

How each stores a layer is said where it is written, in vllm.py and trtllm.py. Shapes: R outputs,
C inputs, G scales a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from optpipe import microscaling
from optpipe.checkpoint import Checkpoint
from optpipe.export.folder import KEY, VALUE
from optpipe.linear import Form, Layers, unpack

BESIDE = ("weight_scale", "weight_shape", "weight_scale_2", "weight_global_scale",
          "pre_quant_scale")  # fmt: skip
"""Parts of a layer that say what its codes stand for."""
CACHED = (".k_proj", ".v_proj")


def read(folder: Path, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the plain model, quantized weights as float32 codes times scales.

    The scales of inputs too, as LAYER.input_scale, and of an 8-bit cache, as ATTENTION.k_scale.
    """
    stored = Checkpoint(folder)
    for name in stored.files:
        layer, _, part = name.rpartition(".")
        tensor = stored.get(name)
        assert tensor is not None
        if part in ("weight", "weight_packed") and f"{layer}.weight_scale" in stored.files:
            yield f"{layer}.weight", _weight(stored, layer, tensor, layers[layer])
        elif part == "input_scale":
            yield name, tensor.reshape(1)
        elif part == "input_global_scale":
            yield f"{layer}.input_scale", 1 / tensor
        elif part in (KEY, VALUE):
            owner = layer.rpartition(".")[0] if layer.endswith(CACHED) else layer
            yield f"{owner}.{part}", tensor
        elif part not in BESIDE:
            yield name, tensor


def _weight(stored: Checkpoint, layer: str, codes: Tensor, form: Form) -> Tensor:
    """Codes as they are stored, times all that is stored beside them, (R, C)."""
    assert form.bits is not None
    scales, smaller, inverse, before = (
        stored.get(f"{layer}.{part}")
        for part in ("weight_scale", "weight_scale_2", "weight_global_scale", "pre_quant_scale")
    )
    assert scales is not None
    if form.number == "nvfp4":
        whole = smaller if inverse is None else 1 / inverse.reshape(())
        numbers = microscaling.numbers(unpack(codes, form.bits, form.cols), form.number)
        return scaled(numbers, microscaling.steps(scales, whole))
    if codes.dtype == torch.int32:
        wide = unpack(codes.view(torch.uint8), form.bits, form.cols).to(torch.int16)
        codes = wide - int(2 ** (form.bits - 1))
    elif codes.dtype == torch.uint8:
        codes = signed(codes)
    weight = scaled(codes, scales)
    return weight if before is None else weight * before.float()


def scaled(codes_RC: Tensor, scale: Tensor) -> Tensor:
    """Codes times scales (R, G), (R), or one; float32."""
    grouped = scale.float() if scale.dim() == 2 else scale.float().reshape(-1, 1)
    wide = codes_RC.float().reshape(codes_RC.shape[0], grouped.shape[1], -1)
    weight: Tensor = wide * grouped.unsqueeze(-1)
    return weight.reshape(codes_RC.shape)


def signed(packed: Tensor) -> Tensor:
    """Bytes (R / 2, C) to integers from -8 to 7, (R, C)."""
    both = torch.stack([packed & 15, packed >> 4], dim=1).to(torch.int16)
    both = both - 16 * (both > 7).to(torch.int16)
    return both.reshape(-1, packed.shape[1])
