"""How long the host takes around the kernels of a step, from the profiler of each runtime.

On one thread, at the smallest step there is: it dispatches the operators of any other, and nothing
waits for a second thread. The least time of each kernel, profiled, is taken from the least time
of the step, not profiled; profiling makes kernels look longer, so this is a lower bound.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from optpipe.bench.backend import Backend, open_backend
from optpipe.bench.ort import Ort
from optpipe.bench.worker import Arm
from optpipe.export.graph import MODEL

STEPS = 10
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
