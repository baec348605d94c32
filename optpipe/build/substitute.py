"""What ONNX Runtime has no kernel for on a CPU, said in operators that it has, exactly.

DequantizeLinear of e2m1, its scales e4m3 times a global one
    -> DequantizeLinear of int8: twice the number, half the step
TRT_MXFP8DequantizeLinear of e4m3, its scales exponents -> DequantizeLinear with float scales
TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, and back -> arithmetic on blocks
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from optpipe.export.graph import tensor
from optpipe.microscaling import E2M1, FP4_TOP, FP8_TOP, LEAST_FP8

SCRATCH = "substituted.data"
DYNAMIC = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
BACK = ("DequantizeLinear", "TRT_MXFP8DequantizeLinear")
HALVES = np.array([2 * v for v in (*E2M1, *(-v for v in E2M1))], np.int8)
"""Code of e2m1 -> twice its number."""
BIAS = 127
"""Of the exponents of e8m0."""


def needed(model: ModelProto) -> bool:
    """Whether ONNX Runtime could not run this graph on a CPU as it is."""
    if any(t.data_type == TensorProto.FLOAT4E2M1 for t in model.graph.initializer):
        return True
    return any(node.domain == "trt" for node in model.graph.node)


def weights(model: ModelProto, folder: Path, file: Path) -> None:
    """Change weights of the graph in ``folder``; their new bytes go to ``file``."""
    graph = model.graph
    stored = {proto.name: proto for proto in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    with file.open("wb") as data:
        for node in [*graph.node]:
            proto = stored.get(node.input[0]) if node.op_type in BACK else None
            if proto is None:
                continue
            if node.op_type == "TRT_MXFP8DequantizeLinear":
                exponents = tensor(folder, stored[node.input[1]]).astype(np.int32) - BIAS
                steps = np.exp2(exponents.astype(np.float32)).astype(_numpy(_output(node)))
                _replace(stored, node.input[1], steps, data, file)
                _standard(node)
            elif proto.data_type == TensorProto.FLOAT4E2M1:
                scale = maker[node.input[1]]
                _replace(stored, proto.name, _doubled(folder, proto), data, file)
                _replace(stored, node.input[1], _half_steps(folder, scale, stored), data, file)
                graph.node.remove(scale)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(proto for name, proto in stored.items() if name in used)


def _doubled(folder: Path, proto: TensorProto) -> np.ndarray:
    """Twice the numbers that codes of e2m1 stand for, int8."""
    packed = tensor(folder, proto)
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1)
    doubled: np.ndarray = HALVES[codes[: int(np.prod(proto.dims))]].reshape(tuple(proto.dims))
    return doubled


def _half_steps(folder: Path, node: NodeProto, stored: dict[str, TensorProto]) -> np.ndarray:
    scales, whole = (tensor(folder, stored[name]).astype(np.float32) for name in node.input)
    dtype = _numpy(_output(node))
    half: np.ndarray = (scales * whole).astype(dtype) / dtype.type(2)
    return half


def _replace(
    stored: dict[str, TensorProto], name: str, array: np.ndarray, data: BinaryIO, file: Path
) -> None:
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto = TensorProto(name=name, data_type=dtype, dims=array.shape)
    proto.data_location = TensorProto.EXTERNAL
    place = {"location": file.resolve(), "offset": data.tell(), "length": array.nbytes}
    for key, value in place.items():
        proto.external_data.add(key=key, value=str(value))
    data.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stored[name] = proto


def _standard(node: NodeProto) -> None:
    """DequantizeLinear of ONNX, whose type is that of its scales."""
    node.op_type, node.domain = "DequantizeLinear", ""
    kept = [a for a in node.attribute if a.name != "output_dtype"]
    del node.attribute[:]
    node.attribute.extend(kept)


def _output(node: NodeProto) -> int:
    return int(next(a.i for a in node.attribute if a.name == "output_dtype"))


def _numpy(dtype: int) -> np.dtype[np.generic]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(dtype))


def roundings(model: ModelProto) -> None:
    """Change what rounds inputs in blocks, in float32 as the torch model does."""
    graph = model.graph
    dynamic = {node.output[0]: node for node in graph.node if node.op_type in DYNAMIC}
    scales = {node.output[1] for node in dynamic.values()}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type in BACK and node.input[0] in dynamic:
            kept += _arithmetic(graph, dynamic[node.input[0]], node.output[0])
        elif node.op_type not in DYNAMIC and node.input[0] not in scales:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _arithmetic(graph: GraphProto, quantize: NodeProto, output: str) -> list[NodeProto]:
    """Nodes from the inputs of ``quantize`` to ``output``, what their codes stand for."""
    four, x = quantize.op_type == DYNAMIC[0], quantize.input[0]
    size = next(a.i for a in quantize.attribute if a.name == "block_size")
    nodes: list[NodeProto] = []

    def node(op: str, *inputs: str | float, **attributes: Any) -> str:
        names = [i if isinstance(i, str) else _scalar(graph, i) for i in inputs]
        name = f"{output}/{len(nodes)}"
        nodes.append(helper.make_node(op, names, [name], **attributes))
        return name

    def cast(name: str, dtype: int) -> str:
        return node("Cast", name, to=dtype)

    shape = _vector(graph, f"blocks_of_{size}", [0, 0, -1, size])
    blocks = node("Reshape", cast(x, TensorProto.FLOAT), shape)
    axes = _vector(graph, "block_axis", [-1])
    largest = node("ReduceMax", node("Abs", blocks), axes, keepdims=1)
    if four:
        whole = quantize.input[1]
        scale = node("Div", largest, node("Mul", FP4_TOP, whole))
        scale = node("Min", node("Max", scale, LEAST_FP8), FP8_TOP)
        scale = cast(cast(scale, TensorProto.FLOAT8E4M3FN), TensorProto.FLOAT)
        step = node("Mul", scale, whole)
        scaled = node("Div", blocks, step)
        size_ = node("Abs", scaled)
        inner = node("Where", node("Less", size_, 4.0), 1.0, 2.0)
        gap = node("Where", node("Less", size_, 2.0), 0.5, inner)
        near = node("Min", node("Mul", node("Round", node("Div", size_, gap)), gap), FP4_TOP)
        numbers = node("Mul", near, node("Sign", scaled))
    else:
        exponent = cast(node("Div", largest, FP8_TOP), TensorProto.FLOAT8E8M0)
        step = cast(exponent, TensorProto.FLOAT)
        codes = cast(node("Div", blocks, step), TensorProto.FLOAT8E4M3FN)
        numbers = cast(codes, TensorProto.FLOAT)
    flat = node("Reshape", node("Mul", numbers, step), node("Shape", x))
    nodes.append(helper.make_node("CastLike", [flat, x], [output]))
    return nodes


def _scalar(graph: GraphProto, value: float) -> str:
    return _constant(graph, f"scalar/{value:g}", np.array(value, np.float32))


def _vector(graph: GraphProto, name: str, values: list[int]) -> str:
    return _constant(graph, name, np.array(values, np.int64))


def _constant(graph: GraphProto, name: str, array: np.ndarray) -> str:
    if all(proto.name != name for proto in graph.initializer):
        graph.initializer.append(helper.make_tensor(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(), True
        ))  # fmt: skip
    return name
