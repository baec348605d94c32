import numpy as np
import pytest

from optpipe.bench.evidence.resampling import autocorrelation, hierarchical, moving_block
from optpipe.bench.evidence.statistics import hodges_lehmann


def autoregressive(rng, n, rho):
    noise = rng.normal(size=n)
    for i in range(1, n):
        noise[i] += rho * noise[i - 1]
    return noise * np.sqrt(1 - rho**2)


def test_autocorrelation_is_that_of_the_series():
    rng = np.random.default_rng(0)
    assert autocorrelation(autoregressive(rng, 4000, 0.6)) == pytest.approx(0.6, abs=0.04)
    assert abs(autocorrelation(rng.normal(size=4000))) < 0.04
    assert autocorrelation([1.0, 1.0, 1.0]) == 0 and autocorrelation([1.0, 2.0]) == 0


def test_runs_of_blocks_cover_where_the_signed_rank_does_not():
    """Differences with autocorrelation 0.6: the exact interval is exact only for independence."""
    rng = np.random.default_rng(1)
    rank = blocks = 0
    for seed in range(150):
        values = autoregressive(rng, 80, 0.6)
        low, high = hodges_lehmann(values).ci
        rank += low <= 0 <= high
        low, high = moving_block(values, seed, repeats=500)
        blocks += low <= 0 <= high
    assert rank / 150 < 0.75 and blocks / 150 > 0.80


def test_the_bootstrap_is_repeated_by_its_seed():
    values = np.random.default_rng(2).normal(size=40)
    assert moving_block(values, 5) == moving_block(values, 5) != moving_block(values, 6)


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
