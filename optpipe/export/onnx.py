"""A decoder with KV cache as canonical ONNX: standard operators of opset 24, no tracing.

The emitter walks the description of the model (:mod:`optpipe.family`) and streams one weight at a
time from the checkpoint to the file. The form is the one that every runtime computes alike: a
static-capacity cache written by TensorScatter, Attention with an explicit boolean mask made from
``position_ids`` (TensorRT's parser ignores ``nonpad_kv_seqlen`` and reads ``is_causal`` as
upper-left, without a warning), quantized weights as DequantizeLinear of their codes, rounded
inputs as QuantizeLinear and DequantizeLinear. Rounded with a scale per token, these two work on
blocks as wide as a token, which TensorRT does not take. NVFP4 and MXFP8 are as TensorRT documents
them, partly in operators of its own; ONNX Runtime runs neither on a CPU.

Inputs, with B rows, S tokens of this call, L positions whose logits are wanted, P the capacity:

    input_ids, position_ids (B, S) int64    write_indices (B) int64: tokens already in the cache
    logits_at (B, L) int64: indices along S  past_key_values.N.{key,value} (B, KV heads, P, D)

and outputs ``logits`` (B, L, V) and ``present.N.{key,value}``, which may share the memory of the
past. Rows of different lengths are padded on the right; what the padding leaves in the cache is
overwritten before any later token sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import InputError
from optpipe.export.attention import Attention
from optpipe.export.graph import Graph
from optpipe.export.weights import Weights
from optpipe.family import Block, Decoder
from optpipe.linear import BLOCKS, Layers
from optpipe.stage import Limits, Progress, Stage

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DEFAULT_CAPACITY = 4096
MIN_CAPACITY = 16
"""What it takes to verify a graph: a prompt, several decoded tokens, a chunk."""


@dataclass(frozen=True, kw_only=True)
class Onnx(Stage):
    """Write the canonical graph."""

    produces: ClassVar[str] = "onnx"

    dtype: str = "float32"
    """Type of activations, cache and unquantized weights: float32, float16 or bfloat16. The last
    is for TensorRT: ONNX Runtime multiplies none on a CPU, so that it verifies the same weights in
    a float32 graph."""
    capacity: int | None = None
    """Tokens the KV cache holds for each row; null: the model's context, at most 4096."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {[*DTYPES]}, got '{self.dtype}'")
        if self.capacity is not None and self.capacity < MIN_CAPACITY:
            raise ValueError(
                f"capacity must be at least {MIN_CAPACITY} tokens, got {self.capacity}"
            )

    def inputs(self, model: Checkpoint) -> None:
        _check_rope(model, self.tokens(model))

    def limits(self, limits: Limits, model: Checkpoint) -> Limits:
        return replace(limits, tokens=self.tokens(model), tokens_key="export.capacity")

    def output_bits(self, layers: Layers, rest: int, float_bits: int) -> float:
        return graph_bits(layers, rest, DTYPES[self.dtype].itemsize * 8)

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        if (number := number_after(earlier, model)) not in (None, "int8"):
            raise InputError(
                f"a KV cache in {number} cannot be verified as ONNX, because ONNX "
                "Runtime has no TensorScatter of it on a CPU; use cache.number=int8, or an export "
                "for vLLM or TensorRT-LLM"
            )

    def tokens(self, model: Checkpoint) -> int:
        """How many the KV cache of a row will hold."""
        return _capacity(model, self.capacity)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.follow([], checkpoint)
        capacity = self.tokens(checkpoint)
        Emitter(checkpoint, out, DTYPES[self.dtype], capacity).emit(progress)
        copy_side_files(source.path, out)
        bits = _bits_per_weight(checkpoint, DTYPES[self.dtype].itemsize * 8)
        blocks = sorted({form.number for form in model.layers(checkpoint).values()} & {*BLOCKS})
        stats = {"dtype": self.dtype, "capacity": capacity, "bits_per_weight": bits}
        return {**stats, "blocks": blocks} if blocks else stats


def graph_bits(layers: Layers, rest: int, float_bits: int) -> float:
    """Size of the weights of a graph: codes in 4 or 8 bits, masked weights in full."""
    bits = float(rest * float_bits)
    for form in layers.values():
        code = float_bits if form.bits is None else max(4, form.bits)
        per_group = 0 if form.bits is None else float_bits + (0 if form.symmetric else code)
        per_group = 8 if form.number in BLOCKS else per_group
        bits += form.rows * form.cols * code + form.scales * per_group
        bits += float_bits * form.static_inputs + 32 * (form.number == "nvfp4")
    return bits


def _bits_per_weight(checkpoint: Checkpoint, float_bits: int) -> float:
    """Of the graph, for each weight of the linear layers as they were: factors count for those."""
    layers = dict(model.layers(checkpoint))
    if checkpoint.head_is_embedding:
        layers.pop(checkpoint.decoder.head, None)
    weights = 0
    for name, form in layers.items():
        left = layers.get(f"{name.removesuffix('.right')}.left") if name.endswith("right") else None
        extra = name.endswith(".left") or ".residual." in name
        weights += 0 if extra else (left or form).rows * form.cols
    return graph_bits(layers, 0, float_bits) / weights


def _capacity(checkpoint: Checkpoint, wanted: int | None) -> int:
    context = checkpoint.decoder.context
    if context < MIN_CAPACITY:
        raise InputError(f"a context of {context} tokens is below the {MIN_CAPACITY} needed")
    if wanted is None:
        return min(context, MAX_DEFAULT_CAPACITY)
    if wanted > context:
        raise InputError(f"capacity {wanted} exceeds the model's context of {context} tokens")
    return wanted


class Emitter:
    """Emits one decoder. ``emit`` is the whole order of the graph."""

    def __init__(
        self, checkpoint: Checkpoint, out: Path, dtype: torch.dtype, capacity: int
    ) -> None:
        self.checkpoint = checkpoint
        self.decoder: Decoder = checkpoint.decoder
        self.tables = _rotary_tables(checkpoint, capacity)
        self.graph = Graph(out)
        self.weights = Weights(self.graph, checkpoint, dtype)
        self.attention = Attention(self.graph, self.weights, self.decoder, capacity)
        self.capacity = capacity

    def emit(self, progress: Progress) -> None:
        blocks = self.decoder.blocks
        self._inputs()
        self.attention.rotary_tables(self.tables)
        x = self._embed()
        for index, block in enumerate(blocks):
            progress(block.name, index, len(blocks))
            x = self._residual(x, block.attn_norm, block.attn_out_norm, block, index)
            x = self._residual(x, block.mlp_norm, block.mlp_out_norm, block, None)
        self._head(x)
        progress("saving", len(blocks), len(blocks))
        properties = {"family": self.decoder.family, "form": "canonical"}
        self.graph.save(**properties, capacity=str(self.capacity))

    def _inputs(self) -> None:
        shapes: dict[str, list[str | int | None]] = {
            "input_ids": ["B", "S"],
            "position_ids": ["B", "S"],
            "write_indices": ["B"],
            "logits_at": ["B", "L"],
        }
        for name, shape in shapes.items():
            value = helper.make_tensor_value_info(name, TensorProto.INT64, shape)
            self.graph.inputs.append(value)
        logits: list[str | int | None] = ["B", "L", self.decoder.vocab]
        value = helper.make_tensor_value_info("logits", self.weights.onnx_dtype, logits)
        self.graph.outputs.append(value)

    def _embed(self) -> str:
        g, d = self.graph, self.decoder
        table = self.weights.stored(f"{d.embed}.weight")
        x = g.node("Gather", [table, "input_ids"], "embeddings", axis=0)
        if d.embed_scale != 1.0:
            scale = self.weights.scalar("embed_scale", d.embed_scale)
            x = g.node("Mul", [x, scale], "embeddings/scaled")
        if d.positions:
            table = self.weights.stored(f"{d.positions}.weight")
            positions = g.node("Gather", [table, "position_ids"], "positions", axis=0)
            x = g.node("Add", [x, positions], "embeddings/positioned")
        return x

    def _residual(
        self, x: str, norm_in: str, norm_out: str | None, block: Block, index: int | None
    ) -> str:
        """x + norm_out(part(norm_in(x))), the part being attention if it has a cache index."""
        y = self.weights.norm(x, norm_in)
        y = self._mlp(y, block) if index is None else self.attention.emit(y, block, index)
        if norm_out:
            y = self.weights.norm(y, norm_out)
        return self.graph.node("Add", [x, y], f"{norm_in}/residual")

    def _mlp(self, x: str, block: Block) -> str:
        g = self.graph
        ups = [self.weights.linear(x, name) for name in block.mlp_in]
        if self.decoder.gated and len(ups) == 1:
            width = self.decoder.intermediate
            ups = self.weights.split(ups[0], [width, width])
        y = self._activate(ups[0])
        if self.decoder.gated:
            y = g.node("Mul", [y, ups[1]], f"{block.name}/gated")
        return self.weights.linear(y, block.mlp_out)

    def _activate(self, x: str) -> str:
        if self.decoder.activation == "gelu_tanh":
            return self.graph.node("Gelu", [x], f"{x}/gelu", approximate="tanh")
        gate = self.graph.node("Sigmoid", [x], f"{x}/sigmoid")
        return self.graph.node("Mul", [x, gate], f"{x}/silu")

    def _head(self, x: str) -> str:
        g, d = self.graph, self.decoder
        axes = g.constant("last_axis", np.array([-1], np.int64))
        indices = g.node("Unsqueeze", ["logits_at", axes], "logits_at/indices")
        x = g.node("GatherND", [x, indices], "wanted", batch_dims=1)
        x = self.weights.norm(x, d.final_norm)
        final = "logits/raw" if d.logit_softcap else "logits"
        if self.checkpoint.head_is_embedding:
            table = g.node("Transpose", [f"{d.embed}.weight"], "head", perm=[1, 0])
            x = g.node("MatMul", [x, table], final)
        else:
            x = self.weights.linear(x, d.head, output=final)
        return self.weights.softcap(x, d.logit_softcap, "logits") if d.logit_softcap else x


def _rotary_tables(
    checkpoint: Checkpoint, capacity: int
) -> dict[str | None, tuple[Tensor, Tensor]]:
    """cos and sin, (capacity, half the rotated dimensions), by layer type; exactly as in torch."""
    decoder = checkpoint.decoder
    if decoder.rotary is None:
        return {}
    rotary = model.empty(checkpoint.config).get_submodule(decoder.rotary)
    positions, x = torch.arange(capacity)[None], torch.zeros(1, 1, dtype=torch.float32)
    tables = {}
    for kind in sorted({block.layer_type for block in decoder.blocks}, key=str):
        cos, sin = rotary(x, positions) if kind is None else rotary(x, positions, kind)
        half = cos.shape[-1] // 2  # transformers repeats each half
        tables[kind] = (cos[0, :, :half], sin[0, :, :half])
    return tables


def rotated_dims(checkpoint: Checkpoint) -> int:
    """How many dimensions of a head rotate; 0 without rotary embeddings."""
    return max((2 * cos.shape[-1] for cos, _ in _rotary_tables(checkpoint, 1).values()), default=0)


def _check_rope(checkpoint: Checkpoint, capacity: int) -> None:
    """Raise InputError for a rotary table that changes with the length of the sequence."""
    if checkpoint.decoder.rotary is None:
        return
    rope = checkpoint.config.rope_parameters or {}
    for entry in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        kind = entry.get("rope_type", "default")
        limit = entry.get("original_max_position_embeddings", checkpoint.decoder.context)
        if kind == "longrope" and capacity > limit:
            raise InputError(
                f"rope type '{kind}' changes its table beyond {limit} tokens, which a static graph "
                f"cannot; set export.capacity to at most {limit}, got {capacity}"
            )
