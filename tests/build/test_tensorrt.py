"""Engines: what is asked of TensorRT, what is refused before any work, what the folder says.

Plans are built for real where tensorrt_rtx is installed, which needs no GPU; none is executed.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_builder
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from optpipe.artifact import Artifact
from optpipe.bench.backend import backend_class
from optpipe.bench.ort import Ort
from optpipe.build import nvidia, plan, tensorrt
from optpipe.build.nvidia import Package
from optpipe.build.tensorrt import TensorRT, about, check_files
from optpipe.build.validity import unfit
from optpipe.cache.static import KvCache
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.config import build, data_dir
from optpipe.errors import GateError, InputError
from optpipe.export.onnx import Onnx
from optpipe.linear import Form
from optpipe.prune.magnitude import Magnitude
from optpipe.stage import Limits
from optpipe.verify import check_full, verify

FULL = Package(name="tensorrt", version="11.4.0", gpu="sm90")
CALIB = Calib(source="random", samples=4, tokens=32)
RTX = Package(name="tensorrt_rtx", version="1.7.1", gpu=None)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(nvidia, "find_spec", lambda name: None)


@pytest.fixture
def graph(run, tiny):
    """The canonical graph of a model, in float16."""

    def make(folder=None, capacity=64, dtype="float16"):
        return run(Onnx(dtype=dtype, capacity=capacity), folder or tiny())

    return make


def test_the_yaml_shows_every_field_with_its_default():
    node = OmegaConf.load(data_dir("conf") / "build" / "tensorrt.yaml")
    assert build(node) == TensorRT()
    assert node.keys() - {"_target_"} == vars(TensorRT()).keys()


@pytest.mark.parametrize("fields, message", [
    ({"package": "trt"}, "package must be one of auto, tensorrt, tensorrt_rtx, got 'trt'"),
    ({"target": "sm91"}, "target must be one of null, current, sm75.*got 'sm91'"),
    ({"flags": ["fp16"]}, "flags must be one of weight_streaming, refit.*got 'fp16'"),
    ({"attention": "causal"}, "attention must be one of mask, lower_right, got 'causal'"),
    ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
    ({"max_prompt": 0}, "max_prompt must be at least 1"),
    ({"typical_prompt": -1}, "typical_prompt must be at least 1, got -1"),
    ({"workspace_mb": 0}, "workspace_mb must be at least 1"),
    ({"streaming_mb": 100}, "streaming_mb needs flag 'weight_streaming'"),
    ({"streaming_mb": 0, "flags": ["weight_streaming"]}, "streaming_mb must be at least 1"),
])  # fmt: skip
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TensorRT(**fields)


@pytest.mark.parametrize("form, target, message", [
    ({"bits": 4, "symmetric": False}, None, "zero points"),
    ({"bits": 8, "inputs": "int8_token"}, None, "int8_token"),
    ({"bits": 4}, "sm75", "4 bits, which sm75 cannot unpack"),
    ({"bits": 8, "number": "fp8", "inputs": "fp8_tensor"}, "sm86", "begin with sm89"),
    ({"bits": 8, "number": "mxfp8"}, "sm80", "mxfp8 weights, which begin with sm89"),
    ({"bits": 4, "number": "nvfp4", "inputs": "nvfp4_block"}, "sm89", "begin with sm100"),
    ({"bits": 4, "inputs": "fp8_tensor"}, None, "int4 weights and fp8 inputs"),
    ({"bits": 4, "inputs": "fp8_token"}, None, "rounds its inputs by 'fp8_token'"),
])  # fmt: skip
def test_layers_that_tensorrt_has_no_product_for_are_refused(form, target, message):
    layers = {"dense": Form(rows=4, cols=4), "odd": Form(rows=4, cols=4, **form)}
    with pytest.raises(ValueError, match=f"layer 'odd'.*{message}"):
        TensorRT(target=target).plan(layers)


def test_layers_that_it_has_are_not():
    forms = [{"bits": 8}, {"bits": 4}, {"bits": 8, "number": "fp8", "inputs": "fp8_tensor"},
             {"bits": 8, "inputs": "int8_tensor"},
             {"bits": 8, "number": "mxfp8", "inputs": "mxfp8_block"}]  # fmt: skip
    layers = {str(i): Form(rows=4, cols=4, **form) for i, form in enumerate(forms)}
    assert TensorRT(target="sm89").plan(layers) == layers


def test_tensorrt_builds_for_the_gpu_it_times_on():
    assert FULL.refuse_target("sm90") is None and FULL.refuse_target("current") is None
    assert "tensorrt 11.4.0 cannot build for sm89 here, only for sm90" in FULL.refuse_target("sm89")
    assert [FULL.refuse_flag(flag) for flag in nvidia.FLAGS] == [None] * 4


def test_what_tensorrt_for_rtx_cannot_do_has_a_reason():
    assert "lean runtime" in RTX.refuse_flag("version_compatible")
    assert "asks for a GPU" in RTX.refuse_flag("refit")
    assert "leave flag 'ampere_plus' out" in RTX.refuse_flag("ampere_plus")
    assert RTX.refuse_flag("weight_streaming") is None
    assert "no timing_cache" in TensorRT(timing_cache="timings")._refuse(RTX)


@pytest.fixture
def packages(monkeypatch):
    """packages(gpu) -> both are installed on a machine with this GPU, or None."""

    def install(gpu):
        rtx = SimpleNamespace(
            __version__="1.7.1", ComputeCapability=SimpleNamespace(__members__=["SM89", "SM120"])
        )
        found = {"tensorrt": fake_builder, "tensorrt_rtx": rtx}
        monkeypatch.setattr(nvidia, "find_spec", lambda name: name)
        monkeypatch.setattr(nvidia, "import_module", found.get)
        monkeypatch.setattr(nvidia, "gpu_target", lambda: gpu)
        monkeypatch.setattr(fake_builder, "configs", [])

    return install


@pytest.mark.parametrize("gpu, fields, package", [
    ("sm90", {}, "tensorrt"),
    ("sm90", {"target": "current"}, "tensorrt"),
    ("sm90", {"target": "sm90"}, "tensorrt"),
    ("sm90", {"target": "sm89"}, "tensorrt_rtx"),
    ("sm90", {"flags": ["version_compatible"]}, "tensorrt"),
    (None, {}, "tensorrt_rtx"),
])  # fmt: skip
def test_the_package_that_can_is_chosen(gpu, fields, package, packages):
    packages(gpu)
    found, why = TensorRT(**fields)._package()
    assert found.name == package and why is None


@pytest.mark.parametrize("gpu, package, runs", [
    ("sm90", "tensorrt", True), ("sm90", "tensorrt_rtx", False), ("sm89", "tensorrt_rtx", True),
    ("sm130", "tensorrt_rtx", True), (None, "tensorrt_rtx", False),
])  # fmt: skip
def test_a_gpu_that_runs_no_plan_is_told_so_before_any_work(
    gpu, package, runs, packages, tiny, caplog
):
    packages(gpu)
    stage = TensorRT(package=package)
    stage.inputs(Checkpoint(tiny()))
    assert stage._package()[0].runs_here == runs
    assert ("no plan that the sm90 here runs" in caplog.text) == (gpu is not None and not runs)


@pytest.mark.parametrize("gpu, fields, message", [
    (None, {"target": "sm90"}, r"tensorrt 11\.4.* GPU only; tensorrt_rtx 1\.7\.1 cannot "
     "build for sm90 here, only for sm89, sm120; tensorrt builds for the sm90 it runs on$"),
    ("sm80", {"target": "sm90"}, r"tensorrt 11\.4.* for sm90 here, only for sm80; tensorrt_rtx"),
    (None, {"target": "current"}, "only; target 'current' needs an NVIDIA GPU, and there is none$"),
    (None, {"flags": ["ampere_plus"]}, "only; tensorrt_rtx builds for sm80.* leave flag"),
    ("sm90", {"target": "sm89", "timing_cache": "t"}, "only for sm90; .* no timing_cache$"),
    ("sm90", {"package": "tensorrt", "target": "sm89"}, "cannot build for sm89 here, only"),
])  # fmt: skip
def test_what_no_package_can_build_has_the_reason_of_each(gpu, fields, message, packages):
    packages(gpu)
    with pytest.raises(InputError, match=message):
        TensorRT(**fields)._package()


@pytest.mark.parametrize("gpu, fields, refused", [
    ("sm80", {}, "sm80"), ("sm80", {"target": "current"}, "sm80"), ("sm87", {}, "sm87"),
    ("sm90", {}, None), ("sm90", {"flags": ["ampere_plus"]}, "sm80"),
    ("sm90", {"target": "sm89"}, None), (None, {}, None),
])  # fmt: skip
def test_layers_are_held_against_the_gpu_that_is_here(gpu, fields, refused, packages):
    packages(gpu)
    layers = {"fp8": Form(rows=4, cols=4, bits=8, number="fp8")}
    if refused is None:
        assert TensorRT(**fields).plan(layers) == layers
        return
    with pytest.raises(ValueError, match=f"'fp8' has fp8 weights.* sm89, not {refused}"):
        TensorRT(**fields).plan(layers)


def test_what_tensorrt_is_asked_for_on_a_gpu(packages, graph, run, tiny, tmp_path):
    """Options that TensorRT for RTX has not, and what is written once there is a GPU."""
    packages("sm90")
    cache = tmp_path / "timings"
    cache.write_bytes(b"known;")
    flags = ["weight_streaming", "refit", "version_compatible", "ampere_plus"]
    stage = TensorRT(flags=flags, streaming_mb=7, workspace_mb=64, timing_cache=str(cache))
    made = run(stage, graph(run(Magnitude(pattern="2:4"), tiny())))
    (config,) = fake_builder.configs
    assert config.flags == {"WEIGHT_STREAMING", "REFIT", "VERSION_COMPATIBLE", "SPARSE_WEIGHTS"}
    assert config.hardware_compatibility_level == "ampere+"
    assert config.pools == {"workspace": 64_000_000}
    assert config.profiling_verbosity == "detailed"
    assert config.cache.known == b"known;" and cache.read_bytes() == b"known;timed;"
    assert [shapes["input_ids"] for shapes in config.profiles] == [
        ((1, 1), (1, 64), (16, 64)), ((1, 1), (1, 1), (16, 1))
    ]  # fmt: skip
    told = about(made.path)
    assert told["target"] == "sm80 and later" and told["streaming_mb"] == 7
    assert told["flags"] == [*flags, "sparse_weights"] and told["gpu"] == "sm90"
    assert json.loads((made.path / tensorrt.INSPECTED).read_text()) == {"Layers": ["one"]}
    assert tensorrt.INSPECTED in told["sha256"]
    for gpu, why in (("sm80", None), ("sm120", None), ("sm75", "is for sm80 and later")):
        found = unfit(fake_builder, made.path / tensorrt.PLAN, told, gpu)
        assert found is why or why in found


@pytest.mark.parametrize("content", [b"other GPU;", b"junk"])
def test_timings_of_another_gpu_are_left_alone(content, packages, graph, run, tmp_path, caplog):
    packages("sm90")
    cache = tmp_path / "timings"
    cache.write_bytes(content)
    assert about(run(TensorRT(timing_cache=str(cache)), graph()).path)["plan"]
    assert fake_builder.configs[0].cache is None and cache.read_bytes() == content
    assert "timings' is of another GPU or another TensorRT; the plan is built" in caplog.text


def test_a_plan_of_tensorrt_is_for_its_gpu(packages, graph, run):
    packages("sm90")
    told = about(run(TensorRT(), graph()).path)
    assert told["target"] == "sm90" and told["flags"] == []
    assert "for sm90, the GPU here is sm89" in unfit(fake_builder, Path("p"), told, "sm89")


def test_what_the_builder_says_is_in_the_error(packages, graph, run, monkeypatch):
    packages("sm90")
    monkeypatch.setattr(fake_builder.Builder, "refuses", "no kernel for this")
    with pytest.raises(RuntimeError, match="TensorRT built nothing: no kernel for this"):
        run(TensorRT(), graph())


def test_without_a_package_the_message_says_what_to_install(no_package):
    with pytest.raises(InputError) as error:
        nvidia.find("auto")
    text = str(error.value)
    assert "'tensorrt' is not installed; package 'tensorrt_rtx' is not installed" in text
    assert "'optpipe[tensorrt-rtx]' or 'optpipe[tensorrt]' (the first builds without a GPU)" in text
    for asked in ({"package": "tensorrt"}, {"target": "sm89"}, {"flags": ["refit"]}):
        with pytest.raises(InputError, match="is not installed"):
            TensorRT(**asked).inputs(Checkpoint(Path(tensorrt.__file__).parents[1] / "demo"))


def test_tensorrt_without_a_gpu_builds_nothing(monkeypatch):
    class Module:
        __version__ = "11.4.0.106"

    monkeypatch.setattr(nvidia, "find_spec", lambda name: Module if name == "tensorrt" else None)
    monkeypatch.setattr(nvidia, "import_module", lambda name: Module)
    monkeypatch.setattr(nvidia, "gpu_target", lambda: None)
    with pytest.raises(InputError, match="builds on a machine with an NVIDIA GPU only"):
        nvidia.find("auto")
    monkeypatch.setattr(nvidia, "gpu_target", lambda: "sm90")
    assert nvidia.find("auto") == Package(name="tensorrt", version="11.4.0.106", gpu="sm90")
    Module.__version__ = "10.14.1.48"
    with pytest.raises(InputError, match=r"10\.14\.1\.48 cannot read TensorScatter, 10\.15 or"):
        nvidia.find("tensorrt")


def test_without_a_package_the_graph_is_checked_and_the_folder_says_why(
    no_package, graph, tiny, run
):
    made = run(TensorRT(), graph())
    told = about(made.path)
    assert told["plan"] is None and "is not installed" in told["not_built"]
    assert not (made.path / tensorrt.PLAN).exists()
    found = verify(made, Artifact(path=tiny(), format="hf", key="k"), None)
    assert found["parity"]["positions"] > 40 and "parity_plan" not in found
    assert "no plan was built: package" in backend_class("tensorrt").missing(made)


def test_ranges_are_those_of_the_two_phases():
    found = plan.ranges(max_batch=8, max_prompt=64, typical_prompt=128)
    assert found["prefill"] == {"B": (1, 1, 8), "S": (1, 64, 64), "L": (1, 1, 64)}
    assert found["decode"] == {"B": (1, 1, 8), "S": (1, 1, 1), "L": (1, 1, 1)}
    assert plan.ranges(1, 4096, 128)["prefill"]["L"] == (1, 1, plan.LOGITS)


@given(st.integers(1, 64), st.integers(1, 8192), st.integers(1, 8192))
def test_ranges_never_decrease(max_batch, max_prompt, typical_prompt):
    """A prompt that prefill is tuned for fits; both profiles take as many rows."""
    found = plan.ranges(max_batch, max_prompt, typical_prompt)
    for sizes in found.values():
        assert all(1 <= least <= typical <= most for least, typical, most in sizes.values())
        assert sizes["B"][2] == max_batch and sizes["L"][2] <= sizes["S"][2]
    assert found["prefill"]["S"][2] == max_prompt


def test_every_size_that_varies_has_a_range_and_the_cache_keeps_its_capacity(graph):
    model = onnx.load(graph().path / "model.onnx", load_external_data=False).graph
    found = plan.shapes(model, plan.ranges(8, 64, 16)["prefill"])
    assert found.keys() == {value.name for value in model.input}
    assert found["input_ids"] == ((1, 1), (1, 16), (8, 64))
    assert found["past_key_values.2.value"] == ((1, 2, 64, 16), (1, 2, 64, 16), (8, 2, 64, 16))
    assert found["write_indices"] == ((1,), (1,), (8,))


def test_a_prompt_beyond_the_cache_is_refused(graph, tiny, run):
    with pytest.raises(InputError, match=r"max_prompt 129 exceeds export.capacity 128"):
        TensorRT(max_prompt=129).follow([Onnx()], Checkpoint(tiny()))
    with pytest.raises(InputError, match=r"max_prompt 65 exceeds export.capacity 64"):
        TensorRT(max_prompt=65).follow([Onnx(capacity=64)], Checkpoint(tiny()))
    TensorRT(max_prompt=64).follow([Onnx(capacity=64)], Checkpoint(tiny()))
    with pytest.raises(InputError, match=r"max_prompt 65 exceeds export.capacity 64"):
        run(TensorRT(max_prompt=65), graph())


def test_the_rows_of_a_plan_are_limited_and_the_tokens_of_its_graph(tiny):
    model = Checkpoint(tiny())
    found = TensorRT(max_batch=3).limits(Onnx(capacity=64).limits(Limits(tokens=128), model), model)
    assert found == Limits(
        tokens=64, tokens_key="export.capacity", rows=3, rows_key="build.max_batch"
    )


def test_a_quantized_cache_is_refused(graph, run, tiny):
    quantized = run(KvCache(calib=CALIB), tiny())
    with pytest.raises(InputError, match="caches of floats only"):
        run(TensorRT(), graph(quantized))
    for earlier, source in (([KvCache(), Onnx()], tiny()), ([Onnx()], quantized.path)):
        with pytest.raises(InputError, match="caches of floats only"):
            TensorRT().follow(earlier, Checkpoint(source))


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_an_engine_that_takes_more_than_it_holds_is_refused(no_package, graph, run, monkeypatch):
    made = replace(run(TensorRT(), graph()), format="onnx")
    check_full(made)
    monkeypatch.setattr(Ort, "score", lambda self, ids: ids)
    with pytest.raises(GateError, match="takes more than the 64 tokens it holds"):
        check_full(made)


def test_options_reach_the_builder(graph, run, rtx, monkeypatch):
    """Weight streaming, a target and a limit of scratch memory, as the builder has them."""
    configs, configure = [], plan._configure

    def spy(trt, config, request, sparse):
        configure(trt, config, request, sparse)
        configs.append(config)
        flags = [flag for flag in trt.BuilderFlag.__members__.values() if config.get_flag(flag)]
        configs.append({flag.name for flag in flags})
        configs.append(config.get_compute_capability(0).name)
        configs.append(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))

    monkeypatch.setattr(plan, "_configure", spy)
    steps = []
    source, out = graph(), run
    stage = TensorRT(target="sm89", flags=["weight_streaming"], workspace_mb=64, max_batch=2,
                     attention="lower_right")  # fmt: skip
    monkeypatch.setattr(plan, "reporter", _recording(plan.reporter, steps))
    let_go = []
    monkeypatch.setattr(plan.libc, "page_out", let_go.append)
    made = out(stage, source)
    assert {"WEIGHT_STREAMING", "TF32"} == configs[1]
    assert configs[2:] == ["SM89", 64_000_000]
    assert about(made.path)["target"] == "sm89"
    assert about(made.path)["attention"] == "lower_right"
    assert about(made.path)["profiles"]["decode"]["input_ids"] == [[1, 1], [1, 1], [2, 1]]
    assert steps and all(0 < done <= total for _, done, total in steps)
    assert let_go == [made.path / tensorrt.DATA]


def _recording(reporter, steps):
    def record(trt, progress):
        return reporter(trt, lambda *step: (steps.append(step), progress(*step)))

    return record


def test_ctrl_c_ends_the_build(graph, run, rtx, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    reporter = plan.reporter
    monkeypatch.setattr(plan, "reporter", lambda trt, progress: reporter(trt, interrupt))
    with pytest.raises(KeyboardInterrupt):
        run(TensorRT(), graph())


def test_what_the_parser_does_not_know_is_named(graph, run, rtx, tiny):
    source = graph()
    model = onnx.load(source.path / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            node.op_type = "TensorGather"
    (source.path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RuntimeError, match="cannot read the graph: TensorGather"):
        run(TensorRT(), source)


@pytest.mark.parametrize("target, message", [
    ("sm90", "cannot build for sm90 here, only for sm75, sm80"),
    ("current", "needs an NVIDIA GPU"),
])  # fmt: skip
def test_targets_are_those_of_the_package(target, message, rtx, tiny, monkeypatch):
    monkeypatch.setattr(nvidia, "gpu_target", lambda: None)
    stage = TensorRT(package="tensorrt_rtx", target=target)
    with pytest.raises(InputError, match=message):
        stage.inputs(Checkpoint(tiny()))


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """An engine of float16 weights, made once."""
    pytest.importorskip("tensorrt_rtx")
    graph, engine = (tmp_path_factory.mktemp(name) for name in ("graph", "engine"))
    source = Artifact(path=tiny(), format="hf", key="k")
    stats = Onnx(dtype="float16", capacity=64).run(source, graph, lambda *_: None)
    source = Artifact(path=graph, format="onnx", key="k", stats=stats)
    TensorRT().run(source, engine, lambda *_: None)
    return engine


@pytest.fixture
def engine(built, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(built, tmp_path / "copy")
    return Artifact(path=tmp_path / "copy", format="tensorrt", key="k")


@pytest.mark.parametrize("name", ["engine.plan", "model.onnx.data", "config.json"])
def test_files_that_changed_are_not_verified(name, engine):
    check_files(engine.path)
    content = (engine.path / name).read_bytes()
    (engine.path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(GateError, match=f"{name}' is not the file"):
        check_files(engine.path)


def test_bytes_that_are_no_plan_are_refused(engine):
    told, junk = about(engine.path), b"x" * 4096
    (engine.path / tensorrt.PLAN).write_bytes(junk)
    told["sha256"][tensorrt.PLAN] = hashlib.sha256(junk).hexdigest()
    (engine.path / tensorrt.SIDECAR).write_text(json.dumps(told))
    with pytest.raises(GateError, match=r"engine.plan' is not a plan that tensorrt_rtx"):
        check_files(engine.path)


def test_a_plan_is_not_loaded_where_it_cannot_run(engine, monkeypatch):
    made, missing = engine, backend_class("tensorrt").missing
    where = "optpipe.bench.tensorrt"
    monkeypatch.setattr(f"{where}.gpu_target", lambda: None)
    assert missing(made) == "there is no NVIDIA GPU here; the plan is for " + nvidia.PORTABLE
    monkeypatch.setattr(f"{where}.gpu_target", lambda: "sm90")
    assert "TensorRT-RTX says that sm90 cannot run the plan" in missing(made)  # no driver here
    told = about(made.path)
    (made.path / tensorrt.SIDECAR).write_text(json.dumps({**told, "version": "1.6.0"}))
    assert "the plan is of tensorrt_rtx 1.6.0, installed is" in missing(made)
    (made.path / tensorrt.SIDECAR).write_text(json.dumps({**told, "package": "tensorrt_xl"}))
    assert missing(made) == "package 'tensorrt_xl' is not installed"
