"""Which weights of a canonical graph have at most two numbers in every four inputs.

TensorRT looks for this pattern along the reduced axis of a product, whatever the type of the
weight, once BuilderFlag.SPARSE_WEIGHTS allows it, and takes a sparse kernel where it has one.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from onnx import TensorProto

from optpipe.export.graph import read, tensor

TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT4E2M1: "fp4",
}

CODE: dict[int, int] = {TensorProto.INT4: 0b1111, TensorProto.FLOAT4E2M1: 0b0111}
"""Of types with two codes a byte: the bits that are not all zero in numbers other than (-)0."""


def sparse24(folder: Path) -> dict[str, int]:
    """How many weights are 2:4, by the type of their numbers or codes."""
    graph = read(folder).graph
    initializers = {proto.name: proto for proto in graph.initializer}
    codes = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    products = [node.input[1] for node in graph.node if node.op_type == "MatMul"]
    weights = [initializers.get(codes.get(name, name)) for name in dict.fromkeys(products)]
    return dict(Counter(
        TYPES[w.data_type] for w in weights if w and w.data_type in TYPES and is24(folder, w)
    ))  # fmt: skip


def is24(folder: Path, weight: TensorProto) -> bool:
    """Whether a weight (K, N) is; it is read up to the first four inputs that are not."""
    rows, cols = weight.dims
    data = tensor(folder, weight).reshape(-1)
    mask = CODE.get(weight.data_type)
    step = 2 * cols if mask else 4 * cols
    return rows % 4 == 0 and all(
        _fits(data[start : start + step], cols, mask) for start in range(0, len(data), step)
    )


def _fits(four: np.ndarray, cols: int, mask: int | None) -> bool:
    if mask:
        four = np.stack([four & mask, four >> 4 & mask], -1)
    return bool(((four.reshape(4, cols) != 0).sum(0) <= 2).all())
