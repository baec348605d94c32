"""Products of int8 inputs and int8 weights to com.microsoft.MatMulIntegerToFloat.

It adds up in 32-bit integers, so that its results are those of the canonical graph, whose
DequantizeLinear nodes put the same integers through floating point. Inputs become unsigned with a
zero point of 128, for which x86 has its instructions; they keep their range, -128 to 127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto

from optpipe.build.match import CONTRIB, Product
from optpipe.export.graph import Graph

if TYPE_CHECKING:
    from optpipe.build.lower import Lowering

MIDDLE = 128
"""The unsigned code of zero."""


def takes(lowering: Lowering, product: Product) -> bool:
    """Whether both sides are int8, the weight with a scale per channel, and floats are float32."""
    quantize, dequantize = product.rounded, product.dequantize
    assert quantize is not None
    blocks = any(attribute.name == "block_size" for attribute in dequantize.attribute)
    scales = lowering.weights[dequantize.input[1]]
    return (
        _codes(lowering, quantize) == product.dtype == TensorProto.INT8
        and not blocks
        and len(dequantize.input) == 2
        and len(scales.dims) == 1
        and scales.data_type == TensorProto.FLOAT
    )


def emit(lowering: Lowering, products: list[Product], output: str) -> str:
    """One operator for projections of the same x, side by side; a scale per token follows it."""
    quantize, new = products[0].rounded, lowering.new
    assert quantize is not None
    x, scale = quantize.input[:2]
    static, name = scale in lowering.weights, f"{output}/integer"
    steps = x if static else _once(new, "Div", [x, scale], f"{quantize.output[0]}/steps")
    step = scale if static else new.constant("1.0", np.array(1, np.float32))
    zero = new.constant("middle", np.array(MIDDLE, np.uint8))
    codes = _once(new, "QuantizeLinear", [steps, step, zero], f"{quantize.output[0]}/unsigned")
    weights = [[lowering.weight(p.dequantize.input[i]) for p in products] for i in (0, 1)]
    stored = new.constant(f"{name}.codes", np.concatenate(weights[0], axis=1))
    scales = new.constant(f"{name}.scales", np.concatenate(weights[1]))
    inputs = [codes, stored, step, scales, zero]
    biases = lowering.biases(products, f"{name}.bias") if products[0].bias else ""
    if static:
        inputs += ["", biases] if biases else []
        return new.node("MatMulIntegerToFloat", inputs, output, domain=CONTRIB)
    y = new.node("MatMulIntegerToFloat", inputs, f"{output}/steps", domain=CONTRIB)
    if not biases:
        return new.node("Mul", [y, scale], output)
    y = new.node("Mul", [y, scale], f"{output}/scaled")
    return new.node("Add", [y, biases], output)


def _codes(lowering: Lowering, quantize: NodeProto) -> int:
    """The element type of what QuantizeLinear makes."""
    if len(quantize.input) > 2:
        return int(lowering.weights[quantize.input[2]].data_type)
    return int(next(a.i for a in quantize.attribute if a.name == "output_dtype"))


def _once(new: Graph, op: str, inputs: list[str], output: str) -> str:
    """Append a node unless another projection of the same inputs has."""
    if all(node.output[0] != output for node in new.nodes):
        new.node(op, inputs, output)
    return output
