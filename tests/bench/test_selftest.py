"""T1 (b): known delays through the whole path, a process of its own, on the real clock."""

import subprocess

import pytest

from optpipe.bench.timed.selftest import LIMITS, RUNS, selftest
from optpipe.bench.worker import Worker

BUSY = 12


@pytest.fixture
def busy(monkeypatch):
    """So many processes that never wait, once the worker is loaded."""
    loops, load = [], Worker.load

    def loaded(worker, timeout_s):
        found = load(worker, timeout_s)
        loops.extend(subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(BUSY))
        return found

    monkeypatch.setattr(Worker, "load", loaded)
    yield loops
    for loop in loops:
        loop.kill()
        loop.wait()


def test_known_delays_are_measured_as_planned_at_a_load_of_twelve(busy):
    """15 runs, absolute deadlines: TTFT within 5 %, TPOT and end to end within 2 %."""
    assert RUNS == 15
    found = selftest()
    assert len(busy) == BUSY and all(loop.poll() is None for loop in busy)
    assert abs(found["ttft_error"]) <= 0.05
    assert abs(found["tpot_error"]) <= 0.02
    assert abs(found["e2e_error"]) <= 0.02
    assert found["passed"] and found.keys() - {"passed"} == LIMITS.keys()
