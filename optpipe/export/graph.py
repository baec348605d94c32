"""An ONNX graph under construction whose weights go straight to disk, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

MODEL, DATA, SESSION = "model.onnx", "model.onnx.data", "session.json"
UNFUSED_SESSION = {"session.disable_quant_qdq": "1"}
"""For a graph with float8, with rounded inputs and weights in blocks, or with a transposed int8
cache: ONNX Runtime 1.31 rewrites those wrongly and then refuses its own graph. Quantized weights
become floats when it loads the graph."""
INTEGER_SESSION = {"session.x64quantprecision": "1"}
"""For products of 8-bit integers, which would saturate at 16 bits where a CPU has no VNNI; the
loader leaves it out where there is one, because there it is 3.5 times slower."""
FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
OPSET = 24
IR_VERSION = 11
ALIGN = 4096  # a page, so that a runtime can map a weight instead of reading it
INLINE_BYTES = 1024  # constants up to this size stay in the .onnx file


class Graph:
    """Nodes, inputs, outputs, weights; ``save`` writes MODEL, the weights are in DATA by then.

    SESSION holds the settings ONNX Runtime needs to run the graph, if it needs any.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._data = (out / DATA).open("w+b")

    def node(
        self, op: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output; returns the name of that output."""
        self.add(op, inputs, [output], domain=domain, **attributes)
        return output

    def add(
        self, op: str, inputs: list[str], outputs: list[str], *, domain: str = "", **attributes: Any
    ) -> NodeProto:
        node = helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes)
        self.nodes.append(node)
        return node

    def constant(self, name: str, array: np.ndarray) -> str:
        """A weight or a small constant; the name may be given twice if the content is the same."""
        if name not in self.initializers:
            array = np.ascontiguousarray(array)
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.raw(name, dtype, array.shape, [array])
        return name

    def raw(
        self, name: str, dtype: int, shape: tuple[int, ...], parts: Iterable[np.ndarray]
    ) -> str:
        """A weight from its bytes, part by part; each part may overwrite the one before it.

        Bytes, because numpy does not have all element types (4-bit integers).
        """
        tensor = TensorProto(name=name, data_type=dtype, dims=shape)
        offset = self._data.seek(-self._data.tell() % ALIGN, 1)
        for part in parts:
            self._data.write(part.reshape(-1).view(np.uint8).data)
        length = self._data.tell() - offset
        if length <= INLINE_BYTES:
            self._data.seek(offset)
            tensor.raw_data = self._data.read(length)
            self._data.seek(offset)
            self._data.truncate()
        else:
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def save(self, **metadata: str) -> None:
        """Close the weights and write the model with ``metadata`` as its properties."""
        self._data.close()
        graph = helper.make_graph(
            self.nodes, "decoder", self.inputs, self.outputs, [*self.initializers.values()]
        )
        domains = {node.domain for node in self.nodes} - {""}
        opsets = [helper.make_opsetid("", OPSET)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="optpipe", ir_version=IR_VERSION
        )
        helper.set_model_props(model, metadata)
        (self.out / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        session: dict[str, str] = {}
        if self._misread():
            session |= UNFUSED_SESSION
        if any(node.op_type == "MatMulIntegerToFloat" for node in self.nodes):
            session |= INTEGER_SESSION
        if session:
            (self.out / SESSION).write_text(json.dumps(session) + "\n")

    def _misread(self) -> bool:
        dequantized = {n.output[0] for n in self.nodes if n.op_type == "DequantizeLinear"}
        if any(n.op_type == "Transpose" and n.input[0] in dequantized for n in self.nodes):
            return True
        if any(w.data_type == TensorProto.FLOAT8E4M3FN for w in self.initializers.values()):
            return True
        rounds = any(node.op_type == "QuantizeLinear" for node in self.nodes)
        weights = [
            n
            for n in self.nodes
            if n.op_type == "DequantizeLinear"
            if n.input[0] in self.initializers
        ]
        return rounds and any(a.name == "block_size" for n in weights for a in n.attribute)


def unfused(folder: Path) -> bool:
    """Whether ONNX Runtime makes floats of quantized weights when it loads this graph."""
    file = folder / SESSION
    return file.is_file() and UNFUSED_SESSION.items() <= json.loads(file.read_text()).items()


def read(folder: Path) -> onnx.ModelProto:
    """The model of a folder without its weights; get those one by one with :func:`tensor`."""
    return onnx.load(folder / MODEL, load_external_data=False)


def tensor(folder: Path, proto: TensorProto) -> np.ndarray:
    """One weight. 4-bit codes come as their packed bytes, flat; bfloat16 as ml_dtypes."""
    if proto.data_location != TensorProto.EXTERNAL:
        if proto.data_type in FOUR_BITS:
            return np.frombuffer(proto.raw_data, dtype=np.uint8)
        return numpy_helper.to_array(proto)
    place = {entry.key: entry.value for entry in proto.external_data}
    data: np.ndarray = np.memmap(
        folder / place["location"],
        dtype=np.uint8,
        mode="r",
        offset=int(place["offset"]),
        shape=(int(place["length"]),),
    )
    if proto.data_type in FOUR_BITS:
        return data
    return data.view(helper.tensor_dtype_to_np_dtype(proto.data_type)).reshape(tuple(proto.dims))
