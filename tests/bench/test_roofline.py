"""Votes and classes against steps whose bound is known by construction (T8a, T8d)."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpipe.bench.bottlenecks import roofline
from optpipe.bench.bottlenecks.ceilings import Ceilings, curve
from optpipe.bench.bottlenecks.cost import Model, Product
from optpipe.bench.bottlenecks.roofline import ImpossibleError, Step, Use

BANDWIDTH, PEAK = 2e11, 2e13
CEILINGS = Ceilings(bandwidth=((1e6, BANDWIDTH),), flops_per_s={"float16": PEAK, "int8": 2 * PEAK})


def model(layers=32, kv_heads=8):
    """About 7 B parameters in float16."""
    one = Product(rows=4096, cols=50000, bytes=4096 * 50000 * 2, dtype="float16")
    return Model(
        products=(one,) * layers,
        vector_bytes=0.0,
        hidden=4096,
        tables=1,
        heads=32,
        kv_heads=kv_heads,
        head_dim=128,
        windows=(None,) * layers,
        dtype="float16",
        capacity=10**6,
        cache="in place",
    )


MEASURED = Ceilings(
    bandwidth=((1e6, 1.1 * BANDWIDTH),), flops_per_s={"float16": PEAK, "int8": 2 * PEAK}
)
"""What a probe found: a bandwidth that is 10 % off."""


def judged(cost, seconds, host):
    """From a lone cell, so that there are two votes."""
    found = roofline.use(cost, seconds, MEASURED)
    votes = {
        "intensity": roofline.by_intensity(found)[0],
        "utilisation": roofline.by_utilisation(found)[0],
        "elasticity": None,
    }
    return roofline.classify(found, votes, cost, host)[0]


def true_class(cost, overhead):
    memory, compute = roofline.memory_s(cost, CEILINGS), roofline.compute_s(cost, CEILINGS)
    if overhead / (max(memory, compute) + overhead) > 0.2:
        return "host"
    return "compute" if compute > memory else roofline.bandwidth_of(cost)


def test_the_class_is_right_over_a_grid_of_batches_and_lengths():
    """T8a: t = max(bytes / BW, FLOPs / peak) + c with 3 % noise, bandwidth 10 % off.

    At least 98 % right; no class at all only within 20 % of the ridge.
    """
    rng, runner = np.random.default_rng(0), model()
    shapes = ((1, 128), (1, 2048), (1, 32768), (16, 0), (512, 0), (4096, 0))
    batches = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256)
    right = wrong = ambiguous = 0
    for batch, (tokens, depth), overhead in product(batches, shapes, (0.0, 0.002, 0.2)):
        cost = runner.step(batch, tokens, depth)
        seconds = roofline.floor_s(cost, CEILINGS) * np.exp(abs(rng.normal(0, 0.03))) + overhead
        found = judged(cost, seconds, overhead / seconds)
        side = roofline.compute_s(cost, MEASURED) / roofline.memory_s(cost, MEASURED)
        ambiguous += found is None
        assert found is not None or 0.8 <= side <= 1.2, (batch, tokens, depth)
        right += found == true_class(cost, overhead)
        wrong += found not in (None, true_class(cost, overhead))
    print(f"{right} right, {wrong} wrong, {ambiguous} ambiguous")
    assert right >= 0.98 * (right + wrong) and right + wrong + ambiguous == 180
    assert ambiguous < 0.1 * 180


def use(memory_s, compute_s, seconds=1.0):
    return Use(bytes=1e9, flops=1e12, memory_s=memory_s, compute_s=compute_s, seconds=seconds)


def test_use_by_hand():
    """1e9 bytes and 1e12 FLOPs; three tenths and six of a second, of one."""
    found = use(0.3, 0.6)
    assert (found.mbu, found.mfu, found.eta, found.floor_s) == (0.3, 0.6, 0.6, 0.6)
    assert found.intensity == 1000 and found.ridge == pytest.approx(500), "half as far as it is"
    step = replace(model().step(1, 1, 128), flops={"float16": PEAK, "int8": 2 * PEAK})
    assert roofline.compute_s(step, CEILINGS) == pytest.approx(2), "one after the other"


def test_a_step_faster_than_its_ceilings_raises():
    """T8d."""
    cost = model().step(1, 1, 128)
    floor = roofline.floor_s(cost, CEILINGS)
    assert roofline.use(cost, floor / 1.04, CEILINGS).mbu == pytest.approx(1.04)
    with pytest.raises(ImpossibleError, match=r"MBU 1\.06 is above 1\.05"):
        roofline.use(cost, floor / 1.06, CEILINGS)
    prompt = model().step(8, 2048, 0)
    with pytest.raises(ImpossibleError, match=r"MFU 1\.10"):
        roofline.use(prompt, roofline.floor_s(prompt, CEILINGS) / 1.1, CEILINGS)


def test_utilisation_votes_for_what_is_much_used():
    assert roofline.by_utilisation(use(0.6, 0.1)) == ("memory", "")
    assert roofline.by_utilisation(use(0.1, 0.6)) == ("compute", "")
    assert roofline.by_utilisation(use(0.9, 0.5)) == ("memory", "")
    vote, why = roofline.by_utilisation(use(0.6, 0.55))
    assert vote is None and "of the ridge" in why, "both are"


def test_utilisation_contradicts_the_ridge_where_something_else_takes_the_time():
    """The same bytes and FLOPs near the roofline, and six times above it: V1 cannot know."""
    cost = model().step(1, 1, 128)
    floor = roofline.floor_s(cost, MEASURED)
    for times, vote, kind in (
        (1.1, "memory", "memory_bandwidth_weights"),
        (6, "neither", "kernel"),
    ):
        found = roofline.use(cost, times * floor, MEASURED)
        assert roofline.by_intensity(found)[0] == "memory"
        assert roofline.by_utilisation(found)[0] == vote
        assert judged(cost, times * floor, 0.0) == kind


def test_utilisation_speaks_near_the_ridge_where_intensity_abstains():
    for found, vote in ((use(0.41, 0.36), "memory"), (use(0.36, 0.41), "compute")):
        assert roofline.by_intensity(found)[0] is None
        assert roofline.by_utilisation(found) == (vote, "")


def elasticity(time, memory=0.0, compute=1.0, **alone):
    small = Step(use=use(0.6, 0.5), tokens=4)
    grown = use(0.6 * 4**memory, 0.5 * 4**compute, 4**time)
    return roofline.by_elasticity(small, Step(use=grown, tokens=16), **alone)[0]


def test_elasticity_votes_by_how_time_grows_with_the_tokens_of_a_step():
    assert [elasticity(e) for e in (0.0, 0.24, 0.4, 0.61, 1.0)] == [
        "memory",
        "memory",
        None,
        "compute",
        "compute",
    ]
    assert elasticity(0.9, memory=0.9) is None, "a long cache grows with the batch, too"
    assert roofline.by_elasticity(Step(use=use(0.1, 0.1), tokens=4), None)[0] is None


def test_a_flat_time_says_nothing_where_the_host_may_be_what_is_flat():
    small, large = (Step(use=use(0.1, 0.01 * n), tokens=n) for n in (1, 4))
    assert roofline.by_elasticity(small, large, alone=True)[0] == "memory"
    assert roofline.by_elasticity(small, large, alone=False)[0] is None
    idle, idler = (Step(use=use(0.05, 0.001 * n), tokens=n) for n in (1, 4))
    vote, why = roofline.by_elasticity(idle, idler, alone=True)
    assert vote is None and "not memory that takes it" in why


VOTES = dict.fromkeys(("intensity", "utilisation", "elasticity"))


@pytest.mark.parametrize(
    ("votes", "eta", "host", "kind"),
    [
        (("memory", "memory", None), 0.9, 0.1, "memory_bandwidth_weights"),
        (("memory", "memory", "memory"), 0.9, 0.3, "host"),
        (("memory", "memory", "compute"), 0.9, None, "memory_bandwidth_weights"),
        (("memory", "compute", "compute"), 0.6, None, "compute"),
        (("memory", None, "memory"), 0.3, None, "memory_bandwidth_weights"),
        (("memory", "neither", "memory"), 0.3, None, "memory_bandwidth_weights"),
        (("memory", "neither", None), 0.3, None, "kernel"),
        (("memory", "neither", "compute"), 0.3, None, "kernel"),
        (("memory", None, None), 0.3, None, "kernel"),
        ((None, None, "memory"), 0.9, None, None),
    ],
)
def test_the_first_rule_that_matches_decides(votes, eta, host, kind):
    cost = model().step(1, 1, 128)
    given_votes = dict(zip(VOTES, votes, strict=True))
    found, why = roofline.classify(use(eta, eta / 4), given_votes, cost, host)
    assert found == kind and bool(why) == (kind is None)


def test_a_cache_of_more_than_two_fifths_of_the_bytes_takes_the_bandwidth():
    few, many = model().step(1, 1, 42_000), model().step(1, 1, 70_000)  # 29 and 41 per cent
    assert roofline.bandwidth_of(few) == "memory_bandwidth_weights"
    assert roofline.bandwidth_of(many) == "memory_bandwidth_kv"


@given(st.dictionaries(st.floats(1e6, 1e10), st.floats(1e9, 1e12), min_size=1))
def test_a_bandwidth_curve_is_a_ceiling_and_never_rises(found):
    made = curve(found)
    assert all(rate >= found[size] for size, rate in made)
    assert all(fast >= slow for (_, fast), (_, slow) in pairwise(made))
    ceilings = Ceilings(bandwidth=made, flops_per_s={})
    rates = [ceilings.bytes_per_s(size) for size in np.geomspace(1e5, 1e11, 30)]
    assert all(a >= b * (1 - 1e-9) for a, b in pairwise(rates))
    assert rates[0] == made[0][1] and rates[-1] == made[-1][1]


def test_bandwidth_between_two_sizes_is_geometric():
    ceilings = Ceilings(bandwidth=((1e6, 400.0), (1e8, 100.0)), flops_per_s={})
    assert ceilings.bytes_per_s(1e7) == pytest.approx(200)
