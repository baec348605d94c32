"""How long the host takes around the kernels of a step, from the profiler of each runtime.

On one thread, at the smallest step there is: it dispatches the operators of any other, and nothing
waits for a second thread. The least time of each kernel, profiled, is taken from the least time
of the step, not profiled; profiling makes kernels look longer, so this is a lower bound.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from optpipe.bench.backend import Backend, open_backend
from optpipe.bench.ort import Ort
from optpipe.bench.scenario import Cell
from optpipe.bench.torch import Torch
from optpipe.bench.worker import Arm
from optpipe.export.graph import MODEL

STEPS = 10
WARM, HELD = 3, 3
"""Steps of a GPU before one is held back, and steps that are."""
HOLD, LEAST_S = 2.0, 0.01
"""The GPU waits for so many times what the host needed at most to launch a step, and this."""
VIEWS = frozenset(
    f"aten::{name}" for name in (
        "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
        "empty_strided", "expand", "linear", "matmul", "narrow", "permute", "reshape", "resize_",
        "scaled_dot_product_attention", "select", "slice", "split", "split_with_sizes", "squeeze",
        "t", "to", "_to_copy", "transpose", "unsqueeze", "view",
    )
)  # fmt: skip
"""Operators that touch no element themselves."""
PROMPT = np.zeros((1, 1), np.int64)


def host_s(arm: Arm) -> float:
    """Seconds of one decode step outside of its kernels, on a CPU. Opens the artifact."""
    with open_backend(arm.artifact, 1, arm.dtype) as backend:
        step_s = min(_steps(backend))
        kernels = (
            _ort_kernels(arm, backend) if isinstance(backend, Ort) else _torch_kernels(backend)
        )
        return max(0.0, step_s - sum(min(times) for times in kernels.values()))


def busy_s(arm: Arm, cells: Sequence[Cell]) -> dict[Cell, dict[str, float]]:
    """Seconds a GPU works in a 'prefill' and in a 'decode' step of each cell. Opens the artifact.

    The GPU is held back until a step is queued whole, so that it never waits for a launch; what
    could not be queued in time is left out, and so is a runtime that cannot be held back.
    """
    found: dict[Cell, dict[str, float]] = {}
    if not issubclass(arm.find(arm.artifact.format), Torch):
        return found
    with Torch(arm.artifact, arm.threads, arm.dtype) as backend:
        for cell in cells:
            steps = {"prefill": cell.prompt_tokens}
            if cell.new_tokens > 1:  # at the mean depth of its steps, with room for these
                depth = cell.prompt_tokens + (cell.new_tokens - 2) // 2
                steps["decode"] = max(min(depth, backend.capacity - WARM - HELD), 1)
            times = {phase: _held(backend, phase, cell.batch, n) for phase, n in steps.items()}
            found[cell] = {phase: s for phase, s in times.items() if s is not None}
    return found


def _held(backend: Torch, phase: str, batch: int, tokens: int) -> float | None:
    """The least of a few steps of a batch that were queued whole before the GPU began."""
    ids_BS = np.random.default_rng(0).integers(0, backend.vocab, (batch, tokens))
    lengths_B = np.full(batch, tokens)
    backend.prefill(ids_BS, lengths_B)
    step: Callable[[], object] = (
        (lambda: backend.prefill(ids_BS, lengths_B))
        if phase == "prefill"
        else (lambda: backend.decode(ids_BS[:, 0]))
    )
    for _ in range(WARM):
        start = time.perf_counter()
        step()
        wall_s = time.perf_counter() - start
    times = []
    backend.hold_s = HOLD * wall_s + LEAST_S
    for _ in range(HELD):
        step()
        device_s = backend.device_s()
        if backend.queued and device_s:
            times.append(device_s[-1])
    backend.hold_s = 0.0
    return min(times, default=None)


def _steps(backend: Backend) -> list[float]:
    """Seconds of each step that its one thread had a core, whatever else the machine did."""
    backend.prefill(PROMPT, np.ones(1, np.int64))
    found = []
    for _ in range(STEPS):
        start = time.thread_time()
        backend.decode(PROMPT[0])
        found.append(time.thread_time() - start)
    return found


def _torch_kernels(backend: Backend) -> dict[str, list[float]]:
    """Seconds in each operator that touches elements, for every step."""
    found: dict[str, list[float]] = {}
    for _ in range(STEPS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            backend.decode(PROMPT[0])
        for event in profile.key_averages():
            if event.key not in VIEWS:
                found.setdefault(event.key, []).append(event.self_cpu_time_total / 1e6)
    return found


def _ort_kernels(arm: Arm, backend: Ort) -> dict[str, list[float]]:
    """Seconds in each node, for every run."""
    with tempfile.TemporaryDirectory() as out:
        engine, file = backend.engine, arm.artifact.path / MODEL
        options = engine.session.get_session_options()
        options.enable_profiling = True
        options.profile_file_prefix = f"{out}/profile"
        engine.session = onnxruntime.InferenceSession(file, options, engine.session.get_providers())
        engine.cache.clear()  # so that the next prompt binds its buffers to the new session
        _steps(backend)
        events: list[dict[str, Any]] = json.loads(Path(engine.session.end_profiling()).read_text())
    found: dict[str, list[float]] = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"], []).append(event["dur"] / 1e6)
    return found
