"""Measured ceilings, and real steps held against them (T8b)."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench.bottlenecks import ceilings, physics, roofline
from optpipe.bench.bottlenecks.cost import Model, Product
from optpipe.bench.bottlenecks.roofline import Step
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm

WIDTH, DEPTH = 4096, 8


@pytest.fixture(scope="module")
def measured():
    """Of one thread, which took at most 6 s; torch gets its threads back."""
    before, start = torch.get_num_threads(), time.process_time()
    found = ceilings.measure_cpu(1, [4.0 * WIDTH * WIDTH * DEPTH])
    assert time.process_time() - start < 6, "3 s of wall time where two cores are free"
    yield found
    torch.set_num_threads(before)


def test_ceilings_of_this_machine_are_plausible(measured):
    assert [size for size, _ in measured.bandwidth] == sorted(ceilings.CPU_SIZES)
    assert 1e9 < measured.bytes_per_s(512e6) <= measured.bytes_per_s(1e6) < 1e12
    assert measured.flops_per_s.keys() == {"float32", "bfloat16", "float16", "int8"}
    assert all(1e9 < rate < 1e13 for rate in measured.flops_per_s.values())
    entry = measured.entry()["float32"]
    assert entry["bytes_per_s"] == measured.bandwidth[-1][1] and entry["flops_per_s"] > 1e9


def stack():
    """DEPTH linear layers with nothing between, as a model and as a runner."""
    layer = Product(rows=WIDTH, cols=WIDTH, bytes=4 * WIDTH * WIDTH, dtype="float32")
    model = Model(
        products=(layer,) * DEPTH,
        vector_bytes=0.0,
        hidden=0,
        tables=0,
        heads=1,
        kv_heads=1,
        head_dim=1,
        windows=(),
        dtype="float32",
        capacity=1,
        cache="in place",
    )
    weights = [torch.full((WIDTH, WIDTH), 1 / WIDTH) for _ in range(DEPTH)]

    def run(batch):
        x = torch.randn(WIDTH, batch)
        times = []
        for _ in range(4):
            start = time.thread_time()  # this thread's, for the machine may be shared
            y = x
            for weight in weights:
                y = weight @ y
            times.append(time.thread_time() - start)
        return min(times)

    return model, run


def test_real_layers_are_bound_by_memory_at_few_rows_and_by_compute_at_many(measured):
    """T8b: 8 layers of 67 MB, more than a cache holds, on one thread; a sweep over batches."""
    torch.set_num_threads(1)
    model, run = stack()
    batches = (1, 4, 8, 16, 64, 256)
    costs = {batch: model.step(batch, 1, 0) for batch in batches}
    steps = {
        batch: Step(use=roofline.use(cost, run(batch), measured), tokens=batch)
        for batch, cost in costs.items()
    }
    for batch, neighbour in {1: 4, 4: 8, 8: 16, 16: 8, 256: 64}.items():
        used = steps[batch].use
        votes = {
            "intensity": roofline.by_intensity(used)[0],
            "utilisation": roofline.by_utilisation(used)[0],
            "elasticity": roofline.by_elasticity(steps[batch], steps[neighbour])[0],
        }
        print(f"{batch} rows: MBU {used.mbu:.2f} MFU {used.mfu:.2f} {votes}")
        kind = "compute" if batch == 256 else "memory_bandwidth_weights"
        found = roofline.classify(used, votes, costs[batch], 0.0)[0]
        if batch == 16 and votes["intensity"] is None:  # the ridge of this machine lies right there
            assert found in (None, "kernel", kind), votes
        else:
            assert found == kind, votes


def test_a_survey_counts_every_arm_that_holds_a_graph(tiny, measured, monkeypatch):
    """In this process and with these ceilings; a whole run has the rest."""
    monkeypatch.setattr(physics, "measure_cpu", lambda threads, sizes: measured)
    monkeypatch.setattr(physics, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    artifact = Artifact(path=tiny(), format="hf", key="k")
    cell, opaque = Cell("single", 1, 16, 4), replace(artifact, format="vllm")
    arms = [Arm(name=name, artifact=of, dtype="float32", threads=1)
            for name, of in {"a": artifact, "engine": opaque}.items()]  # fmt: skip
    found = physics.survey(arms, [cell], 1, {"a": "cpu", "engine": "a GPU"})
    assert {*found.costs} == {("a", cell)}, "a checkpoint for an engine holds no graph to count"
    assert found.costs["a", cell].decode.all_flops > 0
    assert 1e-4 < found.host_s["a", cell]["decode"] < 1, "three blocks of transformers in Python"
    assert found.ceilings == {"cpu": measured}
