"""Peaks of memory: those of a process, which blocks repeat, but do not draw anew."""

from __future__ import annotations

import math

from optpipe.bench.evidence.statistics import hodges_lehmann, log_ratios, median
from optpipe.bench.timed.series import Turns, pairs

NO_PEAK = "this system keeps no peak of resident memory that can be reset"
OTHER_DEVICE = "it runs on another device than the baseline: their memories are two things"
HEAP_BYTES = 64 * 2**20
"""What glibc may reserve for one thread more (HEAP_MAX_SIZE). Eight processes of the demo model
that were given the same lay 7 to 33 MB apart, each of them alike in all blocks."""
TWICE = 2
"""As one pair of processes may by chance be nearer to each other than most."""


def slack(base: Turns, own: Turns, again: Turns | None, on_cpu: bool) -> float:
    """By how much the logs of the peaks of two processes may differ, were they of one arm.

    ``again``: of the second process of the baseline, if there is one. What devices allocate is
    exact, apart from what those two show.
    """
    peaks = [[*turns.by_block("peak_bytes").values()] for turns in (base, own)]
    if not all(peaks):
        return 0.0
    known = math.log1p(HEAP_BYTES / min(map(median, peaks))) if on_cpu else 0.0
    before, after = pairs(base, again, "peak_bytes") if again else ([], [])
    seen = abs(hodges_lehmann(log_ratios(before, after)).estimate) if before else 0.0
    return max(known, TWICE * seen)
