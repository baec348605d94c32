import math
from dataclasses import replace

import numpy as np
import pytest

from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.processes import Processes
from optpipe.bench.evidence.statistics import exponential
from optpipe.bench.evidence.verdict import Evidence, primary, verdicts
from optpipe.bench.scenario import Cell, Scenario

RNG = np.random.default_rng(0)


def evidence(speedup, sd=0.01, n=20, processes=None, **fields):
    logs = RNG.normal(np.log(speedup), sd, n)
    shift = paired(logs, margin=np.log(1.02), processes=processes)
    return Evidence(shift=exponential(shift), **fields)


def one(given, looks=1, delta=0.02):
    return verdicts([given], looks, delta)[0]


@pytest.mark.parametrize(
    ("speedup", "sd", "verdict"),
    [
        (1.3, 0.01, "FASTER"),
        (0.7, 0.01, "SLOWER"),
        (1.0, 0.005, "EQUIVALENT"),
        (1.01, 0.002, "EQUIVALENT"),  # significant, and negligible
        (1.0, 0.2, "INCONCLUSIVE"),
    ],
)
def test_each_verdict(speedup, sd, verdict):
    found = one(evidence(speedup, sd))
    assert found.verdict == verdict and found.reason
    assert (found.blocks_needed is not None) == (verdict == "INCONCLUSIVE")
    assert found.p_holm is not None and found.mde > 0


def test_what_processes_differ_by_is_no_difference_and_it_takes_more_of_them():
    """Each alike in all of its blocks: 5 % apart, two of every arm, six arms."""
    drawn = Processes(sets=2, sd=0.05, df=5)
    assert one(evidence(1.1, 0.001)).verdict == "FASTER"
    found = one(evidence(1.1, 0.001, processes=drawn))
    assert found.verdict == "INCONCLUSIVE" and found.p_holm > 0.05 and found.mde > 0.15
    sets = math.ceil(2 * ((1.959964 + 0.841621) * 0.05 / 0.02) ** 2 + 1.959964**2 / 4)
    assert f"differ by 5.0%: {sets} of each are needed" in found.reason
    assert found.blocks_needed == 10 * sets
    assert one(evidence(1.3, 0.001, processes=drawn)).verdict == "FASTER"
    assert one(evidence(0.7, 0.001, processes=drawn)).verdict == "SLOWER"
    same = Processes(sets=2, sd=0.002, df=5)
    assert one(evidence(1.0, 0.001, processes=same)).verdict == "EQUIVALENT"
    assert one(evidence(1.0, 0.001, processes=drawn)).verdict == "INCONCLUSIVE"
    single = one(evidence(1.3, 0.001, processes=Processes(sets=1, sd=0.0, df=0)))
    assert single.verdict == "INCONCLUSIVE" and single.reason.startswith("one process of each arm")
    assert single.mde is None and single.p_holm == 1


def test_equivalent_means_that_the_whole_interval_is_negligible():
    shift = evidence(1.0, 0.001).shift
    assert one(Evidence(shift=shift)).verdict == "EQUIVALENT"
    wide = replace(shift, ci=(0.97, 1.01), p_margin=1e-9)
    assert one(Evidence(shift=wide)).verdict == "INCONCLUSIVE"


def test_a_failed_check_beats_any_evidence_and_leaves_the_family():
    family = [evidence(1.3, invalid="token_count: 1 of 2"), evidence(1.3)]
    invalid, valid = verdicts(family, 1, 0.02)
    [valid_alone] = verdicts(family[1:], 1, 0.02)
    assert (invalid.verdict, invalid.reason) == ("INVALID", "token_count: 1 of 2")
    assert invalid.p_holm is None
    assert valid.p_holm == pytest.approx(valid_alone.p_holm)


def test_what_was_not_measured_has_no_verdict_but_a_reason():
    found = one(Evidence(shift=None, why="too slow"))
    assert (found.verdict, found.reason) == (None, "too slow")


def test_arms_that_were_never_side_by_side_are_inconclusive_at_best():
    found = one(evidence(1.3, apart=True))
    assert found.verdict == "INCONCLUSIVE" and "would be FASTER" in found.reason


def test_more_verdicts_and_more_looks_need_more_evidence():
    weak = evidence(1.3, n=8)  # p = 0.0078
    assert one(weak).verdict == "FASTER"
    assert one(weak, looks=7).verdict == "INCONCLUSIVE"
    crowd = verdicts([weak] + [evidence(1.0, 0.1, 8) for _ in range(9)], 1, 0.02)
    assert crowd[0].verdict == "INCONCLUSIVE" and "all verdicts" in crowd[0].reason


def test_five_blocks_are_too_few_and_it_says_how_many_are_enough():
    found = one(evidence(2.0, n=5))
    assert found.verdict == "INCONCLUSIVE" and "too few" in found.reason
    assert found.blocks_needed >= 6


def test_the_family_is_chosen_before_anything_is_measured():
    cells = [
        Cell("single", 1, 128, 32), Cell("batch", 2, 128, 16), Cell("batch", 8, 128, 16),
        Cell("long_text", 1, 448, 16), Cell("long_text", 1, 896, 16), Cell("mine", 1, 8, 8),
    ]  # fmt: skip
    scenarios = {
        "single": Scenario(),
        "batch": Scenario(primary=["tokens_per_s", "e2e_s"]),
        "long_text": Scenario(primary=["ttft_s"]),
        "mine": Scenario(primary=[]),
    }
    found = primary(cells, scenarios)
    assert found[cells[0]] == ("tpot_s",)
    assert found[cells[2]] == ("tokens_per_s", "e2e_s", "peak_bytes")
    assert found[cells[4]] == ("ttft_s",)
    assert found[cells[1]] == found[cells[3]] == found[cells[5]] == ()
    assert primary([], {}) == {}


def test_a_scenario_of_the_user_s_has_a_verdict():
    cells = [Cell("mine", 1, 8, 8), Cell("mine", 2, 8, 8)]
    assert primary(cells, {"mine": Scenario()})[cells[1]] == ("tpot_s", "peak_bytes")
    both = {"mine": Scenario(primary=["peak_bytes"])}
    assert primary(cells, both)[cells[1]] == ("peak_bytes",), "once"
