"""Twins without rounding: exact where the original is not, and never of another model."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from onnx import numpy_helper

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.bench.backend import backend_class
from optpipe.build.ort import Ort
from optpipe.build.tensorrt import TensorRT, about
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export.graph import read
from optpipe.export.onnx import Onnx
from optpipe.quant.fp8 import Fp8
from optpipe.quant.int8 import Int8
from optpipe.quant.rtn import Rtn
from optpipe.verify import TOLERANCES, verify

STAGES = [
    Int8(activations="token", head=True), Fp8(activations="token"), "int8 static", "fp8 static",
]  # fmt: skip


@pytest.fixture(params=STAGES, ids=str)
def rounded(request, run, tiny):
    """A family with biases in its layers, so that those are seen to stay."""
    stage = request.param
    if isinstance(stage, str):
        stage = (Int8 if stage.startswith("int8") else Fp8)(calib=run.calib)
    return run(stage, Artifact(path=tiny("qwen2"), format="hf", key="k"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_rounds_its_inputs_is_verified_without_and_with(dtype, rounded, run):
    graph = run(Onnx(dtype=dtype), rounded)
    artifacts = [graph] if dtype == "float16" else [graph, run(Ort(), graph)]
    for made in artifacts:
        found = verify(made, rounded, None)
        assert found["parity"]["kind"] == "rounded"
        exact = found["parity_float_activations"]
        assert exact["kind"] == dtype and exact["worst"] < TOLERANCES[dtype]
        assert exact["positions"] == found["parity"]["positions"] > 40


def test_a_wrong_weight_is_found_however_much_rounding_is_forgiven(run, tiny):
    source = run(Int8(activations="token"), Artifact(path=tiny(), format="hf", key="k"))
    made = run(Ort(), run(Onnx(), source))
    proto = read(made.path)
    scales = next(w for w in proto.graph.initializer if w.name.endswith("/integer.scales"))
    values = numpy_helper.to_array(scales).copy()
    values[0] *= 1.1
    scales.raw_data = values.tobytes()
    (made.path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GateError, match="exceeds 2e-04"):
        verify(made, source, None)


def test_a_scale_of_inputs_that_is_far_off_is_found(run, tiny):
    source = run(Int8(calib=run.calib), Artifact(path=tiny(), format="hf", key="k"))
    made = run(Onnx(), source)
    proto = read(made.path)
    for weight in proto.graph.initializer:
        if weight.name.endswith(".input_scale"):
            weight.raw_data = (numpy_helper.to_array(weight) / 8).astype(np.float32).tobytes()
    (made.path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GateError, match=r"exceeds 5e-01 \(rounded\)"):
        verify(made, source, None)


def test_the_checkpoint_s_twin_differs_in_nothing_but_rounding(rounded, tmp_path):
    from optpipe.build.twin import exact_checkpoint

    exact_checkpoint(rounded.path, tmp_path)
    ours, theirs = Checkpoint(tmp_path), Checkpoint(rounded.path)
    assert all(form.inputs is None for form in ours.forms.values())
    strip = [json.loads((c.path / "forms.json").read_text()) for c in (ours, theirs)]
    for forms in strip:
        for form in forms.values():
            form.pop("inputs")
    assert strip[0] == strip[1] and ours.files == theirs.files
    name = next(n for n, form in theirs.forms.items() if form.inputs)
    one, other = (model.layer(name, c.forms, c).dequantize() for c in (ours, theirs))
    assert (one == other).all()


def test_bfloat16_is_verified_in_float32_and_built(run, tiny):
    quantized = run(Rtn(group_size=32), Artifact(path=tiny(), format="hf", key="k"))
    graph = run(Onnx(dtype="bfloat16", capacity=64), quantized)
    found = verify(graph, quantized, None)["parity"]
    assert found["kind"] == "bfloat16" and 1e-4 < found["worst"] < TOLERANCES["bfloat16"]
    assert "no bfloat16" in backend_class("onnx").missing(graph)
    with pytest.raises(InputError, match="no bfloat16"):
        run(Ort(), graph)
    if find_spec("tensorrt_rtx"):
        made = run(TensorRT(package="tensorrt_rtx", max_batch=2, typical_prompt=16), graph)
        assert about(made.path)["plan"] == "engine.plan"
