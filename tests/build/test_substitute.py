"""What stands for FP4 and MX operators in ONNX Runtime: the same numbers, never another model."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from optpipe import microscaling, model
from optpipe.artifact import Artifact
from optpipe.bench.backend import backend_class
from optpipe.build import substitute
from optpipe.build.ort import Ort
from optpipe.build.twin import exact_graph
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError
from optpipe.export.graph import Graph, read, tensor
from optpipe.export.onnx import Onnx
from optpipe.export.weights import Weights
from optpipe.linear import Form
from optpipe.microscaling import BITS, BLOCK
from optpipe.quant.mxfp8 import Mxfp8
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.quant.w4a8 import W4a8
from optpipe.verify import TOLERANCES, verify


@pytest.fixture
def graph(run, tiny):
    """graph(dtype, activations) -> a model in nvfp4 (attention) and mxfp8, its canonical graph."""

    def make(dtype="float32", activations="none"):
        source = Artifact(path=tiny("qwen2"), format="hf", key="k")
        attention = Nvfp4(targets=["*.self_attn.*"], activations=activations, calib=run.calib)
        source = run(attention, source)
        source = run(Mxfp8(targets=["*.mlp.*"], head=True, activations=activations), source)
        return source, run(Onnx(dtype=dtype, capacity=64), source)

    return make


def weight_nodes(proto):
    stored = {t.name for t in proto.graph.initializer}
    return [n for n in proto.graph.node if n.op_type in substitute.BACK and n.input[0] in stored]


def test_every_weight_of_the_twin_is_that_of_the_model_and_of_its_bytes(graph, tmp_path):
    """Bit by bit: the torch model, what ml_dtypes reads in the graph, what ONNX Runtime gets."""
    source, made = graph()
    exact_graph(made.path, tmp_path)
    ours, twin = read(made.path), read(tmp_path)
    checkpoint, compared = Checkpoint(source.path), 0
    for folder, proto in ((made.path, ours), (tmp_path, twin)):
        arrays = {t.name: (t.data_type, t.dims, tensor(folder, t)) for t in proto.graph.initializer}
        maker = {n.output[0]: n for n in proto.graph.node}
        for node in weight_nodes(proto):
            if node.output[0].endswith(".steps"):
                continue
            layer = node.output[0].removesuffix(".dequantized")
            expected = model.layer(layer, checkpoint.forms, checkpoint).dequantize().T.numpy()
            got = decoded(arrays, maker, node)
            assert np.array_equal(got, expected), (layer, folder)
            compared += 1
    assert compared == 2 * 22
    assert not any(node.domain for node in twin.graph.node)


def decoded(arrays, maker, node):
    """A (K, N) weight by its definition, with the number formats of ml_dtypes."""
    dtype, dims, codes = arrays[node.input[0]]
    if dtype == TensorProto.FLOAT4E2M1:
        pairs = np.stack((codes & 15, codes >> 4), -1).reshape(-1)[: dims[0] * dims[1]]
        numbers = pairs.reshape(dims).view(ml_dtypes.float4_e2m1fn)
    else:
        numbers = codes
    if node.input[1] in arrays:
        scale_type, _, scales = arrays[node.input[1]]
        if scale_type == TensorProto.UINT8:
            scales = scales.view(ml_dtypes.float8_e8m0fnu)
        scales = scales.astype(np.float32)
    else:
        parts = [arrays[name][2].astype(np.float32) for name in maker[node.input[1]].input]
        scales = parts[0] * parts[1]
    size = next(a.i for a in node.attribute if a.name == "block_size")
    return numbers.astype(np.float32) * np.repeat(scales, size, axis=0)


@pytest.mark.parametrize("dtype, activations", [
    ("float32", "block"), ("float16", "block"), ("bfloat16", "none"),
])  # fmt: skip
def test_graphs_are_verified_through_what_stands_for_them(dtype, activations, graph):
    source, made = graph(dtype, activations)
    found = verify(made, source, None)
    rounds = activations == "block"
    exact = found["parity_float_activations" if rounds else "parity"]
    assert exact["kind"] == dtype and exact["worst"] < TOLERANCES[dtype]
    kind, bound = {"float32": ("rounded", 1e-6), "float16": ("four_bits", 0.2)}.get(
        dtype, (dtype, TOLERANCES[dtype])
    )
    assert found["parity"]["kind"] == kind and found["parity"]["mean"] < bound
    reason = "no bfloat16" if dtype == "bfloat16" else "no kernel of mxfp8 and nvfp4 on a CPU"
    assert reason in backend_class("onnx").missing(made)


@pytest.mark.parametrize("number", BLOCK)
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_arithmetic_in_blocks_is_the_rounding_of_the_torch_model_bit_by_bit(number, size, tmp_path):
    x = size * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 1, :32] = 0
    whole = microscaling.global_scale(x.abs().amax() / 2) if number == "nvfp4" else None
    graph = Graph(tmp_path)
    Weights(graph, None, torch.float32)._round_blocks("x", "y", number, whole)
    for names, name in ((graph.inputs, "x"), (graph.outputs, "y.rounded_in")):
        names.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "S", 64]))
    graph.save()
    proto = read(tmp_path)
    substitute.roundings(proto)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    got = session.run(None, {"x": x.numpy()})[0]
    assert np.array_equal(got, microscaling.round_blocks(x, number, whole).numpy())


def test_a_wrong_code_and_a_wrong_scale_of_inputs_are_found(graph):
    source, made = graph("float32", "block")
    proto = read(made.path)
    for weight in proto.graph.initializer:
        if weight.name.endswith(".input_scale"):
            value = numpy_helper.to_array(weight) / 64
            weight.raw_data = value.astype(np.float32).tobytes()
    (made.path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GateError, match=r"exceeds 5e-01 \(rounded\)"):
        verify(made, source, None)
    source, made = graph()
    with (made.path / "model.onnx.data").open("r+b") as data:
        place = next(t for t in read(made.path).graph.initializer
                     if t.name.endswith("q_proj.codes"))  # fmt: skip
        data.seek(int(next(e.value for e in place.external_data if e.key == "offset")))
        data.write(bytes([0x77] * 16))
    with pytest.raises(GateError, match="exceeds 2e-04"):
        verify(made, source, None)


def test_engines_of_onnx_runtime_hold_the_same_weights(graph, run):
    """nvfp4 as integers of 8 bits in blocks of 16, mxfp8 as fp8 with float scales."""
    source, made = graph()
    engine = run(Ort(), made)
    found = verify(engine, source, None)
    assert found["parity"]["kind"] == "int8"  # which inputs are rounded to at this level
    assert found["parity_float_activations"]["worst"] < TOLERANCES["float32"]
    nodes = [node.op_type for node in read(engine.path).graph.node]
    assert nodes.count("MatMulNBits") == 2 * 3 and nodes.count("DequantizeLinear") == 3 * 3 + 1
    assert not list(engine.path.glob("*substituted*")) and "blocks" not in engine.stats


@pytest.mark.parametrize("number", BLOCK)
def test_engines_that_would_round_inputs_in_blocks_are_refused(number):
    form = Form(rows=8, cols=64, bits=BITS[number], number=number, group_size=BLOCK[number])
    assert Ort().plan({"a": form})
    with pytest.raises(ValueError, match=f"'{number}_block', for which ONNX Runtime has no ker"):
        Ort().plan({"a": replace(form, inputs=f"{number}_block")})


def test_int4_weights_with_fp8_inputs_run_as_they_are(run, tiny):
    stage = W4a8(group_size=32, calib=run.calib)
    source = run(stage, Artifact(path=tiny(), format="hf", key="k"))
    made = run(Onnx(), source)
    assert not substitute.needed(read(made.path))
    found = verify(made, source, None)
    assert found["parity_float_activations"]["worst"] < TOLERANCES["float32"]
    assert found["parity"]["kind"] == "rounded"
