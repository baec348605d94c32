"""A compressed-tensors checkpoint: for vLLM, and for transformers with that library installed.

The codes and scales are the very ones of the layers; nothing is rounded again. Shapes: R outputs,
C inputs, G scales a row. A layer NAME becomes

    integer weights alone     NAME.weight_packed (R, C * bits / 32) int32, first code lowest
    ("pack-quantized")        NAME.weight_scale (R, G) float16    NAME.weight_shape (2) int64
    int8 with int8 inputs     NAME.weight (R, C) int8             NAME.weight_scale (R, 1) or (1)
    ("int-quantized")         [NAME.input_scale (1), unless every token has its own]
    fp8 weights, fp8 inputs   the same in float8_e4m3fn
    or none ("float-quantized")
    nvfp4 weights, inputs     NAME.weight_packed (R, C / 2) uint8, first code lowest
    in nvfp4 or as they are   NAME.weight_scale (R, G) float8_e4m3fn
    ("nvfp4-pack-quantized")  NAME.weight_global_scale (1), its inverse [NAME.input_global_scale]
    a KV cache in fp8         ATTENTION.k_scale (1)   ATTENTION.v_scale (1)

with scales of 8-bit weights and of inputs in float32, which vLLM keeps them in. Layers that vLLM
multiplies as one have one scale for a layer, or one global scale, in common.
https://github.com/vllm-project/compressed-tensors; checked against 0.17 and vLLM 0.25.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.folder import (
    Folder,
    check_cache,
    check_dtype,
    check_layers,
    check_scales,
)
from optpipe.linear import BLOCKS, PER_CHANNEL, PER_TENSOR, Form, Layers, Quantized, pack
from optpipe.microscaling import FP8
from optpipe.stage import Progress, Stage

VERSION = "0.17.0"
"""Of the format."""
CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
"""How compressed-tensors calls a KV cache in fp8 with scales known beforehand."""
PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FP4 = "nvfp4-pack-quantized"


@dataclass(frozen=True, kw_only=True)
class Vllm(Stage):
    """Write the checkpoint."""

    produces: ClassVar[str] = "vllm"

    dtype: str = "float16"
    """Of all that is not quantized, and what it runs in: float16 or bfloat16. Scales stay float16
    in the file; a runtime in bfloat16 rounds them."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def plan(self, layers: Layers) -> Layers:
        check_layers(layers, "vLLM", scheme)
        return layers

    def inputs(self, model: Checkpoint) -> None:
        if model.decoder.transposed:
            raise InputError(
                f"family '{model.decoder.family}' has Conv1D layers, which compressed-tensors does "
                "not know"
            )

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        check_cache(number_after(earlier, model), "vLLM")

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.follow([], checkpoint)
        fp8 = checkpoint.cache is not None
        layers = model.layers(checkpoint)
        check_scales(checkpoint, layers)
        settings = quantization(layers, CACHE if fp8 else None)
        folder = Folder(checkpoint=checkpoint, out=out, dtype=self.dtype, cache=cache_scale)
        folder.write(encode, settings, progress)
        return {"dtype": self.dtype, "layout": settings and settings["format"], "fp8_cache": fp8}


def scheme(form: Form) -> dict[str, Any]:
    """The entry of config_groups for layers of this form, ``targets`` aside. Raises ValueError."""
    if form.number == "nvfp4":
        return _fp4_scheme(form)
    if form.number in BLOCKS:
        raise ValueError(f"the checkpoint for vLLM has no layout of {form.number} here")
    if form.bits not in (4, 8):
        raise ValueError(f"vLLM has fast kernels for 4 and 8 bits, not for {form.bits}")
    if not form.symmetric:
        raise ValueError("the checkpoint for vLLM holds no zero points; set symmetric=true")
    if form.number == "fp8" or form.inputs is not None:
        return _eight_bit_scheme(form)
    per_code = 32 // form.bits
    if form.cols % per_code:
        raise ValueError(f"{form.cols} inputs do not fill words of {per_code} codes")
    if form.group_size == PER_TENSOR:
        raise ValueError("vLLM has no integer weights with one scale a layer; set group_size=-1")
    return {"weights": _numbers(form), "input_activations": None, "format": PACKED}


def _eight_bit_scheme(form: Form) -> dict[str, Any]:
    """Of weights that are stored as they are multiplied. Raises ValueError."""
    kind = "fp8" if form.number == "fp8" else "int8"
    if form.bits != 8 or form.group_size > 0 or (form.inputs or kind).partition("_")[0] != kind:
        raise ValueError(
            "vLLM multiplies int8 with int8 and fp8 with fp8, scaled by layer or output channel; "
            f"got {form.bits}-bit {form.number}, group_size={form.group_size}, inputs {form.inputs}"
        )
    layout = FLOAT if kind == "fp8" else INTEGER
    return {"weights": _numbers(form), "input_activations": _inputs(form), "format": layout}


def _fp4_scheme(form: Form) -> dict[str, Any]:
    """Blocks with scales of 8 bits; those of inputs are found as they come."""
    numbers = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": form.group_size,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    rounded = None if form.inputs is None else {**numbers, "dynamic": "local"}
    return {"weights": numbers, "input_activations": rounded, "format": FP4}


def _numbers(form: Form) -> dict[str, Any]:
    strategy = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(form.group_size, "group")
    return {
        "num_bits": form.bits,
        "type": "float" if form.number == "fp8" else "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": form.group_size if strategy == "group" else None,
        "dynamic": False,
    }


def _inputs(form: Form) -> dict[str, Any] | None:
    if form.inputs is None:
        return None
    number, _, per = form.inputs.partition("_")
    return {
        "num_bits": 8,
        "type": "float" if number == "fp8" else "int",
        "symmetric": True,
        "strategy": per,
        "dynamic": per == "token",
    }


def quantization(layers: Layers, cache: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The quantization_config of these layers and this cache; None if all is as it was.

    One kind of layer is named by its class, several by the names of their layers.
    """
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    for name, form in layers.items():
        if form.bits is not None:
            found = scheme(form)
            names = next((names for kind, names in kinds if kind == found), None)
            if names is None:
                kinds.append((found, names := []))
            names.append(name)
    if not kinds and cache is None:
        return None
    only = len(kinds) == 1
    formats = {kind["format"] for kind, _ in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": _layout(formats),
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {
            f"group_{index}": {**kind, "targets": ["Linear"] if only else names}
            for index, (kind, names) in enumerate(kinds)
        },
        "ignore": [name for name, form in layers.items() if form.bits is None],
        "kv_cache_scheme": cache,
    }


def _layout(formats: set[str]) -> str:
    if len(formats) > 1:
        return "mixed-precision"
    return next(iter(formats), "dense")


def encode(name: str, layer: Quantized) -> dict[str, Tensor]:
    """The tensors of a quantized layer."""
    form = layer.form
    assert form.bits is not None
    if form.number == "nvfp4":
        return _fp4(name, layer)
    if scheme(form)["format"] == PACKED:
        return {
            f"{name}.weight_packed": pack(layer.codes, form.bits).view(torch.int32),
            f"{name}.weight_scale": layer.scales,
            f"{name}.weight_shape": torch.tensor([form.rows, form.cols]),
        }
    scales = layer.scales.float()
    found = {
        f"{name}.weight": eight_bit(layer),
        f"{name}.weight_scale": scales.reshape(1) if form.group_size == PER_TENSOR else scales,
    }
    if layer.input_scale is not None:
        found[f"{name}.input_scale"] = layer.input_scale.float().reshape(1)
    return found


def _fp4(name: str, layer: Quantized) -> dict[str, Tensor]:
    assert layer.global_scale is not None
    found = {
        f"{name}.weight_packed": pack(layer.codes, 4),
        f"{name}.weight_scale": layer.scales,
        f"{name}.weight_global_scale": 1 / layer.global_scale.reshape(1),
    }
    if layer.input_scale is not None:
        found[f"{name}.input_global_scale"] = 1 / layer.input_scale.reshape(1)
    return found


def cache_scale(attention: str, part: str, scale: float) -> dict[str, Tensor]:
    """The tensor that holds one scale of an fp8 cache."""
    return {f"{attention}.{part}": torch.tensor([scale])}


def eight_bit(layer: Quantized) -> Tensor:
    """The codes as numbers: int8 or float8_e4m3fn, (R, C)."""
    if layer.form.number == "fp8":
        return layer.codes.view(FP8)
    return (layer.codes ^ 128).view(torch.int8)  # code - 128 in two's complement
