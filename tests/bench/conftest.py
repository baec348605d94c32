"""Fakes that worker processes can import, and workers that need no process."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers inherit it and find fakes.py

import fakes

from optpipe.bench.timed import blocks, timing
from optpipe.bench.worker import Arm, Loaded
from optpipe.errors import StageError

TRUST = {
    "selftest", "clock", "sessions", "recorded", "statistics", "dependence", "stopping", "request",
    "roofline", "bottleneck", "cost", "divergence", "gate", "checks", "serve", "schema", "verdict",
    "journal", "processes", "rates", "ceilings", "contention", "quality", "resampling",
    "residences",
}  # fmt: skip
"""Files of the tests T1 to T13 and T16 of the specification: pytest -m trust. T16 is the simulated
one of `sessions`; `planted` is the same on the real engine, minutes long."""
assert all((Path(__file__).parent / f"test_{name}.py").is_file() for name in TRUST)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem[5:] in TRUST:
            item.add_marker(pytest.mark.trust)


class Local:
    """Stands in for a Worker: the same questions, answered in this process."""

    def __init__(self, arm):
        self.arm, self.killed = arm, False
        self.backend = arm.find(arm.artifact.format)(arm.artifact, arm.threads, arm.dtype)
        self.asked = []

    def submit(self, command, doing):
        self.asked.append(command)
        return time.perf_counter_ns()

    def result(self, doing, timeout_s=None):
        if self.backend.plan.get("fault") == "hang":
            raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        try:
            return self.asked[-1](self.backend)
        except FloatingPointError as error:
            raise StageError(f"benchmark arm '{self.arm.name}', {doing}: {error}") from error

    def ask(self, command, doing, timeout_s=None):
        self.submit(command, doing)
        return self.result(doing, timeout_s)

    def kill(self):
        self.killed = True

    @property
    def loaded(self):
        backend = self.backend
        return Loaded(
            load_s=1.5,
            capacity=backend.capacity,
            max_batch=backend.max_batch,
            vocab=backend.vocab,
            weight_bytes=backend.weight_bytes,
            dtype=backend.dtype,
            device=backend.device,
        )


@pytest.fixture
def arm(tmp_path):
    """arm(name, **plan) -> an arm whose backend behaves as planned; see fakes.py."""

    def make(name, **plan):
        lineage = () if name.startswith("baseline") else (name,)
        artifact = fakes.fake_artifact(tmp_path / name, *lineage, **plan)
        return Arm(name=name, artifact=artifact, dtype="float32", threads=1, find=fakes.find)

    return make


@pytest.fixture
def pair(arm):
    """The least that a benchmark compares."""
    return [arm("baseline"), arm("copy")]


@pytest.fixture
def no_pause(monkeypatch):
    """Turns of one iteration each, with nothing between them."""
    monkeypatch.setattr(blocks.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing, "TURN_S", 0.0)


@pytest.fixture
def local(arm):
    """local(name, **plan) -> a worker in this process."""
    return lambda name, **plan: Local(arm(name, **plan))
