"""Goodput as a ratio: planted shares of good requests, failures, and what has no interval."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom

from optpipe.bench.evidence.processes import ONE_PROCESS, Processes, between
from optpipe.bench.percentiles import bounded
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Objective
from optpipe.bench.serving import goodput
from optpipe.bench.serving.request import Request, pooled

MS = 1_000_000
WITHIN = Objective(ttft_s=0.1, tpot_s=None)
ALIKE = Processes(sets=2, sd=0.0, df=1)
BENCH = BenchConfig()


def answered(at_ms, ttft_ms, error=None):
    """One token after ``ttft_ms``; with an error none."""
    chunks = () if error else ((int((at_ms + ttft_ms) * MS), 1),)
    return Request(
        sched_ns=at_ms * MS, submit_ns=at_ms * MS, start_ns=at_ms * MS, chunks=chunks,
        end_ns=int((at_ms + ttft_ms) * MS), prompt_tokens=1, new_tokens=1, error=error,
    )  # fmt: skip


def blocks(share_good, count, seed, requests=20, error=None, residence=0):
    """Samples of ``count`` blocks of ten seconds; good with a chance, else late or failed."""
    rng = np.random.default_rng(seed)
    return [
        SimpleNamespace(
            session=0, residence=residence, part=0, block=100 * residence + n, iteration=0,
            served=SimpleNamespace(
                objective=WITHIN,
                requests=[
                    answered(500 * i, *((10,) if rng.random() < share_good else (150, error)))
                    for i in range(requests)
                ],
            ),
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("error", [None, "refused"])
def test_a_planted_ratio_is_covered_whether_bad_requests_are_late_or_failed(error):
    covered = 0
    for seed in range(12):
        base, own = blocks(0.9, 30, seed), blocks(0.6, 30, 100 + seed, error=error)
        found = goodput.ratio(base, own, BenchConfig(seed=seed), ALIKE)
        assert found["ratio"] == pytest.approx(0.6 / 0.9, rel=0.15)
        covered += found["ci"][0] <= 0.6 / 0.9 <= found["ci"][1]
    assert covered >= 10


def test_the_estimate_is_good_requests_over_seconds():
    base, own = blocks(1.0, 2, 0), blocks(1.0, 2, 0)
    own[0].served.requests = [*own[0].served.requests[:19], answered(9500, 150)]
    found = goodput.ratio(base, own, BENCH, ALIKE)
    one, late = 9.51, 9.65  # seconds of a block whose last request is good, and late
    assert found["ratio"] == pytest.approx((39 / (one + late)) / (40 / (2 * one)))
    assert found["ci"] is None and found["reasons"]["ci"].startswith("2 paired blocks; a bootstrap")


def test_processes_that_differ_widen_the_interval():
    """The second of the baseline answers a fifth of its requests too late, in all of its blocks."""

    def arm(*shares):
        return [s for n, share in enumerate(shares) for s in blocks(share, 15, n, residence=n)]

    arms = {"base": arm(1.0, 0.8), "again": arm(1.0, 1.0), "own": arm(1.0, 1.0)}
    levels = goodput.levels(arms)
    told = {(name, which[1]): (level, count) for name, which, level, count in levels}
    assert {count for _, count in told.values()} == {15} and len(told) == 6
    good = np.mean([r.good(WITHIN) for s in arms["base"][15:] for r in s.served.requests])
    taken = 9.51 / 20  # a request's share of the seconds, little more where the last one was late
    assert told["base", 1][0] == pytest.approx(np.log(good / taken), abs=0.015)
    drawn = between(levels, "base", "own", {})
    entry = goodput.ratio(arms["base"], arms["own"], BENCH, drawn)
    alone = goodput.ratio(arms["base"], arms["own"], BENCH, ALIKE)
    half = drawn.half_width(BENCH.level)
    assert half > 0.3 and alone["ci"][0] > 1
    assert np.log(entry["ci"]) == pytest.approx(np.log(entry["ratio"]) + half * np.array([-1, 1]))
    nothing = goodput.ratio(arms["base"], arms["own"], BENCH, Processes(sets=1, sd=0.0, df=0))
    assert nothing["ci"] is None and nothing["reasons"]["ci"] == ONE_PROCESS
    arms["own"] = arm(1.0, 0.0)
    drawn = between(goodput.levels(arms), "base", "own", {})
    assert drawn.sets == 2 and drawn.sd > 2, "one that kept nothing is no process that is missing"
    low, high = goodput.ratio(arms["base"], arms["own"], BENCH, drawn)["ci"]
    assert low < 0.01 and high > 2


def test_each_limit_has_its_share_of_requests_and_what_that_proves():
    """TTFT of 10 ms in 30 of 40 requests, 150 ms in 10; one token each, so that TPOT is kept."""
    given = blocks(1.0, 2, 0)
    given[0].served.requests[:10] = [answered(500 * i, 150) for i in range(10)]
    for one in given:
        one.served.objective = Objective(ttft_s=0.1, tpot_s=0.05, e2e_s=None)
    found = goodput.kept(given)
    assert [found[k]["share"] for k in ("ttft_s", "tpot_s", "good")] == [0.75, 1.0, 0.75]
    assert found["requests"] == 40 and found["reasons"] == {"e2e_s": goodput.NO_LIMIT}
    assert found["e2e_s"] is None
    low = found["ttft_s"]["at_least"]  # 30 or more of 40 come about with 1 % at that share
    assert binom.sf(29, 40, low) == pytest.approx(0.01)
    assert {*goodput.kept([])["reasons"].values()} == {goodput.NONE_SENT}


@pytest.mark.parametrize(("count", "least"), [(458, False), (459, True)])
def test_a_limit_is_proven_by_the_rule_of_mlperf(count, least):
    """459 requests without a violation prove 99 % of them with a confidence of 99 %."""
    found = goodput.kept(blocks(1.0, 1, 0, requests=count))["good"]
    assert found["share"] == 1 and (found["at_least"] >= 0.99) == least


def test_what_has_no_ratio_says_why():
    base, none = blocks(1.0, 30, 0), blocks(0.0, 30, 0)
    assert goodput.ratio(base, none, BENCH, ALIKE)["reasons"]["ratio"] == (
        "no request of this arm kept the objective"
    )
    assert goodput.ratio(base, [], BENCH, ALIKE)["reasons"]["ratio"] == "no block that both have"
    rare = blocks(0.0, 30, 0)
    rare[3].served.requests[5] = answered(2500, 10)
    found = goodput.ratio(base, rare, BENCH, ALIKE)
    assert 0 < found["ratio"] < 0.01 and found["reasons"]["ci"].startswith("too few requests")


def test_failed_requests_are_later_than_any_percentile_that_is_given():
    log = [answered(500 * i, 1 + i / 10) for i in range(970)]
    log += [answered(500 * i, 1, "refused") for i in range(970, 1000)]
    found = bounded(pooled(log)["ttft_s"], "")
    assert found["samples"] == 1000 and found["p50"] == pytest.approx(0.001 + 0.0499, rel=0.01)
    assert found["p95"] == pytest.approx(0.001 + 0.0949, rel=0.01), "not the 95 % of the answered"
    assert found["p99"] is None and "p99" not in found["ci"]
    assert found["reasons"]["p99"] == "30 of 1000 requests failed: nothing bounds it"
