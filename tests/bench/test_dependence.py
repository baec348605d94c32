"""Blocks that depend on each other: what one interval claims, the other must allow."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from optpipe.bench.evidence.dependence import (
    RHOS,
    blocks_needed,
    inflation,
    paired,
    posterior,
    smallest_effect,
)
from optpipe.bench.evidence.processes import Processes
from optpipe.bench.evidence.statistics import Shift, exponential, hodges_lehmann
from optpipe.bench.evidence.stopping import level
from optpipe.bench.evidence.verdict import Evidence, verdicts

DELTA = 0.02
MARGIN = math.log1p(DELTA)
LOOKS = (12, 24)


def series(rng, runs, n, rho):
    """(runs, n) of AR(1) with unit variance."""
    values = rng.normal(size=(runs, n))
    for i in range(1, n):
        values[:, i] = rho * values[:, i - 1] + math.sqrt(1 - rho**2) * values[:, i]
    return values


def judged(families, half_width=0.05):
    """The verdicts of one report: each of its series ends at the first look that is narrow."""
    of_look, family = level(len(LOOKS)), []
    for differences in families:
        for count in LOOKS:
            shift = paired(differences[:count], of_look, MARGIN)
            if (shift.ci[1] - shift.ci[0]) / 2 <= half_width:
                break
        family.append(Evidence(shift=exponential(shift)))
    return [verdict.verdict for verdict in verdicts(family, len(LOOKS), DELTA)]


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.75])
def test_equal_arms_have_no_false_verdict_however_alike_neighbouring_blocks_are(rho):
    """Reports of one series; the signed rank alone is wrong in 17 % and more from 0.5 on."""
    rng, runs = np.random.default_rng(int(100 * rho)), 500 if rho > 0.5 else 200
    false = alone = 0
    for values in 0.05 * series(rng, runs, LOOKS[-1], rho):
        false += judged([values])[0] in ("FASTER", "SLOWER")
        alone += hodges_lehmann(values).p <= 0.05
    assert false <= 0.06 * runs, false
    assert rho < 0.5 or alone >= 0.15 * runs, "the simulation must bite"


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.75])
def test_an_arm_that_is_slower_by_delta_is_not_called_equivalent(rho):
    """At the edge of the margin, the worst case; noise so small that the interval is narrow."""
    rng = np.random.default_rng(7)
    noise = 0.01 * series(rng, 200, LOOKS[-1], rho)
    false = sum("EQUIVALENT" in judged([MARGIN + values]) for values in noise)
    assert false <= 0.06 * 200, false
    assert sum("EQUIVALENT" in judged([values / 4]) for values in noise[:50]) >= 40


def test_a_report_of_four_keeps_its_error():
    rng = np.random.default_rng(9)
    wrong = 0
    for _ in range(100):
        equal, edge = 0.05 * series(rng, 2, 24, 0.3), 0.012 * series(rng, 2, 24, 0.3) + MARGIN
        found = judged([*equal, *edge])
        wrong += bool({"FASTER", "SLOWER"} & set(found[:2])) or "EQUIVALENT" in found[2:]
    assert wrong <= 0.06 * 100, wrong


steps = st.lists(st.floats(-0.05, 0.05), min_size=8, max_size=20)


@given(steps, st.sampled_from([0.9, 0.95, 0.975]), st.sampled_from([None, 0.0, 0.001, 0.03]))
def test_the_interval_and_the_p_values_say_the_same(differences, of_look, sd):
    drawn = None if sd is None else Processes(sets=2, sd=sd, df=5)
    shift, series = paired(differences, of_look, MARGIN, drawn), posterior(differences)
    share = (1 + of_look) / 2
    if drawn is None:
        ends = [series.interval(of_look)]
    else:  # one autocorrelation, the likely one, and what processes differ by
        mean, error = (np.interp(series.rho, RHOS, of) for of in (series.means, series.errors))
        of_blocks = student.ppf(share, series.df) * error
        of_processes = student.ppf(share, 5) * sd
        ends = [(mean - of_blocks, mean + of_blocks),
                (shift.estimate - of_processes, shift.estimate + of_processes)]  # fmt: skip
    ends.append(hodges_lehmann(differences, of_look).ci or (-np.inf, np.inf))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    assert (shift.ci or (-np.inf, np.inf)) == pytest.approx((low, high), abs=1e-9)
    if shift.ci is None:
        return
    edges = [abs(end - at) for end in shift.ci for at in (0.0, MARGIN, -MARGIN)]
    if min(edges) > 1e-9:  # at an edge, rounding decides
        differs, equal = not low <= 0 <= high, low > -MARGIN and high < MARGIN
        assert not differs or shift.p <= 1 - of_look
        assert not equal or shift.p_margin <= 1 - of_look
        if drawn is None:
            assert (differs, equal) == (shift.p <= 1 - of_look, shift.p_margin <= 1 - of_look)


def test_processes_that_agree_do_not_vouch_for_blocks_that_do_not():
    """Blocks 5 % apart from each other whose two processes happen to have equal levels."""
    differences = np.random.default_rng(4).normal(0.01, 0.05, 24)
    drawn = Processes(sets=2, sd=1e-4, df=5)
    assert drawn.p(float(np.median(differences))) < 0.001
    assert paired(differences, processes=drawn).p > 0.1


@given(steps, st.floats(-1, 1), st.floats(0.1, 10))
def test_shift_and_scale_go_through(differences, by, times):
    base = posterior(differences)
    moved = posterior([by + times * value for value in differences])
    if np.ptp(differences) > 1e-3:
        np.testing.assert_allclose(moved.means, by + times * base.means, atol=1e-9)
        np.testing.assert_allclose(moved.errors, times * base.errors, rtol=1e-5, atol=1e-9)


def test_the_posterior_is_that_of_generalized_least_squares():
    """Against the full covariance matrix of every autocorrelation."""
    n, cut = 14, 2
    values = np.random.default_rng(3).normal(size=n)
    ranked = np.sort(values)
    x, ones, found = np.clip(values, ranked[cut], ranked[-1 - cut]), np.ones(n), posterior(values)
    weights, means, errors = [], [], []
    for rho in RHOS:
        covariance = rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / (1 - rho**2)
        inverse = np.linalg.inv(covariance)
        precision = ones @ inverse @ ones
        means.append(ones @ inverse @ x / precision)
        squares = (x - means[-1]) @ inverse @ (x - means[-1])
        errors.append(np.sqrt(squares / (n - 1) / precision) * n / (n - 2 * cut))
        volume = np.linalg.det(covariance) * precision
        weights.append(volume**-0.5 * squares ** (-(n - 1) / 2))
    np.testing.assert_allclose(found.means, means)
    np.testing.assert_allclose(found.errors, errors)
    np.testing.assert_allclose(found.weights, np.array(weights) / sum(weights), rtol=1e-9)
    assert found.df == n - 2 * cut - 1
    below = sum(w * student(found.df, m, e).cdf(0.2) for w, m, e in
                zip(found.weights, means, errors, strict=True))  # fmt: skip
    assert found.below([0.2])[0] == pytest.approx(below)
    low, high = found.interval(0.9)
    np.testing.assert_allclose(found.below([low, high]), [0.05, 0.95], atol=1e-9)


def test_the_inflation_is_that_of_a_sum_of_covariances():
    n, rho = 9, 0.6
    covariance = rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    assert inflation(rho, n) == pytest.approx(covariance.sum() / n)
    assert inflation(0.0, n) == 1


def test_the_autocorrelation_is_found_in_many_values():
    rng = np.random.default_rng(4)
    for rho in (0.0, 0.5, 0.8):
        found = [posterior(v).rho for v in series(rng, 50, 600, rho)]
        assert np.mean(found) == pytest.approx(rho, abs=0.1)


def test_equal_differences_are_certain():
    shift = paired([0.1] * 12, 0.975, MARGIN)
    assert shift.ci == pytest.approx((0.1, 0.1)) and shift.p < 0.001 and shift.p_margin == 1
    same = paired([0.0] * 12, 0.975, MARGIN)
    assert same.ci == (0, 0) and same.p == 1 and same.p_margin < 0.001


def test_a_peak_of_memory_that_creeps_still_differs():
    """Hardly any noise, but each block like the last: 4 % less is still less."""
    creeping = np.log(1.04) + np.cumsum(np.full(12, 1e-5))
    found = verdicts([Evidence(shift=exponential(paired(creeping, 0.975, MARGIN)))] * 4, 2, DELTA)
    assert {verdict.verdict for verdict in found} == {"FASTER"}


def test_a_burst_moves_neither_interval():
    calm = np.random.default_rng(2).normal(0.1, 0.01, size=12)
    burst = calm.copy()
    burst[5] += 1.1
    low, high = posterior(burst).interval(0.975)
    assert low > 0.06 and high < 0.14
    assert ttest_1samp(burst, 0).pvalue > 0.05, "the mean would be lost"


@pytest.mark.parametrize(("effect", "rho"), [(0.02, 0.0), (0.05, 0.0), (0.05, 0.4)])
def test_predicted_blocks_give_the_power(effect, rho):
    """T3: 80 % or more where blocks are independent, near it where they are not."""
    rng = np.random.default_rng(int(1000 * effect))
    spread = 1.5 * effect
    told = Shift(estimate=0, ci=None, pairs=100, p=1, check=None, spread=spread, rho=rho)
    n = blocks_needed(told, effect, 0.05)
    power = np.mean([paired(effect + spread * v).p <= 0.05 for v in series(rng, 400, n, rho)])
    assert (0.7 if rho else 0.8) <= power <= 0.97, (n, power)


def test_the_smallest_effect_is_the_one_that_so_many_blocks_find():
    told = Shift(estimate=0, ci=None, pairs=24, p=1, check=None, spread=0.05, rho=0.0)
    effect = smallest_effect(told, 0.05)
    rng = np.random.default_rng(5)
    power = np.mean([paired(effect + 0.05 * v).p <= 0.05 for v in series(rng, 400, 24, 0.0)])
    assert 0.7 <= power <= 0.9, power
    few = Shift(estimate=0, ci=None, pairs=1, p=1, check=None, spread=0.05)
    assert smallest_effect(few, 0.05) is None


def test_four_values_are_too_few():
    with pytest.raises(ValueError, match="4 values"):
        posterior([1, 2, 3, 4])
    assert paired([1.0, 2.0, 3.0, 4.0]).ci is None
