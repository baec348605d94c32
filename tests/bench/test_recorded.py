"""T2 on real timings: 8000 of one fixed piece of work, recorded by record.py on two cores that
seven others used. Two arms that are dealt consecutive slots are equal, whatever a test says."""

import math

import numpy as np
from record import FILE
from scipy.stats import ttest_ind

from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.statistics import exponential
from optpipe.bench.evidence.stopping import level
from optpipe.bench.evidence.verdict import Evidence, verdicts

LOOKS, DELTA, RUNS, SLOT = (12, 24), 0.02, 300, 5


def slots(rng, count):
    """Medians of consecutive timings, as the iterations of a turn are."""
    timings = np.load(FILE)
    start = rng.integers(0, len(timings) - SLOT * count)
    return np.log(np.median(timings[start : start + SLOT * count].reshape(count, SLOT), axis=1))


def paired_verdict(rng):
    pairs = slots(rng, 2 * LOOKS[-1]).reshape(-1, 2)
    signs = np.repeat(rng.choice([-1, 1], LOOKS[-1] // 2), 2) * np.tile([1, -1], LOOKS[-1] // 2)
    differences = (pairs[:, 0] - pairs[:, 1]) * signs  # in random order, then in the reverse
    for count in LOOKS:
        shift = paired(differences[:count], level(len(LOOKS)), math.log1p(DELTA))
        if (shift.ci[1] - shift.ci[0]) / 2 <= 0.05:
            break
    return verdicts([Evidence(shift=exponential(shift))], len(LOOKS), DELTA)[0].verdict


def blocked_differs(rng):
    """One arm, then the other, and Student's t test on the slots."""
    first, second = slots(rng, 80).reshape(2, 40)
    return ttest_ind(first, second, equal_var=False).pvalue < 0.05


def test_equal_arms_on_recorded_timings():
    rng = np.random.default_rng(0)
    false = sum(paired_verdict(rng) in ("FASTER", "SLOWER") for _ in range(RUNS))
    blocked = sum(blocked_differs(rng) for _ in range(RUNS))
    assert false <= 0.07 * RUNS, false
    assert blocked > 0.20 * RUNS, (blocked, false)
