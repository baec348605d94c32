"""T1 (b): known delays through the whole path, a process of its own, on the real clock."""

from optpipe.bench.timed.selftest import LIMITS, RUNS, selftest


def test_known_delays_are_measured_as_planned():
    """15 runs, absolute deadlines: TTFT within 5 %, TPOT and end to end within 2 %."""
    assert RUNS == 15
    found = selftest()
    assert abs(found["ttft_error"]) <= 0.05
    assert abs(found["tpot_error"]) <= 0.02
    assert abs(found["e2e_error"]) <= 0.02
    assert found["passed"] and found.keys() - {"passed"} == LIMITS.keys()
