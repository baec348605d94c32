import numpy as np
import pytest

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


def test_a_bootstrap_of_few_blocks_is_refused():
    few = np.ones((29, 1))
    with pytest.raises(ValueError, match="29 blocks"):
        hierarchical((few, few), (few, few), 0)
