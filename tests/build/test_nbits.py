"""The layout of MatMulNBits against the operator itself."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from optpipe.build.nbits import block_codes, concatenate


def product(x, codes):
    """x @ W.T by ONNX Runtime."""
    weights = [numpy_helper.from_array(a, n) for a, n in ((codes.blocks, "B"), (codes.scales, "s"))]
    names = ["x", "B", "s"]
    if codes.zeros is not None:
        weights.append(numpy_helper.from_array(codes.zeros, "z"))
        names.append("z")
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=codes.inputs,
        N=codes.blocks.shape[0], bits=codes.bits, block_size=codes.block_size, accuracy_level=1,
    )  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def packed(values_KN, dtype):
    """As ONNX stores it: 4-bit integers two a byte."""
    tensor = helper.make_tensor("w", dtype, values_KN.shape, values_KN.reshape(-1))
    raw = onnx.numpy_helper.to_array(tensor)
    if dtype in (TensorProto.INT4, TensorProto.UINT4):
        nibbles = values_KN.reshape(-1).astype(np.int64) & 15
        nibbles = np.pad(nibbles, (0, nibbles.size % 2))
        return tensor, (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)
    return tensor, raw


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([4, 8]), signed=st.booleans(), blocks=st.integers(1, 5),
    outputs=st.integers(1, 7), per_channel=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_operator_multiplies_with_our_weight(bits, signed, blocks, outputs, per_channel, seed):
    rng = np.random.default_rng(seed)
    inputs = 32 * blocks
    low = -(2 ** (bits - 1)) if signed else 0
    values = rng.integers(low, low + 2**bits, (inputs, outputs))
    dtype = {(4, True): TensorProto.INT4, (4, False): TensorProto.UINT4,
             (8, True): TensorProto.INT8, (8, False): TensorProto.UINT8}[bits, signed]  # fmt: skip
    tensor, data = packed(values, dtype)
    groups = 1 if per_channel else blocks
    scales = rng.uniform(0.5, 1.5, (groups, outputs)).astype(np.float32)
    zeros = None if signed else rng.integers(0, 2**bits, (groups, outputs))
    repeated = [
        np.repeat(a, inputs // groups, 0) for a in (scales, 0 * scales if signed else zeros)
    ]
    weight = (values - repeated[1]) * repeated[0]
    zero_data = None if zeros is None else packed(zeros, dtype)[1]
    codes = block_codes(
        data, tensor, scales[0] if per_channel else scales, zero_data, 0 if per_channel else 32
    )
    x = rng.standard_normal((3, inputs)).astype(np.float32)
    expected = x @ weight.astype(np.float32)
    np.testing.assert_allclose(product(x, codes), expected, rtol=1e-4, atol=1e-3 * 2**bits / 16)
    both = concatenate([codes, codes])
    np.testing.assert_array_equal(product(x, both), np.tile(product(x, codes), 2))


def test_inputs_that_no_block_divides_are_padded_with_nothing():
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (200, 4))
    tensor, data = packed(values, TensorProto.INT4)
    scales = rng.uniform(0.5, 1.5, 4).astype(np.float32)
    codes = block_codes(data, tensor, scales, None, 0)
    assert codes.blocks.shape == (4, 2, 64)
    x = rng.standard_normal((2, 200)).astype(np.float32)
    np.testing.assert_allclose(product(x, codes), x @ (values * scales), rtol=1e-4, atol=1e-3)


@pytest.fixture(autouse=True)
def _quiet():
    onnxruntime.set_default_logger_severity(3)
