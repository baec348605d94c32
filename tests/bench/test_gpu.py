"""Physics of a real GPU (T15), and agreement with Triton and with CUDA events of our own (T14).

    pytest -m gpu tests/bench/test_gpu.py

needs torch with CUDA and Triton, and a GPU that nobody else is using.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench import energy, nvml
from optpipe.bench import torch as torch_backend
from optpipe.bench.bottlenecks import ceilings, profile, roofline
from optpipe.bench.bottlenecks.cost import Model, Product
from optpipe.bench.bottlenecks.roofline import Step
from optpipe.bench.cuda import Cuda, uuid
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm, Iterate

pytestmark = pytest.mark.gpu
ROWS, COLS = 16384, 32768  # 1 GiB in bfloat16: no cache of any GPU holds it


def events_s(call, rounds=20, warmup=5):
    """Median seconds of one call by CUDA events around each, after warm-up."""
    for _ in range(warmup):
        call()
    pairs = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


@pytest.fixture(scope="module")
def measured():
    return ceilings.measure_gpu()


def test_a_gemv_of_half_the_bytes_takes_half_the_time():
    """T15: bfloat16 against int8 weights, time ratio within 10 % of the byte ratio."""
    from row_sums import row_sums  # needs Triton

    weight = torch.randint(-8, 8, (ROWS, COLS), dtype=torch.int8, device="cuda")
    half = weight.bfloat16()
    ones = torch.ones(COLS, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(row_sums(weight), row_sums(half)), "the same sums of small integers"
    ours = events_s(lambda: row_sums(half))
    assert ours == pytest.approx(events_s(lambda: half @ ones), rel=0.1), "as fast as cuBLAS"
    ratio = ours / events_s(lambda: row_sums(weight))
    print(f"time ratio {ratio:.3f} for a byte ratio of 2")
    assert ratio == pytest.approx(2, rel=0.1)


def test_the_elasticity_of_a_product_flips_near_the_ridge(measured):
    """T15: batches of 1, 4, 16 against 512 and 1024, around some 250 FLOPs a byte."""
    width = 8192
    weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16)
    layer = Product(rows=width, cols=width, bytes=2 * width * width, dtype="bfloat16")
    stack = Model(
        products=(layer,), vector_bytes=0.0, hidden=0, tables=0, heads=1, kv_heads=1, head_dim=1,
        windows=(), dtype="bfloat16", capacity=1, cache="in place",
    )  # fmt: skip
    steps = []
    for batch in (1, 4, 16, 512, 1024):
        x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16)
        seconds = events_s(lambda x=x: torch.nn.functional.linear(x, weight))
        used = roofline.use(stack.step(batch, 1, 0), seconds, measured)
        steps.append(Step(use=used, tokens=batch))
        print(f"{batch} rows: {seconds * 1e6:.1f} us, MBU {used.mbu:.2f}, MFU {used.mfu:.2f}")
    one, four, sixteen, many, more = steps
    assert roofline.by_elasticity(one, four)[0] == "memory"
    assert roofline.by_elasticity(four, sixteen)[0] == "memory"
    assert roofline.by_elasticity(many, more)[0] == "compute"
    assert roofline.by_intensity(sixteen.use)[0] == "memory"
    assert roofline.by_intensity(more.use)[0] == "compute"
    assert 20 < sixteen.use.ridge < 1000


def timed_s(call, seconds=0.2, flush=None):
    """Median seconds by the backends' own instrument, as long warmed up and run as do_bench."""
    gpu = Cuda()
    with gpu.work():
        for _ in range(5):
            call()
        gpu.wait()
        start = time.perf_counter()
        for _ in range(5):
            call()
        gpu.wait()
        once_s = (time.perf_counter() - start) / 5
        for count in (int(seconds / 2 / once_s), int(seconds / once_s)):  # the first is warm-up
            gpu.device_s()
            for _ in range(max(count, 5)):
                if flush is not None:
                    flush.zero_()
                with gpu.timed():
                    call()
        return statistics.median(gpu.device_s())


def in_turns(one, other, rounds=6):
    """Median ratio of two instruments; each comes first as often as second: clocks sink."""
    ratios = []
    for turn in range(rounds):
        first, second = (one, other) if turn % 2 == 0 else (other, one)
        values = {first: first(), second: second()}
        ratios.append(values[one] / values[other])
        print(f"{values[one] * 1e3:.4f} ms, {values[other] * 1e3:.4f} ms, {ratios[-1]:.4f}")
    return statistics.median(ratios)


@pytest.fixture(scope="module")
def kernels():
    """A product of 8192 x 8192 and a copy of 1 GiB.

    Zeros draw so little power that the clock stays where it is: with random numbers it moves by
    5 % from turn to turn, which says nothing about instruments.
    """
    x = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return {"product": lambda: x @ x, "copy": lambda: target.copy_(source)}


@pytest.mark.parametrize("name", ["product", "copy"])
def test_our_events_agree_with_triton(kernels, name):
    """T14: within 2 % of do_bench, with as much warm-up and caches flushed before every call."""
    from triton.testing import do_bench

    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")  # as large as do_bench's

    def ours():
        return timed_s(kernels[name], flush=flush)

    def theirs():
        return do_bench(kernels[name], warmup=100, rep=200, return_mode="median") / 1e3

    print(f"T14 {name}: ours, do_bench, ratio")
    ratio = in_turns(ours, theirs)
    print(f"T14 {name}: {ratio:.4f} times do_bench")
    assert ratio == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", ["product", "copy"])
def test_our_events_agree_with_events_of_torch(kernels, name):
    """T14: within 1 % of pairs of events recorded by hand, launched back to back."""

    def ours():
        return timed_s(kernels[name])

    def theirs():
        rounds = max(5, int(0.2 / events_s(kernels[name])))
        return events_s(kernels[name], rounds=rounds, warmup=rounds // 2)

    print(f"T14 {name}: ours, torch's events, ratio")
    ratio = in_turns(ours, theirs)
    print(f"T14 {name}: {ratio:.4f} times torch's events")
    assert ratio == pytest.approx(1, rel=0.01)


def test_a_copy_of_two_gigabytes_reaches_the_measured_bandwidth(measured):
    """T14: within 3 % of the same copy launched back to back, and not above the ceiling."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    reached = 2 * source.nbytes / events_s(lambda: target.copy_(source))
    copied = ceilings._gpu_rate(lambda: (lambda: target.copy_(source), 2.0 * source.nbytes))
    ceiling = measured.bytes_per_s(2.0 * source.nbytes)
    print(f"copy {reached / 1e12:.3f} TB/s, back to back {copied / 1e12:.3f}, "
          f"ceiling {ceiling / 1e12:.3f}")  # fmt: skip
    assert reached == pytest.approx(copied, rel=0.03)
    assert reached <= 1.05 * ceiling


class Field(ctypes.Structure):
    """nvmlFieldValue_t."""

    _fields_ = [("id", ctypes.c_uint), ("scope", ctypes.c_uint), ("at", ctypes.c_longlong),
                ("took", ctypes.c_longlong), ("kind", ctypes.c_uint), ("code", ctypes.c_uint),
                ("value", ctypes.c_ulonglong)]  # fmt: skip


def instant_w(board):
    """NVML_FI_DEV_POWER_INSTANT, which is no average; None where the driver has none."""
    field = Field(id=186)
    code = board._library.nvmlDeviceGetFieldValues(board._handle, 1, ctypes.byref(field))
    return None if code or field.code else (field.value & 0xFFFFFFFF) / 1e3


def test_the_counter_of_energy_agrees_with_samples_of_power():
    """T15: 12 s of products, queued without a gap, after 3 s until power is steady."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    board, readings, behind = nvml.Board(uuid()), [], [torch.cuda.Event() for _ in range(8)]

    def work(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            behind.append(behind.pop(0))
            behind[0].synchronize()  # at most eight fives are queued
            for _ in range(5):
                x @ x
            behind[-1].record()
            yield time.perf_counter_ns()

    for _ in work(3):
        pass
    begin_ns = time.perf_counter_ns()
    for now_ns in work(12):
        readings.append((now_ns, board.joules(), board.watts(), instant_w(board)))
    torch.cuda.synchronize()
    found = energy.power([r[:2] for r in readings], begin_ns, readings[-1][0])
    assert isinstance(found, energy.Power), found
    at_s = np.array([r[0] for r in readings]) / 1e9
    mean_w = {}
    for name, column in (("average of a second", 2), ("instant", 3)):
        if readings[0][column] is not None:
            watts = np.array([r[column] for r in readings])
            mean_w[name] = float(np.trapezoid(watts, at_s) / (at_s[-1] - at_s[0]))
    print(f"T15 energy: counter {found.watts:.1f} W ({found.updates} updates in "
          f"{found.window_s:.1f} s), samples {mean_w}")  # fmt: skip
    assert found.watts == pytest.approx(mean_w.get("instant", mean_w["average of a second"]),
                                        rel=0.05)  # fmt: skip


def test_events_leave_out_what_lies_between_steps_and_a_queued_step_what_lies_within(
    tiny, monkeypatch
):
    """A model of three tiny blocks, kernel by kernel: the host takes nearly all of a step."""
    monkeypatch.setattr(torch_backend, "moving", lambda _: "as if it were dynamic")
    cell = Cell("single", 1, 64, 32)
    artifact = Artifact(path=tiny(), format="hf", key="k")
    arm = Arm(name="a", artifact=artifact, dtype="bfloat16", threads=1)
    ids_BS = torch.randint(0, 288, (1, 64)).numpy()
    with profile.open_backend(artifact, 1, "bfloat16") as backend:
        for _ in range(3):
            found = Iterate(ids_BS=ids_BS, new_tokens=32)(backend)
    busy = profile.busy_s(arm, [cell])[cell]
    assert len(found.device_s) == 32, "one pair of events a step"
    stamps = found.trace.token_ns
    wall_s = (stamps[-1] - stamps[0]) / 1e9 / 31
    event_s = statistics.median(found.device_s[1:])
    print(f"a step: wall {wall_s * 1e6:.0f} us, events {event_s * 1e6:.0f} us, "
          f"queued {busy['decode'] * 1e6:.0f} us")  # fmt: skip
    assert busy["decode"] < event_s < wall_s
    assert busy["decode"] < 0.5 * wall_s, "launches are most of it"


def test_two_identical_arms_agree_within_half_a_percent(tmp_path):
    """The resolution of a whole run in 20 blocks, four of each of five processes, where the GPU is
    the bound: 16,384 prompt tokens. Turns of a second reach the cap on its power in their midst.

    Of what the host has a part in, gpu_figures.py prints it.
    """
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable, "-m", "optpipe", "recipe=baseline", "stages=[]", "model=random",
        "model.config=llama_1b", "calib=random", "bench.dtypes=[bfloat16]", "bench.blocks=4",
        "bench.processes=5", "bench.max_processes=5", "bench.warmup=2",
        "bench.budget_s=60", "bench.quality.windows=2",
        "scenario=[prefill_only]", "scenario.prefill_only.batch=[8]",
        "scenario.prefill_only.prompt_tokens=[2040]", "hydra.run.dir=out",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((tmp_path / "out" / "report.json").read_text())["run"]
    for cell in run["design"]["resolution"]:
        for metric in ("ttft_s", "tpot_s"):
            if cell[metric]["half_width"] is not None:
                print(f"{cell['scenario']} {metric}: +-{cell[metric]['half_width']:.2%}, "
                      f"ratio {cell[metric]['ratio']:.4f}, "
                      f"a process +-{cell[metric]['process_sd']:.3%}")  # fmt: skip
    print(json.dumps(run["preflight"], indent=1), json.dumps(run["machine"]["gpus"], indent=1))
    prefill = next(c for c in run["design"]["resolution"] if c["scenario"] == "prefill_only")
    assert prefill["ttft_s"]["half_width"] <= 0.005
