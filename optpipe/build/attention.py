"""Attention over a static cache, in standard operators, to com.microsoft.GroupQueryAttention.

The kernel rotates q and k, writes them into the cache and attends in one go. It counts positions
itself, from the number of tokens in the cache, and takes q, k and v as rows (B, S, heads * D), or
side by side from one product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto

from optpipe.build.match import CONTRIB, Match, Product
from optpipe.export.attention import ATTENTION
from optpipe.export.graph import Graph, tensor

if TYPE_CHECKING:
    from optpipe.build.lower import Lowering

QUANTIZED = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


@dataclass(frozen=True)
class Parts:
    """One attention: what is known of it, what feeds it, and what it makes."""

    about: dict[str, Any]
    """What the exporter noted: window, scale, softcap."""
    sources: list[str]
    """q, k and v before they were cut into heads."""
    rotary: list[str]
    """The cos and sin tables, if any."""
    past: list[str]
    outputs: list[str]
    """Its rows (B, S, heads * D), present key, present value."""
    scales: list[str]
    """Of the keys and the values in the cache, if they are quantized."""


class AttentionRule:
    """Recognizes the Reshape that ends an attention."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering, self.maker, self.new = lowering, lowering.maker, lowering.new

    def match(self, node: NodeProto) -> Match | None:
        transpose = self.maker.get(node.input[0])
        end = self.maker.get(transpose.input[0]) if transpose and transpose.input else None
        noted = [prop.value for prop in end.metadata_props if prop.key == ATTENTION] if end else []
        if not noted:
            return None
        about = json.loads(noted[0])
        caches = [self.maker[about[name]] for name in ("key", "value")]
        grids = [list(cache.input[1:2]) for cache in caches if cache.op_type == "DequantizeLinear"]
        if grids:  # the codes that enter the cache, and what they are made of
            caches = [self.maker[cache.input[0]] for cache in caches]
        new = [self.maker[c.input[1]].input[0] if grids else c.input[1] for c in caches]
        heads = [about["query"], *new]
        parts = Parts(
            about,
            sources=[self._source(name) for name in heads],
            rotary=self._rotary(heads[0]),
            past=[cache.input[0] for cache in caches],
            outputs=[node.output[0], *(cache.output[0] for cache in caches)],
            scales=[name for grid in grids for name in grid],
        )
        products = [self.lowering.quantized(name) for name in parts.sources]
        found = [product for product in products if product]
        if len(found) == 3 and len({product.grid for product in found}) == 1:
            return self._packed(parts, found)
        inputs = [*parts.sources, *parts.rotary]
        return Match(inputs, parts.outputs, lambda: self._emit(parts, self._rows(parts.sources)))

    def _packed(self, parts: Parts, products: list[Product]) -> Match:
        """With one product for q, k and v."""
        output = f"{parts.outputs[0]}/qkv"

        def emit() -> None:
            self._emit(parts, [self.lowering.emit(products, output), "", ""])

        inputs = [*self.lowering.sources(products), *parts.rotary]
        return Match(inputs, parts.outputs, emit)

    def _emit(self, parts: Parts, qkv: list[str]) -> None:
        shapes = {v.name: v.type.tensor_type.shape.dim for v in self.lowering.old.output}
        kv_heads, head_dim = (shapes[parts.outputs[1]][axis].dim_value for axis in (1, 3))
        joined = self.lowering.weights[self.maker[parts.outputs[0]].input[1]]
        self.new.add(
            "GroupQueryAttention",
            [*qkv, *parts.past, "seqlens_k", "total_sequence_length", *self._rest(parts)],
            parts.outputs,
            domain=CONTRIB,
            num_heads=int(tensor(self.lowering.source, joined)[2]) // head_dim,
            kv_num_heads=kv_heads,
            scale=parts.about["scale"],
            softcap=parts.about["softcap"],
            local_window_size=parts.about["window"] or -1,
            do_rotary=int(bool(parts.rotary)),
            **(QUANTIZED if parts.scales else {}),
        )

    def _rest(self, parts: Parts) -> list[str]:
        """Rotary tables, three inputs that are not there, scales of the cache."""
        if not parts.scales:
            return parts.rotary
        rotary = parts.rotary or ["", ""]
        new = [self.new.constant(f"{name}/float", self._float(name)) for name in parts.scales]
        return [*rotary, "", "", "", *new]

    def _float(self, name: str) -> np.ndarray:
        return self.lowering.weight(name).astype(np.float32).reshape(1)

    def _rotary(self, q: str) -> list[str]:
        node = self.maker[q]
        return list(node.input[1:3]) if node.op_type == "RotaryEmbedding" else []

    def _source(self, name: str) -> str:
        """From (B, heads, S, D) back to the projection, or to the norm of its heads."""
        node = self.maker[name]
        if node.op_type == "RotaryEmbedding":
            node = self.maker[node.input[0]]
        assert node.op_type == "Transpose", node.op_type
        node = self.maker[node.input[0]]
        return str(node.input[0] if node.op_type == "Reshape" else node.output[0])

    def _rows(self, sources: list[str]) -> list[str]:
        """Normed heads, (B, S, heads, D), become rows; projections are rows already."""
        shape = self.new.constant("rows", np.array([0, 0, -1], np.int64))
        return [
            self.new.node("Reshape", [name, shape], f"{name}/rows")
            if self.maker[name].op_type == "RMSNormalization"
            else name
            for name in sources
        ]


def emit_lengths(graph: Graph) -> None:
    """What GroupQueryAttention asks for, from write_indices and the tokens of this call."""
    axis = graph.constant("axis_0", np.array([0], np.int64))
    one = graph.constant("1", np.array(1, np.int64))
    shape = graph.node("Shape", ["input_ids"], "tokens/shape", start=1, end=2)
    tokens = graph.node("Squeeze", [shape, axis], "tokens")
    totals = graph.node("Add", ["write_indices", tokens], "totals")
    last = graph.node("Sub", [totals, one], "totals/last")
    graph.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
    longest = graph.node("ReduceMax", [totals], "totals/longest", keepdims=0)
    graph.node("Cast", [longest], "total_sequence_length", to=TensorProto.INT32)
