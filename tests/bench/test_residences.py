"""Several processes of every arm, one set after the other."""

import math
from dataclasses import replace

import pytest
from simulated import CELLS, Machine, SimWorker, built, session, speedups

from optpipe.bench.timed import timing
from optpipe.bench.timed.measure import BenchConfig
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.timed.series import collect

pytestmark = pytest.mark.usefixtures("no_pause")
START_S = 2.0


class Slow(SimWorker):
    """Takes its time to start; three of them do so one after the other."""

    def start(self):
        super().start()
        self.machine.now_ns += int(START_S / 3 * 1e9)


def timed(pair, config, worker=SimWorker, cells=CELLS[:1], fields=None, **noise):
    machine = Machine(0, **{"sd": 0.02, "bursts": 0, **noise})
    workers = [worker(machine, "baseline"), worker(machine, AGAIN), worker(machine, "copy", 0.5)]
    return session(machine, pair, workers, config, cells, **(fields or {}))


def blocks(outcome):
    """Of each residence, those that count."""
    found = {}
    for sample in outcome.measured.samples:
        if sample.reason is None:
            found.setdefault(sample.residence, set()).add(sample.block)
    return found


def test_every_set_of_processes_has_as_much_of_the_time_whatever_their_start_takes(pair):
    """Rounds of some 0.2 s; there is time for some sixty beside three starts."""
    config = BenchConfig(blocks=200, processes=3, max_processes=3, warmup_s=0.0, budget_s=12)
    outcome = timed(pair, config, Slow)
    found = blocks(outcome)
    counts = [len(of) for of in found.values()]
    assert len(counts) == 3 and min(counts) >= 14 and max(counts) <= 1.5 * min(counts), counts
    every = [block for of in found.values() for block in of]
    assert len({*every}) == len(every), "blocks count through"
    taken_s = max(s.done_ns for s in outcome.measured.samples) / 1e9
    assert 12 <= taken_s - 4 * START_S <= 12.5, "the constructors start them, too"
    assert "ended it after" in outcome.measured.stopped[CELLS[0]]


def test_warm_up_takes_half_of_the_time_of_a_cell_at_most_and_sessions_share_it(pair):
    config = BenchConfig(blocks=99, warmup=50, warmup_s=0.0, budget_s=12)
    spent = {}
    for number in (1, 2):
        outcome = timed(pair, config, fields={"sessions": [["baseline", "copy"]] * number})
        samples = [s for s in outcome.measured.samples if s.residence == 0]
        ends = {s.reason: s.done_ns / 1e9 for s in samples}
        spent[number] = ends[None]
        assert ends["warmup"] == pytest.approx(6 / number / 2, abs=0.4)
    assert spent[1] == pytest.approx(6, abs=0.4) and spent[2] == pytest.approx(3, abs=0.4)


def test_blocks_of_a_process_that_was_killed_are_another_process_than_those_after_it(pair):
    config = BenchConfig(blocks=4, warmup_s=0.0, budget_s=1e9)
    samples = timed(pair, config).measured.samples
    resumed = [replace(s, part=int(s.block >= 2)) for s in samples if s.residence == 0]
    sets = collect(resumed)["copy", CELLS[0]].sets
    assert {*sets.values()} == {(0, 0, 0), (0, 0, 1)}


def test_a_start_that_only_two_sets_show_costs_both_and_is_made_up_for_in_the_second(
    pair, monkeypatch
):
    """Processes of the first are gone by then."""

    def late(samples):
        sets = sorted({timing.set_of(s) for s in samples})
        first = {of: min(s.block for s in samples if timing.set_of(s) == of and s.block >= 0)
                 for of in sets}  # fmt: skip
        return {of: first[of] + 2 if len(sets) > 1 else -1 for of in sets}

    monkeypatch.setattr(timing, "late", late)
    config = BenchConfig(blocks=12, warmup_s=0.0, budget_s=1e9)
    found = blocks(timed(pair, config))
    assert [len(of) for of in found.values()] == [9, 12]


def test_a_budget_that_ends_with_the_first_processes_leaves_no_interval(pair):
    """What one process is to another nobody knows then, however many blocks it has."""
    config = BenchConfig(blocks=12, warmup_s=0.0, budget_s=2.5)
    outcome = timed(pair, config)
    assert blocks(outcome).keys() == {0, 1}
    config = BenchConfig(blocks=12, warmup_s=0.0, budget_s=0.0)
    outcome = timed(pair, config)
    assert blocks(outcome).keys() == {0}
    why = "ended it after 1 of at least 2 and at most 2 processes of every arm"
    assert why in outcome.measured.stopped[CELLS[0]]
    single = BenchConfig(blocks=12, processes=1, max_processes=1, warmup_s=0.0, budget_s=1e9)
    found = built(timed(pair, single))
    entry = speedups(found, "copy")["single", "tpot_s"]
    assert entry["processes"] == 1 and entry["ratio"] == pytest.approx(2, rel=0.05)
    # the two of the baseline are all that is known: Student's t of one degree of freedom
    assert math.log(entry["ci"][1] / entry["ci"][0]) > 10 * entry["process_sd"] > 0
    [cell] = found["run"]["design"]["resolution"]
    assert cell["tpot_s"]["ci"] is None and cell["tpot_s"]["process_sd"] is None
    assert cell["tpot_s"]["reasons"]["ci"].startswith("one process of each arm")


def test_an_arm_that_dies_in_the_second_set_keeps_the_numbers_of_the_first(pair):
    class Dies(SimWorker):
        def result(self, doing, timeout_s=None):
            if self.name == "copy" and self.total > 20:
                raise TimeoutError("no answer")
            return super().result(doing, timeout_s)

    config = BenchConfig(blocks=12, warmup_s=0.0, budget_s=1e9)
    outcome = timed(pair, config, Dies)
    assert "copy" in outcome.measured.dead
    found = built(outcome)
    assert not any("requests_lost" in why for why in found["run"]["invalid_reasons"])


def test_the_processes_of_every_set_are_asked_the_same_and_repeat_as_often(pair):
    config = BenchConfig(blocks=4, warmup_s=0.0, budget_s=1e9, turn_s=0.3)
    outcome = timed(pair, config)
    asked = {}
    for sample in outcome.measured.samples:
        if sample.block >= 0:
            asked.setdefault(sample.residence, set()).add((sample.prompt, sample.iteration))
    assert asked[0] == asked[1] and len(asked[0]) > 4


def test_a_luck_of_one_process_is_in_the_interval(pair):
    """Every process is a little quicker or slower than others, in all of its blocks."""
    config = BenchConfig(blocks=16, warmup_s=0.0, budget_s=1e9)
    widths, total = {}, {}
    for luck in (0.0, 0.05):
        found = built(timed(pair, config, sd=0.001, drift=0, processes=luck))
        entry = speedups(found, "copy")["single", "tpot_s"]
        assert entry["processes"] == 2
        widths[luck] = math.log(entry["ci"][1] / entry["ci"][0])
        assert (entry["process_sd"] > 0.01) == (luck > 0)
        rate = found["artifacts"][1]["cells"][0]["speedup"]["tokens_per_s"]
        total[luck] = math.log(rate["ci_bootstrap"][1] / rate["ci_bootstrap"][0])
    assert total[0.0] < 0.01 < 0.05 < total[0.05], "of all tokens by all time"
    assert widths[0.0] < 0.01 < 0.05 < widths[0.05]


def test_a_cell_that_is_known_well_enough_is_left_out_of_further_sets(pair):
    config = BenchConfig(
        blocks=6, processes=2, max_processes=4, warmup_s=0.0, budget_s=1e9, half_width=0.3
    )
    outcome = timed(pair, config, cells=CELLS[:2], sd=0.01)
    sets = {}
    for sample in outcome.measured.samples:
        sets.setdefault(sample.cell, set()).add(sample.residence)
    assert sets == {cell: {0, 1} for cell in CELLS[:2]}
    narrow = BenchConfig(
        blocks=6, processes=2, max_processes=4, warmup_s=0.0, budget_s=1e9, half_width=1e-6
    )
    outcome = timed(pair, narrow, cells=CELLS[:1], sd=0.01)
    assert {s.residence for s in outcome.measured.samples} == {0, 1, 2, 3}
