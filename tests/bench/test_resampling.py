import numpy as np
import pytest
from scipy.stats import t as student

from optpipe.bench.evidence.processes import Processes
from optpipe.bench.evidence.resampling import hierarchical


def test_a_ratio_of_throughputs_is_covered_and_common_bursts_cancel():
    rng = np.random.default_rng(3)
    amounts = np.full((30, 2), 8.0)
    hits = 0
    widths = []
    for seed in range(20):
        burst = rng.lognormal(0, 0.5, size=(30, 1))
        slow = burst * rng.lognormal(0, 0.05, size=(30, 2))
        fast = burst * rng.lognormal(0, 0.05, size=(30, 2)) / 1.25
        low, high = hierarchical((amounts, amounts), (slow, fast), seed)
        hits += low <= np.log(1.25) <= high
        widths.append(high - low)
    assert hits >= 17 and max(widths) < 0.12


def test_it_reaches_as_far_as_processes_may_have_moved_it():
    rng = np.random.default_rng(4)
    both = (np.full((30, 2), 8.0),) * 2, tuple(rng.lognormal(0, 0.05, (2, 30, 2)))
    low, high = hierarchical(*both, 0)
    assert hierarchical(*both, 0, processes=Processes(sets=2, sd=0.0, df=4)) == (low, high)
    wide = hierarchical(*both, 0, processes=Processes(sets=2, sd=0.1, df=4))
    value = np.log(both[1][0].sum() / both[1][1].sum())
    half = student(4).ppf(0.975) * 0.1  # sqrt(2 / 2) processes
    assert wide == pytest.approx((value - half, value + half)) and high < wide[1]
    assert hierarchical(*both, 0, processes=Processes(sets=1, sd=0.0, df=0)) == (-np.inf, np.inf)


def test_a_bootstrap_of_few_blocks_is_refused():
    few = np.ones((29, 1))
    with pytest.raises(ValueError, match="29 blocks"):
        hierarchical((few, few), (few, few), 0)
