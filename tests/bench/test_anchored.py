from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from simulated import CELLS, FACTS, SCENARIOS, TOLD, Machine, SimWorker

from optpipe.bench import report
from optpipe.bench.outcome import Outcome
from optpipe.bench.resident import Residents
from optpipe.bench.timed import anchored, blocks, timing
from optpipe.bench.timed.anchored import Alternation, probe, schedule
from optpipe.bench.timed.journal import Journal, opened
from optpipe.bench.timed.measure import BenchConfig, Measured


def test_equal_neighbours_stay_loaded():
    found = schedule("a", "b", 4)
    assert found == [("a", [0]), ("b", [0, 1]), ("a", [1, 2]), ("b", [2, 3]), ("a", [3])]


def test_the_probe_is_work():
    assert 0 < probe() < 5


@pytest.fixture
def alternate(arm, monkeypatch):
    """alternate(**bench) -> two arms, never resident together, on a machine whose speed doubles
    half-way through; the process may be ``killed_at`` the loading of this number."""
    monkeypatch.setattr(blocks.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing, "TURN_S", 0.0)
    machine = Machine(0, sd=0.005, drift=0, bursts=0)
    monkeypatch.setattr(
        anchored, "Session", partial(blocks.Session, clock=machine.clock, meter=lambda: None)
    )
    loads, judged = [], []

    def pace():
        return 1.0 if len(loads) < 5 else 2.0

    monkeypatch.setattr(anchored.cold, "note", lambda outcome, residents: {})
    monkeypatch.setattr(anchored, "probe", lambda: 0.01 * pace())

    @contextmanager
    def reside(given, progress):
        [one] = given
        loads.append(one.name)
        scale = pace() * (1.0 if one.name == "baseline" else 0.5)
        worker = SimWorker(machine, one.name, scale)
        yield Residents(workers={one.name: worker}, loaded={one.name: TOLD})

    def run(kept=None, killed_at=None, **bench):
        outcome = Outcome(
            arms=[arm("baseline"), arm("big")],
            cells=CELLS[:1],
            sessions=[["baseline"], ["big"]],
            left_out={},
            anchored={"big"},
            bench=BenchConfig(warmup_s=0.0, **bench),
            measured=Measured(scenarios=SCENARIOS),
            journal=kept or Journal(),
        )

        def dying(given, progress):
            if len(loads) == killed_at:
                raise KeyboardInterrupt
            return reside(given, progress)

        Alternation(
            outcome=outcome,
            name="big",
            number=2,
            reside=dying,
            judge=lambda residents: judged.append(list(residents.workers)),
            progress=lambda *what: None,
        ).run()
        return outcome, loads, judged

    return run


def test_what_the_machine_became_in_between_cancels_and_no_verdict_is_drawn(alternate):
    outcome, loads, judged = alternate()
    assert len(loads) == 9 and judged == [["big"]]
    found = report.build(outcome, FACTS)
    entry = found["artifacts"][1]["cells"][0]["speedup"]["tpot_s"]
    assert entry["ratio"] == pytest.approx(2, rel=0.02) and entry["ci"] is not None
    assert entry["verdict"] == "INCONCLUSIVE" and "not timed side by side" in entry["reason"]
    assert found["run"]["design"]["anchored"] == ["big"]
    probes = {s.probe_s for s in outcome.measured.samples if s.reason is None}
    assert np.allclose(sorted(probes), [0.01, 0.02])


def test_a_run_of_many_looks_has_as_many_pairs_as_an_interval_at_its_level_takes(alternate):
    """Nine looks: 8 pairs would have none."""
    outcome, loads, _ = alternate(processes=1, max_processes=256)
    assert len(outcome.bench.looks) == 9 and len(loads) == 10
    entry = report.build(outcome, FACTS)["artifacts"][1]["cells"][0]["speedup"]["tpot_s"]
    assert entry["ci"] is not None and entry["ratio"] == pytest.approx(2, rel=0.02)


def test_the_time_budget_ends_it_and_the_arm_is_judged_all_the_same(alternate):
    outcome, loads, judged = alternate(budget_s=1e-9)
    assert loads == ["baseline", "big", "big"] and judged == [["big"]]
    [why] = outcome.measured.stopped.values()
    assert why == "the time budget (bench.budget_s=1e-09) ended it after 1 of 8 pairs"


@pytest.mark.parametrize("checks", range(7))
def test_wherever_the_budget_ends_it_no_request_is_lost(alternate, monkeypatch, checks):
    """One arm is a block ahead then, of which the other was never asked."""
    clock = iter([0.0] * (checks + 1))
    monkeypatch.setattr(anchored, "time", SimpleNamespace(monotonic=lambda: next(clock, 1e9)))
    outcome, _, judged = alternate()
    found = report.build(outcome, FACTS)
    assert found["run"]["invalid_reasons"] == [] and judged == [["big"]]
    entry = found["artifacts"][1]["cells"][0]["speedup"]["tpot_s"]
    assert entry["verdict"] == "INCONCLUSIVE"
    timed = [(s.block, s.arm) for s in outcome.measured.samples if s.reason is None]
    pairs = len(timed) // 2
    assert sorted(timed) == [(b, name) for b in range(pairs) for name in ("baseline", "big")]
    assert f"ended it after {pairs} of 8 pairs" in outcome.measured.stopped[CELLS[0]]


def test_one_that_was_killed_goes_on_with_the_residence_it_was_in(alternate, tmp_path):
    """T13: in the eighth of nine, the last of the other arm."""
    facts = {"artifacts": {}, "node": "n", "boot": "b"}
    with opened(str(tmp_path), lambda: facts) as kept, pytest.raises(KeyboardInterrupt):
        alternate(kept, killed_at=7)
    with opened(str(tmp_path), lambda: facts) as kept:
        outcome, loads, judged = alternate(kept)
    order = [name for name, _ in schedule("baseline", "big", 8)]
    assert loads == order and judged == [["big"]]
    timed = [s for s in outcome.measured.samples if s.reason is None]
    assert sorted((s.block, s.arm) for s in timed) == [
        (block, name) for block in range(8) for name in ("baseline", "big")
    ]
    assert {s.part for s in timed} == {0, 1} and {s.probe_s for s in timed} == {0.01, 0.02}


def test_after_a_kill_both_arms_still_answer_the_same_requests(alternate, tmp_path):
    """The second is twice as fast, and the first to be loaded again."""
    facts = {"artifacts": {}, "node": "n", "boot": "b"}
    with opened(str(tmp_path), lambda: facts) as kept, pytest.raises(KeyboardInterrupt):
        alternate(kept, killed_at=1, turn_s=0.4)
    with opened(str(tmp_path), lambda: facts) as kept:
        outcome, loads, _ = alternate(kept, turn_s=0.4)
    assert loads[:2] == ["baseline", "big"]
    asked = {}
    for sample in (s for s in outcome.measured.samples if s.reason is None):
        asked.setdefault((sample.arm, sample.block), []).append(sample.prompt)
    assert len(asked["big", 0]) > 1
    assert all(asked["baseline", block] == asked["big", block] for block in range(8))
