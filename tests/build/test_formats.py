"""Every format of weights: the plan that TensorRT makes of it in every family, and the values of
the very ONNX file on ONNX Runtime.

Plans are built for real where tensorrt_rtx is installed, which needs no GPU; none is executed.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from optpipe.artifact import Artifact
from optpipe.bench.backend import open_backend
from optpipe.build import nvidia, substitute, tensorrt
from optpipe.build.generate import Engine
from optpipe.build.tensorrt import TensorRT, about, check_files
from optpipe.build.twin import exact_checkpoint, exact_graph, runnable_graph
from optpipe.build.validity import malformed
from optpipe.calibrate import Calib
from optpipe.checkpoint import copy_side_files
from optpipe.export.onnx import Onnx
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.fp8 import Fp8
from optpipe.quant.int8 import Int8
from optpipe.quant.mxfp8 import Mxfp8
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.quant.rtn import Rtn
from optpipe.residual.qera import Qera

CALIB = Calib(source="random", samples=4, tokens=32)
CAPACITY, PROMPT, CHUNK = 32, 9, 20
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1,
         "layer_types": None}  # fmt: skip
"""One block; groups of 256 fit every layer."""
FAMILIES = {
    "llama": SIZES,
    "qwen3": SIZES,
    "phi3": SIZES,
    "gemma2": SIZES,
    "gpt2": {"n_embd": 256, "n_inner": 256, "n_layer": 1},
}
WEIGHTS = {
    "fp16": [],
    "bf16": [],
    "int4 g32": [Rtn(bits=4, group_size=32)],
    "int4 g64": [Rtn(bits=4, group_size=64)],
    "int4 g128": [Rtn(bits=4, group_size=128)],
    "int4 g256": [Rtn(bits=4, group_size=256)],
    "int8 channel": [Rtn(bits=8, group_size=-1)],
    "int8 W8A8": [Int8(calib=CALIB)],
    "fp8 W8A8": [Fp8(calib=CALIB)],
    "fp8 channel": [Rtn(number="fp8", bits=8, group_size=-1)],
    "nvfp4 W4A4": [Nvfp4(activations="block", method="rtn", clip="minmax", calib=CALIB)],
    "mxfp8 W8A8": [Mxfp8(activations="block")],
    "2:4": [Magnitude(pattern="2:4")],
    "low rank": [Svd(keep=0.8, rank_multiple=4)],
    "corrected": [Rtn(bits=4, group_size=32), Qera(rank=8, calib=CALIB)],
}
VARIANTS = {
    "int4 channel": [Rtn(bits=4, group_size=-1)],
    "int3 g32": [Rtn(bits=3, group_size=32)],
    "int8 g32": [Rtn(bits=8, group_size=32)],
    "fp8 W8A8, one scale a channel": [Fp8(weights="channel", calib=CALIB)],
    "nvfp4": [Nvfp4(method="rtn", clip="mse")],
    "mxfp8": [Mxfp8()],
}
"""Of these formats, built in one family."""
FORMATS = WEIGHTS | VARIANTS
PAIRS = [(family, form) for family in FAMILIES for form in WEIGHTS]
PAIRS += [("llama", form) for form in VARIANTS]
STORED = {"int4": "INT4", "int3": "INT4", "int8": "INT8", "fp8": "FLOAT8E4M3FN",
          "nvfp4": "FLOAT4E2M1", "mxfp8": "FLOAT8E4M3FN", "corrected": "INT4",
          "bf16": "BFLOAT16"}  # fmt: skip
"""Type of the weights in the graph, by the first word of a format; else float16."""
SHAPES = {"low rank": (256, 100)}
TARGETS = {"FLOAT8E4M3FN": nvidia.PORTABLE_FP8, "FLOAT4E2M1": nvidia.PORTABLE_FP4}


@pytest.fixture
def exported(run, tiny):
    """exported(family, form) -> the torch model in that format, and its canonical graph."""

    def make(family, form):
        untouched = tiny(family, **FAMILIES[family])
        source = Artifact(path=untouched, format="hf", key="k")
        for stage in FORMATS[form]:
            source = run(stage, source, untouched)
        dtype = "bfloat16" if form == "bf16" else "float16"
        return source, run(Onnx(dtype=dtype, capacity=CAPACITY), source)

    return make


@pytest.mark.parametrize("family, form", PAIRS)
def test_a_plan_is_built(family, form, exported, run):
    rtx = pytest.importorskip("tensorrt_rtx")
    _, exported_graph = exported(family, form)
    made = run(TensorRT(), exported_graph)
    assert_whole(made, rtx)
    graph = onnx.load(made.path / "model.onnx", load_external_data=False).graph
    number, shape = STORED.get(form.split()[0], "FLOAT16"), SHAPES.get(form, (256, 256))
    stored = {(onnx.TensorProto.DataType.Name(t.data_type), *t.dims) for t in graph.initializer}
    assert (number, *shape) in stored
    told = about(made.path)
    assert told["flags"] == (["sparse_weights"] if form == "2:4" else [])
    assert told["target"] == TARGETS.get(number, nvidia.PORTABLE)
    assert (made.path / "model.onnx").samefile(exported_graph.path / "model.onnx")


def assert_whole(made, rtx):
    """A plan that TensorRT recognizes, and a sidecar that says all of it."""
    check_files(made.path)
    file, told = made.path / tensorrt.PLAN, about(made.path)
    assert not malformed(rtx, file) and malformed(rtx, made.path / tensorrt.DATA)
    assert told["package"] == "tensorrt_rtx" and told["version"] == rtx.__version__
    assert set(told["sha256"]) == {f.name for f in made.path.iterdir()} - {tensorrt.SIDECAR}
    graph = onnx.load(made.path / "model.onnx", load_external_data=False).graph
    tensors = {entry["name"]: entry for entry in told["tensors"]}
    assert tensors.keys() == {v.name for v in (*graph.input, *graph.output)}
    assert tensors["logits"]["shape"] == ["B", "L", 288]
    assert tensors["logits"]["dtype"] in ("half", "bf16")
    assert tensors["past_key_values.0.key"]["shape"][0] == "B"
    assert list(told["profiles"]) == ["prefill", "decode"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_graph_computes_what_the_torch_model_computes(form, exported, tmp_path):
    """An input that lies between two codes goes up on one side and down on the other: without
    the rounding of inputs, both sides are as close as without codes. ONNX Runtime multiplies no
    bfloat16: its values are computed with in float32."""
    source, made = exported("llama", form)
    if "W8A8" in form or "W4A4" in form:
        tolerance = 0.3 if form == "nvfp4 W4A4" else 0.1
        assert_right_at_every_depth(runnable(made, tmp_path / "same"), source, tolerance)
        source = unrounded(source, tmp_path / "model")
    if source.path == tmp_path / "model" or form == "bf16":
        made = unrounded(made, tmp_path / "graph")
    folder = runnable(made, tmp_path / "twin")
    assert_right_at_every_depth(folder, source, 3e-2 if form == "bf16" else 5e-3)


def unrounded(artifact, folder):
    """With the same weights, inputs as they come; bfloat16 values in float32."""
    folder.mkdir()
    if artifact.format == "hf":
        exact_checkpoint(artifact.path, folder)
    else:
        exact_graph(artifact.path, folder)
        copy_side_files(artifact.path, folder)
    return replace(artifact, path=folder)


def runnable(artifact, folder):
    """What ONNX Runtime runs: the very bytes, or what stands for operators that it lacks."""
    if not substitute.needed(onnx.load(artifact.path / "model.onnx", load_external_data=False)):
        return artifact.path
    folder.mkdir()
    runnable_graph(artifact.path, folder)
    copy_side_files(artifact.path, folder)
    return folder


def assert_right_at_every_depth(folder, source, tolerance):
    """Rows of different lengths, a chunk, decoding until the cache is full."""
    ids = np.random.default_rng(0).integers(3, 288, (2, CAPACITY + 1))
    torch_side, ours = open_backend(source), Engine(folder, 1)
    calls = [lambda b: b.prefill(ids[:, :PROMPT], np.array([PROMPT, 4]))]
    calls += [lambda b: b.extend(ids[:, PROMPT:CHUNK])]
    calls += [lambda b, t=t: b.decode(ids[:, t]) for t in range(CHUNK, CAPACITY)]
    for call in calls:
        got, expected = call(ours), call(torch_side)
        assert np.sqrt(np.mean((got - expected) ** 2)) < tolerance * expected.std()
    with pytest.raises(ValueError, match="33 tokens exceed the engine's capacity of 32"):
        ours.decode(ids[:, CAPACITY])
