"""A compressed-tensors checkpoint: for vLLM, and for transformers with that library installed.

The codes and scales are the very ones of the layers; nothing is rounded again. Shapes: R outputs,
C inputs, G scales a row. A layer NAME of integer weights alone ("pack-quantized") becomes

    NAME.weight_packed (R, C * bits / 32) int32, first code in the lowest bits
    NAME.weight_scale (R, G) float16    NAME.weight_shape (2) int64

https://github.com/vllm-project/compressed-tensors, docs of the formats; checked against 0.17.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.folder import Folder, check_dtype, check_layers
from optpipe.linear import PER_CHANNEL, Form, Layers, Quantized, pack, unpack
from optpipe.stage import Progress, Stage

VERSION = "0.17.0"
"""Of the format."""
PACKED = "pack-quantized"


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

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        settings = quantization(model.layers(checkpoint))
        Folder(checkpoint=checkpoint, out=out, dtype=self.dtype).write(encode, settings, progress)
        return {"dtype": self.dtype, "layout": settings and settings["format"]}


def scheme(form: Form) -> dict[str, Any]:
    """The entry of config_groups for layers of this form, ``targets`` aside. Raises ValueError."""
    if form.bits not in (4, 8):
        raise ValueError(f"vLLM has fast kernels for 4 and 8 bits, not for {form.bits}")
    if not form.symmetric:
        raise ValueError("the checkpoint for vLLM holds no zero points; set symmetric=true")
    per_code = 32 // form.bits
    if form.cols % per_code:
        raise ValueError(f"{form.cols} inputs do not fill words of {per_code} codes")
    return {"weights": _numbers(form), "input_activations": None, "format": PACKED}


def _numbers(form: Form) -> dict[str, Any]:
    grouped = form.group_size != PER_CHANNEL
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": form.group_size if grouped else None,
        "dynamic": False,
    }


def quantization(layers: Layers) -> dict[str, Any] | None:
    """The quantization_config of these layers; None if all are dense.

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
    if not kinds:
        return None
    only = len(kinds) == 1
    formats = {kind["format"] for kind, _ in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {
            f"group_{index}": {**kind, "targets": ["Linear"] if only else names}
            for index, (kind, names) in enumerate(kinds)
        },
        "ignore": [name for name, form in layers.items() if form.bits is None],
        "kv_cache_scheme": None,
    }


def encode(name: str, layer: Quantized) -> dict[str, Tensor]:
    """The tensors of a quantized layer."""
    form = layer.form
    assert form.bits is not None
    return {
        f"{name}.weight_packed": pack(layer.codes, form.bits).view(torch.int32),
        f"{name}.weight_scale": layer.scales,
        f"{name}.weight_shape": torch.tensor([form.rows, form.cols]),
    }


def read(folder: Path, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the plain model, quantized weights as float32 codes times scales."""
    stored = Checkpoint(folder)
    for name in stored.files:
        layer, _, part = name.rpartition(".")
        tensor = stored.get(name)
        assert tensor is not None
        if part == "weight_packed":
            scale = stored.get(f"{layer}.weight_scale")
            assert scale is not None
            yield f"{layer}.weight", _decode(tensor, scale, layers[layer])
        elif part not in ("weight_scale", "weight_shape"):
            yield name, tensor


def _decode(packed: Tensor, scale_RG: Tensor, form: Form) -> Tensor:
    assert form.bits is not None
    codes_RC = unpack(packed.view(torch.uint8), form.bits, form.cols).float()
    grouped = (codes_RC - 2 ** (form.bits - 1)).reshape(form.rows, scale_RG.shape[1], -1)
    return (grouped * scale_RG.float().unsqueeze(-1)).reshape(form.rows, form.cols)
