"""Cold starts: which requests are first ones, what they cost, and when there is a third."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from optpipe.bench import cold
from optpipe.bench.outcome import Outcome, Start
from optpipe.bench.policy import BenchConfig
from optpipe.bench.resident import Residents
from optpipe.bench.scenario import Cell, Scenario, Serving
from optpipe.bench.timed.samples import AGAIN

CELLS = [Cell("batch", 8, 8, 4), Cell("long", 1, 40, 4)]


@pytest.fixture
def outcome(arm):
    def make(*names):
        return Outcome(
            arms=[arm(name) for name in names], cells=CELLS, sessions=[[*names]], left_out={},
            bench=BenchConfig(budget_s=100.0),
        )  # fmt: skip

    return make


def residents(*workers):
    named = {worker.arm.name: worker for worker in workers}
    return Residents(workers=named, loaded={name: w.loaded for name, w in named.items()})


def test_the_first_request_is_the_cheapest_cell_or_one_row_of_a_server(outcome):
    """A batch of 8 x 12 tokens costs more than 1 x 44."""
    given = outcome("baseline")
    assert cold.shape(given) == CELLS[1]
    given.measured.scenarios = {name: Scenario(serving=Serving()) for name in ("batch", "long")}
    assert cold.shape(given) == CELLS[0]._replace(batch=1)


def test_a_first_request_is_timed(outcome, local):
    given, worker = outcome("baseline"), local("baseline", prefill_s=0.02, decode_s=0.005)
    assert cold.note(given, residents(worker)) == {}
    ((start,),) = given.starts.values()
    assert start.load_s == 1.5 and 0.035 <= start.first_s < 0.2, "prefill and three steps"
    assert worker.asked[0].ids_BS.shape == (1, 40) and worker.asked[0].new_tokens == 4
    cold.note(given, residents(local(AGAIN)))
    assert [*given.starts] == ["baseline"] and len(given.starts["baseline"]) == 2


def test_an_arm_that_breaks_at_its_first_request_is_ended_and_the_others_are_not(outcome, local):
    given, bad = outcome("baseline", "bad"), local("bad", fault="raise")
    found = residents(local("baseline"), bad)
    assert "first request: the kernel is unhappy" in cold.note(given, found)["bad"]
    assert [*found.workers] == ["baseline"] and bad.killed
    assert given.starts["bad"] == [Start(0.0, 1.5)], "it was loaded"


def test_what_does_not_fit_is_loaded_and_not_asked(outcome, local):
    given, small = outcome("small"), local("small", capacity=11)
    assert cold.note(given, residents(small)) == {} and small.asked == []
    cut = local("small", decode_s=0.01)
    given.bench = BenchConfig(iteration_limit_s=0.001)
    cold.note(given, residents(cut))
    assert [start.first_s for start in given.starts["small"]] == [None, None], "cut off"


def test_third_starts_are_made_while_they_fit_in_their_time(outcome, local, monkeypatch):
    """10 s: 'quick' is expected to take 2.5, takes 8, so that 'slow' with 3.5 no longer fits."""
    clock, started = SimpleNamespace(s=0.0), []
    monkeypatch.setattr(cold.time, "monotonic", lambda: clock.s)

    @contextmanager
    def reside(arms, progress):
        started.extend(arm.name for arm in arms)
        clock.s += 8.0
        yield residents(*(local(arm.name) for arm in arms))

    given = outcome("baseline", "slow", "quick", "gone", "lost")
    two = {"slow": 2.0, "quick": 1.0, "gone": 0.1}
    given.starts = {name: [Start(0.5, load_s, 0.0)] * 2 for name, load_s in two.items()}
    given.starts["baseline"] = [Start(0.1, 0.1, 0.1)] * 3
    given.broken["gone"] = "it broke"
    cold.again(given, reside, lambda *_: None)
    assert started == ["quick"] and len(given.starts["quick"]) == 3


def test_a_third_start_that_fails_leaves_the_arm_as_it_was(outcome, caplog):
    @contextmanager
    def reside(arms, progress):
        yield replace(residents(), broken={arm.name: "no memory left" for arm in arms})

    given = outcome("small")
    given.starts = {"small": [Start(0.1, 0.1, 0.1)] * 2}
    cold.again(given, reside, lambda *_: None)
    assert given.measured.dead == {} and given.absent("small") is None
    assert "no memory left" in caplog.text


def test_a_report_has_medians_and_every_start():
    starts = [Start(3.0, 2.0, 0.5), Start(1.0, 1.0, None), Start(2.0, 4.0, 0.25)]
    found = cold.entry(starts, CELLS[0], "")
    assert (found["starts"], found["import_s"], found["load_s"]) == (3, 1.0, 2.0)
    assert found["first_request_s"] == 0.375 and found["each_first_request_s"] == [0.5, 0.25]
    assert found["request"] == CELLS[0]._asdict() and found["reasons"] == {}
    unasked = cold.entry(starts[1:2], CELLS[0], "")
    assert unasked["reasons"] == {"first_request_s": cold.NO_ANSWER}
    empty = cold.entry([], CELLS[0], "too large")
    assert empty["starts"] == 0 and {*empty["reasons"].values()} == {"too large"}
