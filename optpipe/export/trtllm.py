"""A unified Hugging Face checkpoint: for TensorRT-LLM from 1.3 on, which builds no engines.

The layout is that of NVIDIA's Model-Optimizer (its docs, deployment/3_unified_hf), the codes and
scales are those of our layers. Shapes: R outputs, C inputs, G scales a row. A layer NAME becomes

    W4A16_AWQ   NAME.weight (R / 2, C) uint8: rows 2i in the low and 2i + 1 in the high four bits,
                in two's complement         NAME.weight_scale (R, G) float32
                NAME.pre_quant_scale (C), ones, where the loader insists on it
    W4A8_AWQ    the same, NAME.input_scale () and NAME.weight_scale_2 (): the loader divides scales
                by it, so that codes times scales are numbers of fp8
    W8A16       NAME.weight (R, C) int8     NAME.weight_scale (R) float32
    FP8         NAME.weight (R, C) float8_e4m3fn     NAME.weight_scale () NAME.input_scale ()
    FP8_PER_CHANNEL_PER_TOKEN   the same with NAME.weight_scale (R) and no input_scale
    NVFP4       NAME.weight (R, C / 2) uint8, first code lowest     NAME.weight_scale (R, G)
                float8_e4m3fn     NAME.weight_scale_2 ()     NAME.input_scale ()
    W4A16_NVFP4 the same without input_scale
    KV cache    ATTENTION.k_proj.k_scale ()    ATTENTION.v_proj.v_scale (), for fp8

The loader joins q, k and v (gate and up), which have the scale of a layer, the global scale, in
common.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from optpipe import __version__, model
from optpipe.artifact import Artifact, Stats
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.folder import (
    DTYPES,
    KEY,
    VALUE,
    Folder,
    check_cache,
    check_dtype,
    check_head,
    check_layers,
    check_scales,
    write_json,
)
from optpipe.export.vllm import eight_bit
from optpipe.family import joined
from optpipe.linear import (
    LARGEST,
    PER_CHANNEL,
    PER_TENSOR,
    Form,
    Layers,
    Quantized,
    pack,
    weight_of,
)
from optpipe.stage import Progress, Stage

INT4, INT8, FP8, FP8_TOKEN = "W4A16_AWQ", "W8A16", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
INT4_FP8 = "W4A8_AWQ"
FP4, FP4_WEIGHTS = "NVFP4", "W4A16_NVFP4"
REQUESTS, PROMPT, NEW = 32, 128, 128
"""What bench.sh runs: requests, tokens in, tokens out."""
SERVE = """\
#!/bin/sh
# An OpenAI endpoint of this model on port 8000; more options as arguments. Room for a token after
# a prompt that fills the context of the model.
export TLLM_ALLOW_LONG_MAX_MODEL_LEN=1
exec trtllm-serve "$(dirname "$0")" --max_seq_len {length} "$@"
"""
BENCH = """\
#!/bin/sh
# {requests} requests of {prompt} tokens in and {new} out; more options as arguments.
here=$(cd "$(dirname "$0")" && pwd)
exec trtllm-bench --model optpipe --model_path "$here" throughput --backend pytorch --streaming \\
    --dataset "$here/bench.jsonl" --report_json report.json "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Trtllm(Stage):
    """Write the checkpoint, and commands that serve and measure it."""

    produces: ClassVar[str] = "trtllm"

    dtype: str = "float16"
    """Of all that is not quantized, and what it runs in: float16 or bfloat16. Int4 scales are
    float32 in the file; a runtime in bfloat16 rounds them."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def plan(self, layers: Layers) -> Layers:
        check_layers(layers, "TensorRT-LLM", algorithm)
        check_head(layers)
        told = common_algorithm(layers) or {"quant_algo": FP8}
        if told["quant_algo"] != FP8 and any(name.endswith(".qkv_proj") for name in layers):
            # its Phi-3 cuts the rows of floats, and knows only scales of whole layers
            raise ValueError(f"TensorRT-LLM splits no fused qkv_proj of {told['quant_algo']}")
        return layers

    def inputs(self, model: Checkpoint) -> None:
        if model.decoder.transposed:
            raise InputError(f"TensorRT-LLM has no family '{model.decoder.family}' any more")

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        check_cache(number_after(earlier, model), "TensorRT-LLM")

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers = model.layers(checkpoint)
        self.follow([], checkpoint)
        fp8 = checkpoint.cache is not None
        told = common_algorithm(layers) or {"quant_algo": None}
        told["kv_cache_quant_algo"] = FP8 if fp8 else None
        plain = not any(told.values())
        folder = Folder(checkpoint=checkpoint, out=out, dtype=self.dtype, cache=cache_scale)
        settings = None if plain else _quantization_config(layers, told)
        check_scales(checkpoint, layers)
        second = second_scales(checkpoint, layers)
        inner = {name for names in joined(layers) for name in names}

        def tensors(name: str, layer: Quantized) -> dict[str, Tensor]:
            found = encode(name, layer)
            if name in second:
                found[f"{name}.weight_scale_2"] = second[name]
            if layer.form.number == "int" and layer.form.bits == 4 and name not in inner:
                ones = torch.ones(layer.form.cols, dtype=DTYPES[self.dtype])
                found[f"{name}.pre_quant_scale"] = ones
            return found

        folder.write(tensors, settings, progress)
        if not plain:
            write_json(out / "hf_quant_config.json", _hf_quant_config(layers, told))
        _write_commands(checkpoint, out)
        return {"dtype": self.dtype, **told}


def algorithm(form: Form) -> dict[str, Any]:
    """How TensorRT-LLM calls layers of this form. Raises ValueError if it has none."""
    if (form.number, form.inputs, form.group_size) == ("fp8", "fp8_tensor", PER_TENSOR):
        return {"quant_algo": FP8}
    if (form.number, form.inputs, form.group_size) == ("fp8", "fp8_token", PER_CHANNEL):
        return {"quant_algo": FP8_TOKEN}
    if form.number == "nvfp4":
        name = FP4_WEIGHTS if form.inputs is None else FP4
        return {"quant_algo": name, "group_size": form.group_size}
    if form.number == "int" and form.inputs not in (None, "fp8_tensor"):
        raise ValueError(
            "TensorRT-LLM from 1.3 on multiplies no int8 activations; export=vllm does, and int8 "
            "weights alone work here"
            if form.inputs and form.inputs.startswith("int8")
            else "TensorRT-LLM rounds inputs of int4 weights to fp8 by one scale for the layer "
            f"(activations=tensor), got {form.inputs}"
        )
    weights = form.symmetric and form.number == "int"
    if weights and (form.bits, form.group_size, form.inputs) == (8, PER_CHANNEL, None):
        return {"quant_algo": INT8}
    if weights and form.bits == 4 and form.group_size > 0 and form.rows % 2 == 0:
        return {
            "quant_algo": INT4 if form.inputs is None else INT4_FP8,
            "group_size": form.group_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
        }
    raise ValueError(
        "TensorRT-LLM loads symmetric int4 in groups, int8 by channel, fp8 by layer with fp8_tensor"
        f" inputs or by channel with fp8_token inputs, nvfp4; got {form.bits}-bit {form.number}, "
        f"group_size={form.group_size}, symmetric={form.symmetric}, inputs={form.inputs}"
    )


def common_algorithm(layers: Layers) -> dict[str, Any] | None:
    """That of all quantized layers; None if there are none. Raises ValueError if they differ."""
    found: dict[str, Any] | None = None
    for name, form in layers.items():
        if form.bits is None:
            continue
        own = algorithm(form)
        if found not in (None, own):
            raise ValueError(f"one checkpoint has one format: '{name}' is {own}, others {found}")
        found = own
    return found


def _excluded(layers: Layers) -> list[str]:
    return sorted([*(name for name, form in layers.items() if form.bits is None), EMBEDDING])


EMBEDDING = "model.embed_tokens"


def _hf_quant_config(layers: Layers, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "producer": {"name": "optpipe", "version": __version__},
        "quantization": {
            **told,
            "exclude_modules": _excluded(layers),
        },
    }


def _quantization_config(layers: Layers, told: dict[str, Any]) -> dict[str, Any]:
    """The same in config.json, in the words of compressed-tensors where it has them."""
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": told.get("group_size")}
    both = {FP8: eight, FP4: four}.get(told["quant_algo"])
    group = {"input_activations": both, "weights": both, "targets": ["Linear"]}
    return {
        **({"config_groups": {"group_0": group}} if both else {}),
        **({"kv_cache_scheme": eight} if told["kv_cache_quant_algo"] else {}),
        "ignore": _excluded(layers),
        **({"quant_algo": told["quant_algo"]} if told["quant_algo"] else {}),
        "producer": {"name": "optpipe", "version": __version__},
        "quant_method": "modelopt",
    }


def encode(name: str, layer: Quantized) -> dict[str, Tensor]:
    """The tensors of a quantized layer, ``pre_quant_scale`` aside."""
    scales, kind = layer.scales.float(), algorithm(layer.form)["quant_algo"]
    if kind in (INT4, INT4_FP8):
        nibbles = layer.codes ^ 8  # code - 8 in two's complement of four bits
        packed = nibbles[0::2] | (nibbles[1::2] << 4)
        found = {f"{name}.weight": packed, f"{name}.weight_scale": scales}
    elif kind in (FP4, FP4_WEIGHTS):
        assert layer.global_scale is not None
        found = {f"{name}.weight": pack(layer.codes, 4), f"{name}.weight_scale": layer.scales}
        found[f"{name}.weight_scale_2"] = layer.global_scale.reshape(())
    else:
        found = {f"{name}.weight": eight_bit(layer)}
        found[f"{name}.weight_scale"] = scales.reshape(()) if kind == FP8 else scales[:, 0]
    if layer.input_scale is not None:
        found[f"{name}.input_scale"] = layer.input_scale.float().reshape(())
    return found


def second_scales(checkpoint: Checkpoint, layers: Layers) -> dict[str, Tensor]:
    """Of int4 weights that meet fp8 inputs, the number that puts the largest weight at 448.

    The loader wants one for layers that it joins.
    """
    found: dict[str, Tensor] = {}
    for name, form in layers.items():
        if (form.number, form.inputs) == ("int", "fp8_tensor"):
            weight = weight_of(model.layer(name, checkpoint.forms or {}, checkpoint))
            found[name] = weight.abs().amax() / LARGEST["fp8"]
    for names in joined(found):
        largest = torch.stack([found[name] for name in names]).max()
        found |= {name: largest.clone() for name in names}  # files share no memory
    return found


def cache_scale(attention: str, part: str, scale: float) -> dict[str, Tensor]:
    """The tensor that holds one scale of an fp8 cache, beside the layer that makes the keys."""
    layer = {KEY: "k_proj", VALUE: "v_proj"}[part]
    return {f"{attention}.{layer}.{part}": torch.tensor(scale)}


def _write_commands(checkpoint: Checkpoint, out: Path) -> None:
    decoder = checkpoint.decoder
    prompt = min(PROMPT, decoder.context // 2)
    new = min(NEW, decoder.context - prompt)
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({
            "task_id": index,
            "input_ids": rng.integers(0, decoder.vocab, prompt).tolist(),
            "output_tokens": new,
        })
        for index in range(REQUESTS)
    ]  # fmt: skip
    (out / "bench.jsonl").write_text("\n".join(lines) + "\n")
    scripts = {
        "serve.sh": SERVE.format(length=decoder.context + 1),
        "bench.sh": BENCH.format(requests=REQUESTS, prompt=prompt, new=new),
    }
    for name, text in scripts.items():
        (out / name).write_text(text)
        (out / name).chmod(0o755)
