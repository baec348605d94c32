"""Attention as TensorRT's own: LOWER_RIGHT in place of the mask, in parts where none is fused.

The graph in the folder, which ONNX Runtime verified, stays as it is. Query i of S attends to key j
where j <= i + lengths - S, with as many keys in the cache as ``key_value_lengths`` says, per row:
what the mask of the graph says, j <= position_ids[i], as positions go on from ``write_indices``.
"""

from __future__ import annotations

import json
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from optpipe.export.attention import ATTENTION
from optpipe.family import Decoder

KINDS = ("mask", "lower_right")
LENGTHS = "key_value_lengths"


def refuse(decoder: Decoder) -> str | None:
    """Why no layer of this model can attend LOWER_RIGHT, if none can."""
    if decoder.attn_softcap:
        return f"scores of '{decoder.family}' are soft-capped, which TensorRT's attention cannot"
    if all(block.window for block in decoder.blocks):
        return "every layer looks at a window of tokens only, which needs its mask"
    return None


def unmask(model: ModelProto) -> None:
    """Take the mask from each Attention that looks at all tokens; adds the node LENGTHS, int32 (B).

    TensorRT takes a mask or a causal kind, never both, and knows no window.
    """
    for node in model.graph.node:
        if node.op_type == "Attention" and not _window(node):
            del node.input[3]
    model.graph.node.extend([
        helper.make_node("Shape", ["position_ids"], [f"{LENGTHS}/new"], start=1, end=2),
        helper.make_node("Add", ["write_indices", f"{LENGTHS}/new"], [f"{LENGTHS}/int64"]),
        helper.make_node(
            "Cast", [f"{LENGTHS}/int64"], [LENGTHS], name=LENGTHS, to=TensorProto.INT32
        ),
    ])  # fmt: skip


def _window(node: NodeProto) -> int:
    (about,) = (prop.value for prop in node.metadata_props if prop.key == ATTENTION)
    return int(json.loads(about)["window"])


def settle(trt: Any, network: Any, parser: Any) -> int:
    """Set what the parser cannot on every attention; returns how many became LOWER_RIGHT."""
    changed = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.ATTENTION_INPUT:
            continue
        attention = _attention(trt, layer)
        attention.decomposable = True  # else a GPU without a fused kernel for it builds nothing
        if attention.mask is None:
            attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
            attention.key_value_lengths = parser.get_layer_output_tensor(LENGTHS, 0)
            changed += 1
    return changed


def _attention(trt: Any, boundary: Any) -> Any:
    """The attention that a layer begins."""
    boundary.__class__ = trt.IAttentionInputLayer  # the bindings give its base
    return boundary.attention
