from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, ttest_1samp, wilcoxon

from optpipe.bench.evidence import statistics


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


@pytest.mark.parametrize("n", [5, 8, 13, 25])
def test_the_p_value_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(0.4, size=n)
    expected = wilcoxon(values, method="exact").pvalue
    assert statistics.hodges_lehmann(values).p == pytest.approx(expected, rel=1e-9)


def test_the_interval_excludes_no_shift_exactly_when_p_is_below_the_level():
    rng = np.random.default_rng(3)
    for _ in range(200):
        shift = statistics.hodges_lehmann(rng.normal(0.5, size=9))
        low, high = shift.ci
        assert (shift.p <= 0.05) == (not low <= 0 <= high)


def test_equal_values_are_no_evidence():
    shift = statistics.hodges_lehmann([0.0] * 12)
    assert (shift.estimate, shift.ci, shift.p) == (0, (0, 0), 1)


def test_the_check_is_the_t_interval():
    values = np.random.default_rng(1).normal(size=9)
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.t_interval(values) == pytest.approx((interval.low, interval.high))
    assert statistics.t_interval([1.0]) is None


def test_a_burst_makes_the_two_intervals_disagree():
    calm = np.random.default_rng(2).normal(0, 0.01, size=20)
    assert not statistics.hodges_lehmann(calm).disputed
    calm[7] += 3.0
    assert statistics.hodges_lehmann(calm).disputed


def closed(pairs):
    """The closed test over every set of hypotheses that can be true together, by Bonferroni."""
    adjusted = {}
    for chosen in product((None, 0, 1), repeat=len(pairs)):
        true = [(index, which) for index, which in enumerate(chosen) if which is not None]
        if true:
            p = min(1.0, len(true) * min(pairs[index][which] for index, which in true))
            for name in true:
                adjusted[name] = max(adjusted.get(name, 0.0), p)
    return [(adjusted[index, 0], adjusted[index, 1]) for index in range(len(pairs))]


probability = st.floats(1e-6, 1)


@given(st.lists(st.tuples(probability, probability), min_size=1, max_size=4))
def test_no_step_rejects_more_than_the_closed_test(pairs):
    for ours, theirs in zip(statistics.stepdown(pairs), closed(pairs), strict=True):
        assert ours[0] >= theirs[0] - 1e-12 and ours[1] >= theirs[1] - 1e-12


@given(st.lists(probability, min_size=1, max_size=6))
def test_with_one_question_a_member_it_is_the_step_down_of_holm(p):
    """A second p-value of 0 is no question: multipletests(p, method='holm') of statsmodels."""
    ranked = sorted(p)
    holm = np.minimum(np.maximum.accumulate(ranked * np.arange(len(p), 0, -1)), 1)
    found = [one for one, _ in statistics.stepdown([(one, 0.0) for one in p])]
    np.testing.assert_allclose(sorted(found), holm, rtol=1e-12)
    assert sorted(range(len(p)), key=lambda i: (p[i], i)) == sorted(
        range(len(p)), key=lambda i: (found[i], p[i], i)
    )


def test_the_step_down_of_the_paper_of_holm_and_of_nothing():
    """multipletests([.01, .04, .03, .005], method='holm') of statsmodels 0.14."""
    found = statistics.stepdown([(p, 0.0) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [one for one, _ in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.stepdown([]) == []
    assert statistics.stepdown([(0.01, 1.0), (0.02, 1.0)]) == [(0.02, 1.0), (0.04, 1.0)]


def test_a_family_keeps_its_error_where_raw_tests_do_not():
    """Twelve cells of four metrics with nothing to find: 0.92 raw, 0.05 stepped down."""
    p = np.random.default_rng(0).uniform(size=(1000, 48))
    assert (p.min(1) <= 0.05).mean() > 0.85
    found = [min(statistics.stepdown([(one, 1.0) for one in row]))[0] for row in p]
    assert np.mean(np.array(found) <= 0.05) <= 0.065


@pytest.mark.parametrize(
    ("q", "level", "violations", "count"),
    [
        (95, 0.95, 0, 59), (95, 0.99, 0, 90), (99, 0.95, 0, 299),
        (99, 0.99, 0, 459), (99, 0.99, 1, 662), (99, 0.99, 2, 838),
    ],
)  # fmt: skip
def test_fewest_samples_are_those_of_mlperf(q, level, violations, count):
    assert statistics.fewest_samples(q, level, violations) == count


@pytest.mark.parametrize(("q", "n"), [(50, 12), (90, 40), (95, 59), (99, 459)])
def test_percentile_bounds_are_binomial_order_statistics(q, n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = statistics.percentile_interval(values, q)
    ranked, below = np.sort(values), binom(n, q / 100)
    upper = next(k for k in range(1, n + 1) if below.cdf(k - 1) >= 0.95)
    lower = max(k for k in range(1, n + 1) if 1 - below.cdf(k - 1) >= 0.95)
    assert (low, high) == (ranked[lower - 1], ranked[upper - 1])


@pytest.mark.parametrize(("q", "fewest"), [(95, 59), (99, 299)])
def test_a_percentile_without_enough_samples_is_refused(q, fewest):
    assert statistics.percentile_interval(np.arange(fewest - 1), q) is None
    assert statistics.percentile_interval(np.arange(fewest), q) is not None
    assert statistics.percentile_interval([], q) is None


@pytest.mark.parametrize("effect", [0.01, 0.02, 0.05, 0.10])
def test_predicted_blocks_give_the_power_and_the_interval_covers(effect):
    """T3: injected slow-downs in heavy-tailed noise; power >= 80 %, coverage >= 93 %."""
    rng = np.random.default_rng(int(effect * 100))
    spread = 1.5 * effect  # so that few blocks are needed, and every effect runs equally long
    n = statistics.blocks_needed(spread, effect, 0.05)
    noise = rng.standard_t(5, size=(600, n)) * spread / np.sqrt(5 / 3)
    shifts = [statistics.hodges_lehmann(np.log1p(effect) + row) for row in noise]
    assert np.mean([s.ci[0] > 0 for s in shifts]) >= 0.80
    covered = np.mean([s.ci[0] <= np.log1p(effect) <= s.ci[1] for s in shifts])
    assert covered >= 0.93


def test_the_predicted_smallest_effect_is_the_one_found_in_80_percent():
    """T3: within 25 %, found by bisection on simulated power."""
    rng = np.random.default_rng(8)
    noise = rng.normal(0, 0.05, size=(400, 20))
    predicted = statistics.smallest_effect(0.05, 20, 0.05)
    low, high = 0.0, 0.2
    for _ in range(10):
        middle = (low + high) / 2
        power = np.mean([statistics.hodges_lehmann(row + middle).ci[0] > 0 for row in noise])
        low, high = (low, middle) if power >= 0.8 else (middle, high)
    assert abs(predicted / middle - 1) <= 0.25
    assert statistics.blocks_needed(0.05, predicted * 1.0001, 0.05) == 20
    assert statistics.smallest_effect(0.05, 1, 0.05) is None
