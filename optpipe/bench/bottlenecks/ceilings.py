"""What this machine can do at most: bandwidth by working set, matrix rate by dtype, as measured.

The roofline model (Williams, Waterman and Patterson, CACM 52(4), 2009) needs two ceilings. Here the
bandwidth is a curve: a model whose weights fit in the last-level cache is not fed by the memory
behind it. Every ceiling is the best of several kernels and shapes; a CPU is measured by one loop a
thread, without any barrier inside, so that busy neighbours lower it as little as possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from threading import Barrier, Thread
from typing import Any

import numpy as np

from optpipe.bench import machine

Probe = tuple[Callable[[], object], float]
"""One call of a kernel, and the bytes or FLOPs of that call."""
Rate = Callable[[Callable[[], Probe]], float]
"""Runs a kernel that is made for it, and returns what it reached, per second."""
PROBE_S = 0.05
FEWEST = 3
"""Calls of a kernel, at least, however long they take."""
CPU_SIZES = (1e6, 2e6, 4e6, 8e6, 16e6, 64e6, 512e6)
"""Working sets in bytes; above the last one, main memory feeds them, whatever their size."""
GPU_SIZES = (8e6, 32e6, 128e6, 512e6, 2e9)
Shape = tuple[int, int, int]
"""(M, N, K) of a product."""
CPU_SHAPES = ((128, 512, 512), (256, 512, 512), (256, 256, 1024))
ORT_SHAPE = (256, 1024, 1024)
BLOCK = 32
GPU_SHAPES = ((2048, 4096, 4096), (8192, 8192, 8192))
REPEATS = 20
"""Launches between two CUDA events, so that none waits for its launch."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Measured ceilings; plain data."""

    bandwidth: tuple[tuple[float, float], ...]
    """(bytes of the working set, bytes per second), by size; rates never rise with the size."""
    flops_per_s: Mapping[str, float]
    """Multiplications and additions per second by the name of the dtype that is multiplied."""

    def bytes_per_s(self, working_set: float) -> float:
        """Bandwidth at a working set, geometric between two that were measured."""
        (first, fastest), (last, slowest) = self.bandwidth[0], self.bandwidth[-1]
        if working_set <= first:
            return fastest
        if working_set >= last:
            return slowest
        (low, fast), (high, slow) = next(
            p for p in pairwise(self.bandwidth) if working_set < p[1][0]
        )
        share = log(working_set / low) / log(high / low)
        return exp(log(fast) * (1 - share) + log(slow) * share)

    def entry(self) -> dict[str, Any]:
        """For report.json: the two ceilings of each dtype, and the whole curve."""
        return {
            dtype: {
                "bytes_per_s": self.bandwidth[-1][1],
                "flops_per_s": rate,
                "by_working_set": [list(point) for point in self.bandwidth],
            }
            for dtype, rate in self.flops_per_s.items()
        }


def curve(found: Mapping[float, float]) -> tuple[tuple[float, float], ...]:
    """Rates by size as a ceiling: what was reached with a larger set, a smaller one reaches too."""
    sizes = sorted(found)
    return tuple((size, max(found[s] for s in sizes if s >= size)) for size in sizes)


def measure_gpu(working_sets: Iterable[float] = ()) -> Ceilings:
    """Measure the CUDA device; ``working_sets`` are sizes, in bytes, to measure exactly."""
    wanted = {min(max(size, GPU_SIZES[0]), GPU_SIZES[-1]) for size in working_sets}
    found = {size: _fastest(_gpu_rate, size, "cuda") for size in {*GPU_SIZES, *wanted}}
    rates = _matrix_rates(_gpu_rate, GPU_SHAPES, "cuda")
    return Ceilings(bandwidth=curve(found), flops_per_s=rates)


def measure_cpu(threads: int, working_sets: Iterable[float] = ()) -> Ceilings:
    """Measure ``threads`` cores; takes a few seconds.

    Sets the threads of this process to one, so call it in a process of its own.
    """
    import torch  # here: the parent of a benchmark reads Ceilings and imports no torch

    torch.set_num_threads(1)  # one loop a thread: see the top of this file
    room = min(CPU_SIZES[-1], machine.available_bytes() / 4)
    wanted = {min(max(size, CPU_SIZES[0]), room) for size in (*CPU_SIZES, *working_sets)}

    def rate(make: Callable[[], Probe]) -> float:
        return _cpu_rate(make, threads)

    found = {size: _fastest(rate, size / threads, "cpu") for size in wanted}
    rates = _matrix_rates(rate, CPU_SHAPES, "cpu")
    for dtype, reached in _ort_rates(threads).items():
        rates[dtype] = max(rates[dtype], reached)
    return Ceilings(bandwidth=curve(found), flops_per_s=rates)


def _fastest(rate: Rate, size: float, device: str) -> float:
    """Bytes per second: the best of read, matrix-vector, copy and triad over ``size`` bytes."""
    import torch

    def floats(share: float) -> torch.Tensor:
        return torch.ones(int(size * share / 4), device=device)

    def read() -> Probe:
        x = floats(1)
        return x.sum, x.nbytes

    def matvec() -> Probe:
        width = 1024
        matrix = floats(1)[: int(size / 4) // width * width].view(-1, width)
        vector = torch.ones(width, device=device)
        return lambda: matrix @ vector, matrix.nbytes

    def copy() -> Probe:
        a, b = floats(1 / 2), floats(1 / 2)
        return lambda: b.copy_(a), 2 * a.nbytes

    def triad() -> Probe:
        a, b, c = floats(1 / 3), floats(1 / 3), floats(1 / 3)
        return lambda: torch.add(a, b, alpha=3, out=c), 3 * a.nbytes

    return max(map(rate, (read, matvec, copy, triad)))


def _matrix_rates(rate: Rate, shapes: Iterable[Shape], device: str) -> dict[str, float]:
    """FLOPs per second of each dtype, the best of its shapes."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

    def product(shape: Shape, dtype: torch.dtype) -> Callable[[], Probe]:
        def make() -> Probe:
            m, n, k = shape
            # random: a GPU multiplies zeros faster, since it then draws less power
            x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
            return lambda: torch.nn.functional.linear(x, weight), 2.0 * m * n * k

        return make

    def integers(shape: Shape) -> Callable[[], Probe]:
        def make() -> Probe:
            m, n, k = shape
            x, weight = (
                torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device)
                for rows in (m, n)
            )
            return lambda: torch._int_mm(x, weight.t()), 2.0 * m * n * k

        return make

    with torch.inference_mode():
        rates = {
            name: max(rate(product(shape, dtype)) for shape in shapes)
            for name, dtype in dtypes.items()
        }
        return {**rates, "int8": max(rate(integers(shape)) for shape in shapes)}


def _cpu_rate(make: Callable[[], Probe], threads: int) -> float:
    """Sum over threads that all run it at once of the best that each reached."""
    probes = [make() for _ in range(threads)]
    barrier = Barrier(threads)
    reached: list[float] = []

    def run(call: Callable[[], object], amount: float) -> None:
        barrier.wait()
        reached.append(amount / _best(call))

    for call, _ in probes:  # here, where an error is heard
        call()
    workers = [Thread(target=run, args=probe) for probe in probes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(reached)


def _best(call: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds of the fastest call within PROBE_S, and of at least FEWEST calls.

    The time of the thread, not of the wall: what others do on its core is no limit of the machine.
    """
    times: list[float] = []
    end = time.perf_counter() + PROBE_S
    while len(times) < FEWEST or time.perf_counter() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def _gpu_rate(make: Callable[[], Probe]) -> float:
    """By CUDA events around REPEATS launches, the best of FEWEST."""
    import torch

    call, amount = make()
    for _ in range(FEWEST):
        call()
    times = []
    for _ in range(FEWEST):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    return amount / float(min(times))


def _ort_rates(threads: int) -> dict[str, float]:
    """The products of ONNX Runtime, whose kernels are not torch's: float32, int8 of 4 bits and of
    8 bits."""
    m, n, k = ORT_SHAPE
    x = np.random.default_rng(0).standard_normal((m, k), dtype=np.float32)
    rates: dict[str, float] = {}
    models = [_float_product(), _nbits_product(), _integer_product()]
    for dtype, model in zip(("float32", "int8", "int8"), models, strict=True):
        session = _session(model, threads)

        def product(session: Any = session) -> object:
            return session.run(None, {"x": x})

        rate = 2.0 * m * n * k / _best(product, time.perf_counter)  # it has its own threads
        rates[dtype] = max(rates.get(dtype, 0.0), rate)
    return rates


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _float_product() -> bytes:
    _, n, k = ORT_SHAPE
    return _model({"w": np.full((k, n), 0.5, np.float32)}, "MatMul")


def _nbits_product() -> bytes:
    _, n, k = ORT_SHAPE
    codes = np.full((n, k // BLOCK, BLOCK // 2), 0x7A, np.uint8)
    scales = np.full((n, k // BLOCK), 0.01, np.float32)
    about = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    return _model({"w": codes, "s": scales}, "MatMulNBits", domain="com.microsoft", **about)


def _integer_product() -> bytes:
    _, n, k = ORT_SHAPE
    codes, scales = np.full((k, n), 7, np.int8), np.full(n, 0.01, np.float32)
    weights: dict[str, np.ndarray] = {"w": codes, "s": scales}
    return _model(weights, "DynamicQuantizeMatMul", domain="com.microsoft")


def _model(weights: Mapping[str, np.ndarray], op: str, **about: Any) -> bytes:
    """y = op(x, weights) as a model of its own."""
    from onnx import TensorProto, helper, numpy_helper

    m, n, k = ORT_SHAPE
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *weights], ["y"], **about)],
        "product",
        [helper.make_tensor_value_info("x", float32, [m, k])],
        [helper.make_tensor_value_info("y", float32, [m, n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
