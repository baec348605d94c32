import numpy as np
import pytest

from optpipe.bench.evidence.statistics import hodges_lehmann
from optpipe.bench.evidence.stopping import late_start, level, looks, settled, truncation


def test_looks_double_and_end_at_the_last():
    assert looks(20, 160) == (20, 40, 80, 160)
    assert looks(12, 24) == (12, 24)
    assert looks(8, 20) == (8, 16, 20)
    assert looks(8, 8) == (8,)
    assert level(1) == 0.95 and level(4) == 0.9875


@pytest.mark.parametrize(("first", "last"), [(8, 20), (12, 24), (20, 160)])
def test_stopping_at_the_first_significant_look_keeps_the_level(first, last):
    """The worst an analyst could do: stop as soon as it is significant. Uncorrected: > 8 %."""
    rng = np.random.default_rng(first)
    counts = looks(first, last)
    corrected = uncorrected = 0
    runs = 400 if last > 100 else 1500
    for values in rng.standard_t(5, size=(runs, last)):
        p = [hodges_lehmann(values[:count]).p for count in counts]
        corrected += min(p) <= 1 - level(len(counts)) + 1e-12
        uncorrected += min(p) <= 0.05
    assert corrected / runs <= 0.05
    assert uncorrected / runs > corrected / runs + 0.02


@pytest.mark.parametrize("length", range(0, 16, 3))
def test_a_decaying_start_leaves_a_bias_below_one_percent(length):
    """T5: 40 starts up to 150 % above, decaying over ``length`` iterations."""
    biases = []
    for seed in range(40):
        rng = np.random.default_rng([seed, length])
        height = rng.uniform(0.3, 1.5)
        decay = height * np.exp(-4 * np.arange(80) / max(length, 1)) if length else np.zeros(80)
        values = 1 + decay + rng.normal(0, 0.02, 80)
        biases.append(abs(values[truncation(values) :].mean() - 1))
    assert np.mean(biases) <= 0.01 and np.quantile(biases, 0.95) <= 0.015


def test_a_steady_series_is_hardly_cut():
    cuts = [truncation(np.random.default_rng(i).normal(1, 0.05, 80)) for i in range(50)]
    assert np.median(cuts) <= 10 and max(cuts) <= 40
    assert truncation([1.0, 1.0]) == 0 and truncation([]) == 0


@pytest.mark.parametrize(("count", "late"), [(12, 7), (12, 4), (24, 7), (24, 15), (60, 5)])
def test_a_jit_is_found(count, late):
    """T5: slow at first, also with a burst later on where there are enough values."""
    found = 0
    for seed in range(100):
        values = np.random.default_rng(seed).normal(1, 0.03, count)
        if count >= 24:
            values[late + 4] *= 3
        values[:late] *= 1.5
        found += late <= late_start(values) <= late + 3  # a few good ones more are no loss
    assert found >= 95, found


@pytest.mark.parametrize("count", [8, 12, 24, 48])
def test_a_steady_series_is_cut_once_in_a_hundred(count):
    rng = np.random.default_rng(count)
    cuts = np.mean([late_start(values) > 0 for values in rng.standard_t(3, size=(3000, count))])
    assert cuts <= 0.016, cuts  # 1 % and three standard errors


@pytest.mark.parametrize(("count", "rho"), [(12, 0.75), (24, 0.5), (24, 0.75)])
def test_neighbours_that_resemble_each_other_are_rarely_cut(count, rho):
    """They drift, which looks like a change of state to ranks."""
    rng, cuts = np.random.default_rng(0), 0
    for _ in range(1000):
        noise, values = rng.normal(size=count), [rng.normal() / np.sqrt(1 - rho**2)]
        for step in noise[1:]:
            values.append(rho * values[-1] + step)
        cuts += late_start(values) > 0
    assert cuts <= 30, cuts


def test_too_few_values_have_no_head():
    for count in range(7):
        assert late_start([2.0] * (count // 2) + [1.0] * (count - count // 2)) == 0


def test_warm_up_ends_when_it_is_over():
    assert not settled([3.0, 2.0, 1.5, 1.2])
    assert settled([3.0, 1.0, 1.01, 1.0, 1.02, 0.99, 1.01])
    assert settled([9.0, 8.0, 1.0, 1.01, 1.0, 1.01, 1.0, 1.01, 1.0])
    assert not settled([1.0, 1.1, 1.3, 0.8, 1.0])
