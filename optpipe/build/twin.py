"""The same model without the rounding of inputs, for comparisons that a wrong graph cannot pass.

A rounded input that lies between two codes goes up in one runtime and down in another, which moves
all that follows; without the rounding two runtimes must agree at every position.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from optpipe.build import substitute
from optpipe.build.attention import QUANTIZED
from optpipe.checkpoint import FORMS
from optpipe.export.graph import DATA, MODEL, SESSION, Graph, read, tensor
from optpipe.kvcache import FILE

KV_SCALE = 12
"""Index of the first scale among the inputs of GroupQueryAttention."""


def exact_checkpoint(folder: Path, out: Path) -> None:
    """A compressed model in ``out`` whose layers and cache take what comes as it is."""
    for file in folder.iterdir():
        if file.name not in (FORMS, FILE):
            (out / file.name).symlink_to(file.resolve())
    forms = json.loads((folder / FORMS).read_text())
    exact = {name: {**form, "inputs": None} for name, form in forms.items()}
    (out / FORMS).write_text(json.dumps(exact))


def exact_graph(folder: Path, out: Path) -> None:
    """A canonical graph or an engine in ``out`` that multiplies floats with its stored weights.

    The weights are linked; a symbolic link would do, but onnxruntime refuses one that leaves.
    """
    model = read(folder)
    _unround(model)
    dtype = model.graph.output[0].type.tensor_type.elem_type
    for value in [*model.graph.input, *model.graph.output]:
        _float_cache(value, dtype)
    if dtype == TensorProto.BFLOAT16 or substitute.needed(model):
        return _rewrite(model, folder, out)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    (out / MODEL).write_bytes(model.SerializeToString())
    if (folder / SESSION).is_file():
        shutil.copyfile(folder / SESSION, out / SESSION)
    try:
        os.link(folder / DATA, out / DATA)
    except OSError:  # a file system without links
        shutil.copyfile(folder / DATA, out / DATA)


def runnable_graph(folder: Path, out: Path) -> None:
    """A canonical graph in ``out`` that rounds as it did, in operators that ONNX Runtime has."""
    model = read(folder)
    substitute.roundings(model)
    _rewrite(model, folder, out)


def _rewrite(model: ModelProto, folder: Path, out: Path) -> None:
    """With weights of its own: bfloat16 ones in float32, codes that ONNX Runtime reads."""
    substitute.weights(model, folder, out / substitute.SCRATCH)
    wide = Graph(out)
    for proto in model.graph.initializer:
        data, dtype = tensor(folder, proto), proto.data_type
        if dtype == TensorProto.BFLOAT16:
            data, dtype = data.astype(np.float32), TensorProto.FLOAT
        wide.raw(proto.name, dtype, tuple(proto.dims), [np.ascontiguousarray(data)])
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    wide.nodes, wide.inputs = list(model.graph.node), list(model.graph.input)
    wide.outputs = list(model.graph.output)
    wide.save(**{p.key: p.value for p in model.metadata_props})
    (out / substitute.SCRATCH).unlink()


def _float_cache(value: ValueInfoProto, dtype: int) -> None:
    if value.type.tensor_type.elem_type == TensorProto.INT8:
        value.type.tensor_type.elem_type = dtype


def _unround(model: ModelProto) -> None:
    """Pass what QuantizeLinear reads to whatever used what it makes; caches hold floats."""
    rounds = ("QuantizeLinear", *substitute.DYNAMIC)
    source = {
        name: n.input[0] for n in model.graph.node if n.op_type in rounds for name in n.output
    }
    passed: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in substitute.BACK and node.input[0] in source:
            passed[node.output[0]] = source[node.input[0]]
        elif node.op_type == "DequantizeLinear" and node.input[0].startswith("present."):
            passed[node.output[0]] = node.input[0]
        elif node.op_type == "MatMulIntegerToFloat":
            kept += _floats(node, source[node.input[0]])
        elif node.op_type not in rounds:
            _plain(node)
            scattered = source if node.op_type == "TensorScatter" else {}
            node.input[:] = [scattered.get(n, passed.get(n, n)) for n in node.input]
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _plain(node: NodeProto) -> None:
    """GroupQueryAttention without its quantized cache."""
    kept = [a for a in node.attribute if a.name not in QUANTIZED]
    if len(kept) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(kept)
        del node.input[KV_SCALE:]


def _floats(node: NodeProto, x: str) -> list[NodeProto]:
    """The product of ``x``, unrounded, with the weight of a MatMulIntegerToFloat."""
    codes, scales, output = node.input[1], node.input[3], node.output[0]
    bias = node.input[6] if len(node.input) > 6 else ""
    weight, product = f"{output}/weight", f"{output}/product" if bias else output
    nodes = [
        helper.make_node("DequantizeLinear", [codes, scales], [weight], axis=1),
        helper.make_node("MatMul", [x, weight], [product]),
    ]
    return [*nodes, helper.make_node("Add", [product, bias], [output])] if bias else nodes
