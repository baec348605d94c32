"""2:4 weights of every type are found, and TensorRT builds with sparse kernels allowed."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from optpipe import model
from optpipe.build.sparse24 import CODE, TYPES, is24, sparse24
from optpipe.build.tensorrt import TensorRT, about
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.int8 import Int8
from optpipe.quant.rtn import Rtn


def proto(values, dtype):
    """A weight as the exporter stores it: its bytes, two 4-bit codes in one."""
    if dtype in CODE:
        codes = values if dtype == TensorProto.INT4 else np.where(values < 0, 8 - values, values)
        nibbles = codes.astype(np.uint8).reshape(-1, 2) & 15
        raw = nibbles[:, 0] | nibbles[:, 1] << 4
    else:
        raw = values.astype(helper.tensor_dtype_to_np_dtype(dtype))
    return TensorProto(dims=values.shape, data_type=dtype, raw_data=raw.tobytes())


@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([*TYPES]), st.integers(0, 2**32))
def test_at_most_two_of_four_inputs_of_an_output(fours, cols, dtype, seed):
    """Against a count one by one, of weights that are about half zero, and of masked ones."""
    random = np.random.default_rng(seed)
    values = random.integers(-7, 8, (4 * fours, cols)) * random.integers(0, 2, (4 * fours, cols))
    worst = max(
        np.count_nonzero(values[4 * four : 4 * four + 4, col])
        for four in range(fours) for col in range(values.shape[1])
    )  # fmt: skip
    assert is24(None, proto(values, dtype)) == (worst <= 2)
    mask = np.tile([[1], [0], [0], [1]], (fours, values.shape[1]))
    assert is24(None, proto(values * mask, dtype))


def test_inputs_that_are_no_multiple_of_four_are_not():
    assert not is24(None, proto(np.zeros((6, 2)), TensorProto.FLOAT16))


@pytest.mark.parametrize("pattern, dtype, expected", [
    (None, "float16", {}), ("4:8", "float16", {}), ("2:4", "float16", {"float16": 21}),
    ("2:4", "bfloat16", {"bfloat16": 21}), ("2:4", "float32", {"float32": 21}),
])  # fmt: skip
def test_weights_that_are_no_codes(pattern, dtype, expected, run, tiny):
    source = run(Magnitude(pattern=pattern), tiny()) if pattern else tiny()
    assert sparse24(run(Onnx(dtype=dtype, capacity=64), source).path) == expected


def test_codes_of_2_4_weights_are_2_4(run, tiny):
    """Sparse kernels are allowed for all of them, and TensorRT builds it."""
    layers = [name for name in model.layers(Checkpoint(tiny())) if name != "lm_head"]
    source = run(Magnitude(pattern="2:4"), tiny())
    methods = [Rtn(bits=4, group_size=32, targets=layers[0::4]),
               Int8(targets=layers[1::4], calib=Calib(source="random", samples=4, tokens=32)),
               Rtn(number="fp8", bits=8, group_size=-1, targets=layers[2::4])]  # fmt: skip
    for method in methods:
        source = run(method, source)
    graph = run(Onnx(dtype="float16", capacity=64), source)
    expected = {"int4": 6, "int8": 5, "fp8": 5, "float16": 5}
    assert sparse24(graph.path) == expected
    pytest.importorskip("tensorrt_rtx")
    told = about(run(TensorRT(), graph).path)
    assert told["sparse24"] == expected and told["flags"] == ["sparse_weights"]


def test_codes_of_other_weights_are_not(run, tiny):
    source = run(Rtn(bits=8, group_size=-1), tiny())
    assert sparse24(run(Onnx(dtype="float16", capacity=64), source).path) == {}
    assert onnx.TensorProto.INT8 in TYPES
