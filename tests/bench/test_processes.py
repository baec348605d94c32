"""What processes differ by, beside blocks that repeat it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_ind

from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.processes import Processes, between, spread
from optpipe.bench.timed.series import Turns, levels


class Block:
    """A sample of the only set of processes."""

    session = residence = part = 0
    probe_s = peak_bytes = None

    def __init__(self, block, e2e_s):
        self.block, self.metrics = block, {"e2e_s": e2e_s}


def table(values):
    """Levels of a table of arms by sets."""
    return [(f"arm {a}", s, float(v), 5) for a, row in enumerate(values) for s, v in enumerate(row)]


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_it_is_the_error_of_a_randomized_complete_block_design(arms, sets, seed):
    """What a row and a column leave of every value, over (arms - 1) (sets - 1)."""
    values = np.random.default_rng(seed).normal(size=(arms, sets))
    left = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
    sd, df = spread(table(values))
    assert df == (arms - 1) * (sets - 1) and sd == pytest.approx(np.sqrt((left**2).sum() / df))
    moved = values + np.arange(arms)[:, None] + 5 * np.arange(sets)
    assert spread(table(moved)) == pytest.approx((sd, df)), "arms and sets may differ as they like"


def test_equal_processes_have_none_and_one_process_of_each_tells_nothing():
    assert spread(table(np.add.outer(range(4), range(3)) / 7)) == (0.0, 6)
    assert spread(table([[1.0], [2.0], [3.0]])) == (0.0, 0)
    single = between(table([[1.0], [2.0]]), "arm 0", "arm 1", {})
    assert single == Processes(sets=1, sd=0.0, df=0)
    assert single.p(1.0) == 1 and single.half_width(0.95) == np.inf
    assert single.smallest_effect(0.05, 0.8) == np.inf


def test_levels_know_nothing_of_what_blocks_do_to_all_arms_alike():
    """Arms 1 % apart from block to block, and each block half as slow or quick again for all."""
    rng, off = np.random.default_rng(0), []
    for _ in range(60):
        blocks = rng.normal(0, 0.5, 25) + rng.normal(0, 0.01, (3, 25))
        turns = {f"arm {n}": Turns([Block(block, math.exp(v)) for block, v in enumerate(row)])
                 for n, row in enumerate(blocks)}  # fmt: skip
        off += [level for _, _, level, count in levels(turns, "e2e_s") if count == 25]
    assert len(off) == 180 and np.std(off) < 1.3 * 0.01 / math.sqrt(25)


def test_two_names_of_one_arm_are_two_of_its_processes():
    values = [[0.00], [0.02], [0.50]]
    assert between(table(values), "arm 0", "arm 2", {}).df == 0
    found = between(table(values), "arm 0", "arm 2", {"arm 1": "arm 0"})
    assert (found.sets, found.df) == (1, 1) and found.sd == pytest.approx(0.02 / np.sqrt(2))


def test_a_process_that_is_missing_costs_its_arm_a_set():
    values = np.random.default_rng(0).normal(size=(3, 3))
    levels = [one for one in table(values) if one[:2] != ("arm 2", 1)]
    assert between(levels, "arm 0", "arm 1", {}).sets == 3
    found = between(levels, "arm 0", "arm 2", {})
    assert (found.sets, found.df) == (2, 3)
    assert between(levels, "arm 0", "arm 9", {}).df == 0, "it has no process at all"


def test_sets_of_unequal_length_weigh_less():
    values = np.random.default_rng(5).normal(size=(3, 2))
    equal = between(table(values), "arm 0", "arm 1", {})
    lengths = [40, 4]
    levels = [(arm, of, level, lengths[of]) for arm, of, level, _ in table(values)]
    found = between(levels, "arm 0", "arm 1", {})
    assert equal.error == pytest.approx(equal.sd) and found.sd == equal.sd
    assert found.error == pytest.approx(found.sd * math.sqrt(2 / (44**2 / (40**2 + 4**2))))


def test_its_interval_is_that_of_two_means_of_processes():
    """Two arms alone: Student's of paired processes, by scipy."""
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 6))
    found = between(table([one, other]), "arm 0", "arm 1", {})
    assert found.df == 5
    test = student(5)
    paired_p = 2 * test.sf(abs((one - other).mean()) / ((one - other).std(ddof=1) / np.sqrt(6)))
    assert found.p((one - other).mean()) == pytest.approx(paired_p)
    assert found.half_width(0.95) == pytest.approx(
        test.ppf(0.975) * (one - other).std(ddof=1) / np.sqrt(6)
    )
    assert Processes(sets=3, sd=0.0, df=4).p(0.0) == 1 and Processes(sets=3, sd=0.0, df=4).p(1) == 0


@pytest.mark.parametrize("sets, arms", [(2, 3), (2, 8), (4, 4)])
def test_the_interval_covers_whatever_processes_there_are(sets, arms):
    """Equal arms whose processes are 3 % apart, 12 blocks of each: blocks alone cover far less."""
    rng, runs, covers, alone = np.random.default_rng(arms), 250, 0, 0
    for _ in range(runs):
        lucks = rng.normal(0, 0.03, (arms, sets))
        blocks = lucks[:, :, None] + rng.normal(0, 0.02, (arms, sets, 12))
        drawn = between(table(np.median(blocks - blocks.mean(0), -1)), "arm 0", "arm 1", {})
        differences = (blocks[1] - blocks[0]).ravel()
        low, high = paired(differences, processes=drawn).ci
        covers += low <= 0 <= high
        low, high = paired(differences).ci
        alone += low <= 0 <= high
    assert covers >= 0.93 * runs, covers
    assert alone <= 0.85 * runs, "the simulation must bite"


def test_an_arm_whose_processes_differ_more_than_others_is_seldom_taken_for_another():
    """Three times as much, eight arms: pooled alone, one in six is."""
    rng, runs, false, pooled, strict = np.random.default_rng(0), 1000, 0, 0, 0
    for _ in range(runs):
        levels = rng.normal(0, 0.03, (8, 2)) * ([[1.0], [3.0]] + [[1.0]] * 6)
        found, sd = between(table(levels), "arm 0", "arm 1", {}), spread(table(levels))[0]
        apart = float((levels[1] - levels[0]).mean())
        false += found.p(apart) <= 0.05
        strict += found.p(apart) <= 0.05 / 24
        pooled += Processes(sets=2, sd=sd, df=found.df).p(apart) <= 0.05
    assert false <= 0.16 * runs and pooled >= 1.3 * false, (false, pooled)
    assert strict <= 0.03 * runs, strict


def test_so_many_sets_find_the_effect_they_are_needed_for():
    sd, effect = 0.03, 0.05
    needed = Processes(sets=2, sd=sd, df=5).needed(effect, 0.05, 0.8)
    rng, found = np.random.default_rng(1), 0
    for _ in range(1000):
        found += ttest_ind(rng.normal(0, sd, needed), rng.normal(effect, sd, needed)).pvalue < 0.05
    assert 0.77 <= found / 1000 <= 0.86
