"""T2 on real timings: 8000 of one fixed piece of work, recorded by record.py on two cores that
seven others used. Two arms that are dealt consecutive slots are equal, whatever a test says."""

import math

import numpy as np
from record import FILE
from scipy.stats import ttest_ind

from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.processes import between
from optpipe.bench.evidence.statistics import exponential
from optpipe.bench.evidence.stopping import level
from optpipe.bench.evidence.verdict import Evidence, verdicts

ARMS = ("baseline", "again", "copy")
BLOCKS, DELTA, RUNS, SLOT = 8, 0.02, 300, 5


def slots(rng, count):
    """Medians of consecutive timings, as the iterations of a turn are."""
    timings = np.load(FILE)
    start = rng.integers(0, len(timings) - SLOT * count)
    return np.log(np.median(timings[start : start + SLOT * count].reshape(count, SLOT), axis=1))


def interleaved(rng):
    """(BLOCKS, 3): three arms in random order, and in the block after it in the reverse."""
    found = slots(rng, 3 * BLOCKS).reshape(BLOCKS, 3)
    for block in range(0, BLOCKS, 2):
        order = rng.permutation(3)
        found[block : block + 2] = found[block][order], found[block + 1][order[::-1]]
    return found


def paired_verdict(rng):
    """As a report makes it: the baseline, itself again and an arm, by two processes each."""
    sets = [interleaved(rng) for _ in range(2)]
    levels = [
        (arm, number, float(level_of), BLOCKS)
        for number, of in enumerate(sets)
        for arm, level_of in zip(ARMS, np.median(of - of.mean(1)[:, None], axis=0), strict=True)
    ]
    drawn = between(levels, "baseline", "copy", {"again": "baseline"})
    differences = np.concatenate([of[:, 2] - of[:, 0] for of in sets])
    shift = paired(differences, level(1), math.log1p(DELTA), drawn)
    return verdicts([Evidence(shift=exponential(shift))], 1, DELTA)[0].verdict


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
