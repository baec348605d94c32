"""Self-attention over a static-capacity KV cache, in standard operators."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from optpipe.export.graph import Graph
from optpipe.export.weights import Weights
from optpipe.family import Block, Decoder
from optpipe.kvcache import CacheForm

ATTENTION = "optpipe.attention"
"""Property of the node that ends an attention: its query, key, value, scale, softcap and window (0:
none), as JSON. The operators say the same thing; a lowering to a fused kernel reads it here."""


class Attention:
    def __init__(self, graph: Graph, weights: Weights, decoder: Decoder, capacity: int) -> None:
        self.graph, self.weights = graph, weights
        self.decoder, self.capacity = decoder, capacity
        self._rotary: dict[str | None, tuple[str, str]] = {}
        self._masks: dict[int | None, str] = {}

    def rotary_tables(self, tables: dict[str | None, tuple[Tensor, Tensor]]) -> None:
        """Make cos and sin tables, (capacity, rotated / 2), known by layer type."""
        for kind, (cos, sin) in tables.items():
            suffix = f".{kind}" if kind else ""
            names = (f"rotary{suffix}.cos", f"rotary{suffix}.sin")
            self.weights.tensor(names[0], cos)
            self.weights.tensor(names[1], sin)
            self._rotary[kind] = names
            self._rotated = 2 * cos.shape[-1]

    def emit(self, x: str, block: Block, index: int) -> str:
        """Attention of block ``index``; x and the result are (B, S, hidden)."""
        d, g, name = self.decoder, self.graph, f"{block.name}.attention"
        q, k, v = self._projections(x, block)
        q = self._heads(q, d.heads, block, 0)
        k = self._heads(k, d.kv_heads, block, 1)
        v = self._heads(v, d.kv_heads, block, None)
        key, value = (self._cache(part, index, new) for part, new in (("key", k), ("value", v)))
        mask = self._mask(block.window)
        if d.attn_softcap:
            attention = self._capped(q, key, value, mask, name)
        else:
            inputs = [q, key, value, mask]
            attention = g.add("Attention", inputs, [name], scale=d.attn_scale, is_causal=0)
        about = {"query": q, "key": key, "value": value, "window": block.window or 0}
        about |= {"scale": d.attn_scale, "softcap": d.attn_softcap}
        attention.metadata_props.add(key=ATTENTION, value=json.dumps(about))
        y = g.node("Transpose", [name], f"{name}/rows", perm=[0, 2, 1, 3])
        shape = g.constant("joined_heads", np.array([0, 0, d.heads * d.head_dim], np.int64))
        return self.weights.linear(g.node("Reshape", [y, shape], f"{name}/joined"), block.attn_out)

    def _projections(self, x: str, block: Block) -> list[str]:
        d = self.decoder
        projected = [self.weights.linear(x, name) for name in block.qkv]
        if len(projected) == 3:
            return projected
        kv = d.kv_heads * d.head_dim
        return self.weights.split(projected[0], [d.heads * d.head_dim, kv, kv])

    def _heads(self, x: str, heads: int, block: Block, part: int | None) -> str:
        """(B, S, heads * D) to (B, heads, S, D); q is part 0, k part 1, v is neither."""
        g, d = self.graph, self.decoder
        shape = g.constant(f"split_{heads}_heads", np.array([0, 0, heads, d.head_dim], np.int64))
        x = g.node("Reshape", [x, shape], f"{x}/heads")
        if block.qk_norm and part is not None:
            x = self.weights.norm(x, block.qk_norm[part])
        x = g.node("Transpose", [x], f"{x}/transposed", perm=[0, 2, 1, 3])
        if not self._rotary or part is None:
            return x
        cos, sin = self._rotary[block.layer_type]
        inputs = [x, cos, sin, "position_ids"]
        partial: dict[str, Any] = {}
        if self._rotated != d.head_dim:
            partial["rotary_embedding_dim"] = self._rotated
        return g.node("RotaryEmbedding", inputs, f"{x}/rotated", **partial)

    def _capped(self, q: str, key: str, value: str, mask: str, name: str) -> NodeProto:
        """Attention with soft-capped scores, in parts: TensorRT's Attention refuses a softcap.

        The query heads that share a key head lie side by side, so both products stay 4-D.
        """
        g, d = self.graph, self.decoder
        apart, together = (
            g.constant(f"heads_{n}", np.array([0, n, -1, self.capacity], np.int64))
            for n in (d.heads, d.kv_heads)
        )
        shape = g.constant("shared_heads", np.array([0, d.kv_heads, -1, d.head_dim], np.int64))
        q = g.node("Reshape", [q, shape], f"{name}/query")
        key = g.node("Transpose", [key], f"{name}/key", perm=[0, 1, 3, 2])
        scores = g.node("MatMul", [q, key], f"{name}/products")
        scale = self.weights.scalar("attention_scale", d.attn_scale)
        scores = g.node("Mul", [scores, scale], f"{name}/scores")
        scores = self.weights.softcap(scores, d.attn_softcap, f"{name}/capped")
        scores = g.node("Reshape", [scores, apart], f"{name}/scores/heads")
        never = self.weights.scalar("never", torch.finfo(torch.float16).min)
        scores = g.node("Where", [mask, scores, never], f"{name}/masked")
        shares = g.node("Softmax", [scores], f"{name}/softmax", axis=-1)
        shares = g.node("Reshape", [shares, together], f"{name}/softmax/shared")
        y = g.node("MatMul", [shares, value], f"{name}/mixed")
        shape = g.constant("own_heads", np.array([0, d.heads, -1, d.head_dim], np.int64))
        return g.add("Reshape", [y, shape], [name])

    def _cache(self, part: str, index: int, new: str) -> str:
        """Write the new keys or values into the cache; returns all of it."""
        past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
        d = self.decoder
        shape: list[str | int | None] = ["B", d.kv_heads, self.capacity, d.head_dim]
        form = self.weights.checkpoint.cache
        dtype = TensorProto.INT8 if form else self.weights.onnx_dtype
        self.graph.inputs.append(helper.make_tensor_value_info(past, dtype, shape))
        self.graph.outputs.append(helper.make_tensor_value_info(present, dtype, shape))
        grid = self._grid(form, part, index) if form else []
        if grid:
            new = self.graph.node("QuantizeLinear", [new, *grid], f"{present}.codes")
        inputs = [past, new, "write_indices"]
        self.graph.node("TensorScatter", inputs, present, axis=-2, mode="linear")
        if not grid:
            return present
        return self.graph.node("DequantizeLinear", [present, *grid], f"{present}.rounded")

    def _grid(self, form: CacheForm, part: str, index: int) -> list[str]:
        """Scale and zero point of a quantized cache."""
        scales = form.key if part == "key" else form.value
        scale = self.weights.scalar(f"cache.{index}.{part}.scale", scales[index])
        return [scale, self.graph.raw("zero.int8", TensorProto.INT8, (), [np.zeros(1, np.uint8)])]

    def _mask(self, window: int | None) -> str:
        """True where a query may look, (B, 1, S, capacity)."""
        if window not in self._masks:
            self._masks[window] = self._emit_mask(window)
        return self._masks[window]

    def _emit_mask(self, window: int | None) -> str:
        g = self.graph
        axes = g.constant("mask_axes", np.array([1, 3], np.int64))
        slots = g.constant("slots", np.arange(self.capacity, dtype=np.int64).reshape(1, 1, 1, -1))
        if None not in self._masks:
            queries = g.node("Unsqueeze", ["position_ids", axes], "queries")
            self._masks[None] = g.node("LessOrEqual", [slots, queries], "mask")
        if window is None:
            return self._masks[None]
        size = g.constant(f"window_{window}", np.array(window, np.int64))
        oldest = g.node("Sub", ["queries", size], f"queries/window_{window}")
        recent = g.node("Greater", [slots, oldest], f"mask/recent_{window}")
        return g.node("And", [self._masks[None], recent], f"mask/window_{window}")
