"""Late starts of several sets of processes, alone and together."""

import math

import numpy as np
import pytest

from optpipe.bench.timed.starts import _start


def steady(rng, sets, rho, n=24):
    """AR(1) series without a start."""
    values = rng.normal(size=(sets, n))
    for i in range(1, n):
        values[:, i] = rho * values[:, i - 1] + math.sqrt(1 - rho**2) * values[:, i]
    return values


@pytest.mark.parametrize("sets", [1, 2, 4, 8])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.75])
def test_series_that_only_drift_are_seldom_cut(sets, rho):
    rng = np.random.default_rng(sets)
    cuts = sum(_start(steady(rng, sets, rho).tolist()) > 0 for _ in range(200))
    assert cuts <= 0.04 * 200, cuts


def test_a_start_that_one_set_alone_does_not_show_is_found_in_two():
    """A decay of a few times the noise, at the same iterations of both."""
    found = {1: 0, 2: 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        decay = 0.13 * np.exp(-np.arange(20) / 5)
        both = (decay + rng.normal(0, 0.02, (2, 20))).tolist()
        found[1] += _start(both[:1]) > 0
        found[2] += _start(both) > 0
    assert found[2] >= found[1] + 20, found


def test_a_start_of_one_process_is_not_one_of_all():
    late = [1.0] * 8 + [0.0, 0.01] * 6
    calm = [0.0, 0.01] * 10
    assert _start([late]) == 8 == _start([late, late])
    assert _start([late, calm]) == 0 == _start([calm, calm])
    assert _start([late, [value + 3 for value in late]]) == 8, "each around its own middle"


def test_a_process_that_is_slower_and_ends_sooner_is_no_part_of_a_start():
    late = [1.0] * 8 + [0.0, 0.01] * 6
    assert _start([late, late, [value + 3 for value in late[:12]]]) == 8
