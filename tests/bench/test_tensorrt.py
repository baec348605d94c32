"""The TensorRT backend against ONNX Runtime's own loader, through a stand-in for TensorRT.

No TensorRT executes anything here: the stand-in has the calls (tests/build/test_tensorrt_api.py
holds them against the real signatures) and runs the graph of the engine on the CPU.
"""

import json

import fake_trt
import numpy as np
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench import tensorrt as backend
from optpipe.bench.backend import open_backend
from optpipe.build import nvidia, plan
from optpipe.build.generate import Engine
from optpipe.build.tensorrt import PLAN, SIDECAR, TensorRT
from optpipe.export.graph import read
from optpipe.export.onnx import Onnx

CAPACITY, MAX_BATCH, MAX_PROMPT = 48, 4, 16


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def package(request):
    return request.param


@pytest.fixture
def engine(run, tiny, package, monkeypatch):
    """engine(family) -> (backend on the stand-in, the loader that ONNX Runtime engines ship)."""
    monkeypatch.setattr(nvidia, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "import_module", lambda name: fake_trt)
    monkeypatch.setattr(backend, "Cuda", fake_trt.Host)
    monkeypatch.setattr(fake_trt.Engine, "contexts", [])

    def make(family="llama", dtype="float32", **more):
        graph = run(Onnx(dtype=dtype, capacity=CAPACITY), tiny(family))
        made = run(TensorRT(max_batch=MAX_BATCH, max_prompt=MAX_PROMPT), graph)
        write_sidecar(made.path, package, **more)
        (made.path / PLAN).write_bytes(str(made.path).encode())
        return open_backend(made), Engine(made.path, 1)

    return make


def write_sidecar(folder, package, flags=(), streaming_mb=None):
    """What the builder would have written."""
    graph = read(folder).graph
    names = {10: "half", 1: "float", 7: "int64"}
    tensors = [
        {"name": value.name, "mode": mode, "shape": plan._dims(value),
         "dtype": names[value.type.tensor_type.elem_type]}
        for mode, values in (("input", graph.input), ("output", graph.output)) for value in values
    ]  # fmt: skip
    sizes = plan.ranges(MAX_BATCH, MAX_PROMPT, MAX_PROMPT)
    profiles = {name: plan.shapes(graph, size) for name, size in sizes.items()}
    told = json.loads((folder / SIDECAR).read_text())
    told |= {"plan": PLAN, "package": package, "version": fake_trt.__version__}
    told |= {"flags": [*flags], "streaming_mb": streaming_mb}
    told |= {"max_batch": MAX_BATCH, "max_prompt": MAX_PROMPT}
    told |= {"tensors": tensors, "profiles": profiles, "target": "sm90"}
    (folder / SIDECAR).write_text(json.dumps(told))


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(3, 288, (MAX_BATCH, CAPACITY + 1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_it_computes_what_onnx_runtime_does(family, engine, ids):
    """Prompts of different lengths, in one call and in three; decode, a chunk, whole sequences."""
    ours, theirs = engine(family)
    for lengths in ([16, 9], [40, 11]):
        lengths = np.array(lengths)
        padded = np.where(np.arange(lengths.max()) < lengths[:, None], ids[:2, : lengths.max()], 0)
        close(ours.prefill(padded, lengths), theirs.prefill(padded, lengths))
        for step in range(3):
            close(ours.decode(ids[:2, step]), theirs.decode(ids[:2, step]))
        close(ours.extend(ids[:2, :5]), theirs.extend(ids[:2, :5]))
    close(ours.score(ids[:3, :33]), theirs.score(ids[:3, :33]))
    assert ours.vocab == theirs.vocab and ours.capacity == CAPACITY and ours.dtype == "float32"
    ours.close()


def test_greedy_tokens_are_chosen_where_the_logits_are(engine, ids):
    """Rows that end in different parts of the prompt; both ways to the same token."""
    ours, _ = engine()
    lengths = np.array([40, 11])
    expected = ours.prefill(ids[:2, :40], lengths).argmax(-1), ours.decode(ids[:2, 0]).argmax(-1)
    found = ours.first_tokens(ids[:2, :40], lengths), ours.next_tokens(ids[:2, 0])
    np.testing.assert_array_equal(found, expected)


def close(ours, theirs):
    """Parts of a prompt are other products than the whole: equal to rounding."""
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5 * theirs.std()


def test_half_precision(engine, ids):
    ours, theirs = engine(dtype="float16")
    assert ours.dtype == "float16"
    got = ours.prefill(ids[:1, :8], np.array([8]))
    np.testing.assert_array_equal(got, theirs.prefill(ids[:1, :8], np.array([8])))


def test_a_batch_of_another_size_finds_its_own_step(engine, ids, package):
    """Contexts: one for prefill and one for every number of rows that decoded; no graph twice."""
    ours, theirs = engine()
    for rows in (1, 4, 2, 4, 1):
        lengths = np.full(rows, 7)
        close(ours.prefill(ids[:rows, :7], lengths), theirs.prefill(ids[:rows, :7], lengths))
        for step in range(2):
            close(ours.decode(ids[:rows, step]), theirs.decode(ids[:rows, step]))
    prefill, *steps = fake_trt.Engine.contexts
    assert prefill.profile == backend.PREFILL and {s.profile for s in steps} == {backend.DECODE}
    assert [len({*context.runs}) for context in steps] == [1, 1, 1]
    assert sorted(context.runs[0] for context in steps) == [(1, 1), (2, 1), (4, 1)]
    rtx = package == "tensorrt_rtx"
    assert ours._gpu.graphs == (0 if rtx else 3)
    expected = "whole" if rtx else None  # it captures by itself
    assert {context.config.cuda_graph_strategy for context in steps} == {expected}


def test_the_cache_is_bound_once(engine, ids):
    ours, _ = engine()
    ours.prefill(ids[:1, :7], np.array([7]))
    ours.decode(ids[:1, 7])
    bound = [{n: a for n, a in c.addresses.items() if n.startswith("past")}
             for c in fake_trt.Engine.contexts]  # fmt: skip
    assert bound[0] == bound[1] and len(bound[0]) == 6
    assert {*bound[0].values()} == {cache.data_ptr() for cache in ours._cache.values()}
    assert ours._step.stride(0) * 8 % 256 == 0  # TensorRT's alignment


def test_a_full_cache_and_a_batch_too_large_are_errors(engine, ids):
    ours, _ = engine()
    ours.prefill(ids[:1, :CAPACITY], np.array([CAPACITY]))
    with pytest.raises(ValueError, match="49 tokens exceed the engine's capacity of 48"):
        ours.decode(ids[:1, 0])
    with pytest.raises(ValueError, match="exceed the engine's capacity of 48"):
        ours.score(ids[:1])
    with pytest.raises(ValueError, match=r"5 rows exceed the engine's build\.max_batch of 4"):
        ours.prefill(np.zeros((5, 3), np.int64), np.full(5, 3))


@pytest.mark.parametrize("flags, most_mb, expected", [
    ([], None, 900_000),  # all of them
    (["weight_streaming"], None, 123_456), (["weight_streaming"], 1, 900_000),
])  # fmt: skip
def test_so_many_weights_stay_on_the_gpu(flags, most_mb, expected, engine, ids):
    ours, theirs = engine(flags=flags, streaming_mb=most_mb)
    assert ours._engine.budget == expected
    close(ours.score(ids[:1, :9]), theirs.score(ids[:1, :9]))


def test_a_budget_that_tensorrt_refuses_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(fake_trt.Engine, "most", 100_000)
    with pytest.raises(RuntimeError, match="TensorRT refuses 123456 bytes of weights"):
        engine(flags=["weight_streaming"])


def test_device_time_has_one_entry_a_step(engine, ids):
    ours, _ = engine()
    ours.prefill(ids[:2, :40], np.array([40, 40]))
    ours.decode(ids[:2, 0])
    ours.decode(ids[:2, 1])
    assert len(ours.device_s()) == 3 and ours.device_s() == ()


def test_a_plan_that_does_not_load_is_an_error_that_says_why(engine):
    engine()
    folder = next(iter(fake_trt.Engine.contexts)).engine.folder
    (folder / PLAN).write_bytes(b"")
    with pytest.raises(RuntimeError, match="cannot load the plan: the plan is empty"):
        open_backend(Artifact(path=folder, format="tensorrt", key="k"))


@pytest.mark.gpu
def test_a_stream_of_the_gpu_replays_what_it_captured():
    """The part that stands in above, on a real device."""
    from optpipe.bench.cuda import Cuda

    gpu = Cuda()
    x = gpu.zeros((1000,), torch.float32)

    def add():
        x.add_(1)

    replay = gpu.capture(add)
    for _ in range(3):
        with gpu.timed():
            replay()
    with gpu.timed(more=True):
        replay()
    assert len(seconds := gpu.device_s()) == 3 and all(0 < s < 1 for s in seconds)
    assert float(x.sum()) == 4000 and gpu.device_s() == ()
    gpu.reset_peak()
    assert 4000 <= gpu.peak_bytes() < torch.cuda.get_device_properties(0).total_memory
