from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from optpipe.bench import statistics


def brute_cdf(n):
    """All 2 ** n signs of the ranks 1 .. n."""
    signs = np.array(list(product((0, 1), repeat=n)))
    sums = signs @ np.arange(1, n + 1)
    return np.array([(sums <= w).mean() for w in range(n * (n + 1) // 2 + 1)])


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_the_null_distribution_is_that_of_all_signs(n):
    np.testing.assert_allclose(statistics.signed_rank_cdf(n), brute_cdf(n), atol=1e-15)


@pytest.mark.parametrize(("n", "dropped"), [(6, 0), (8, 3), (10, 8), (15, 25), (20, 52), (25, 89)])
def test_critical_values_are_those_of_the_printed_tables(n, dropped):
    """Two-sided 5 % critical values of W, Hollander and Wolfe table A.4."""
    values = np.random.default_rng(n).normal(size=n)
    averages = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert statistics.hodges_lehmann(values).ci == (averages[dropped], averages[-1 - dropped])


def test_five_pairs_have_no_interval_and_six_have():
    assert statistics.hodges_lehmann([1, 2, 3, 4, 5]).ci is None
    assert statistics.hodges_lehmann([1, 2, 3, 4, 5, 6]).ci == (1, 6)
    assert statistics.fewest_pairs() == 6
    assert statistics.fewest_pairs(0.9) == 5


def test_the_estimate_is_the_median_of_all_pairwise_averages():
    values = [3.0, -1.0, 0.5, 8.0]
    averages = [3, -1, 0.5, 8, 1, 1.75, 5.5, -0.25, 3.5, 4.25]
    assert statistics.hodges_lehmann(values).estimate == np.median(averages)


@pytest.mark.parametrize("n", [6, 9, 14])
def test_the_interval_holds_exactly_what_the_test_does_not_reject(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = statistics.hodges_lehmann(values).ci

    def p(center):
        return wilcoxon(values - center, method="exact").pvalue

    step = 1e-9
    assert p(low + step) > 0.05 >= p(low - step)
    assert p(high - step) > 0.05 >= p(high + step)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = statistics.hodges_lehmann(rng.laplace(0.3, size=8)).ci
        hits += low <= 0.3 <= high
    assert 0.945 <= hits / 1000 <= 0.98  # exact level at n = 8: 96.1 %


times = st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=12)


@given(times, times, st.floats(1e-3, 1e3))
def test_swapping_inverts_and_units_do_not_matter(left, right, unit):
    n = min(len(left), len(right))
    left, right = left[:n], right[:n]
    there, back = statistics.ratio(left, right), statistics.ratio(right, left)
    scaled = statistics.ratio([unit * x for x in left], [unit * x for x in right])
    assert there.estimate * back.estimate == pytest.approx(1, rel=1e-12)
    assert there.ci[0] * back.ci[1] == pytest.approx(1, rel=1e-12)
    assert scaled.estimate == pytest.approx(there.estimate, rel=1e-9)


def test_a_constant_ratio_is_found_whatever_drifts():
    drift = np.geomspace(1, 5, 8)
    shift = statistics.ratio(2 * drift, drift)
    assert (shift.estimate, *shift.ci) == pytest.approx((2, 2, 2))


def test_percentiles_are_type_7():
    values = [1.0, 2.0, 4.0, 8.0]
    assert statistics.percentile(values, 50) == statistics.median(values) == 3.0
    assert statistics.percentile(values, 90) == pytest.approx(4 + 0.7 * 4)


def test_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        statistics.hodges_lehmann([])
