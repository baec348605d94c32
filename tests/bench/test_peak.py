"""Memory is that of a process: blocks repeat it, and two processes of one arm differ."""

import math

import pytest
from simulated import CELLS, Machine, SimWorker, built, session, speedups

from optpipe.bench import peak
from optpipe.bench.timed.measure import BenchConfig
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.timed.series import collect

CONFIG = BenchConfig(warmup_s=0.0, budget_s=1e9)
GB = 1_000_000_000


pytestmark = pytest.mark.usefixtures("no_pause")


def takes(count):
    return lambda answer, ids, worker: answer.__class__(**{**vars(answer), "peak_bytes": count})


def measured(pair, again, copy, base=10 * GB):
    machine = Machine(0, sd=0.02, bursts=0)
    peaks = {"baseline": base, AGAIN: again, "copy": copy}
    workers = [SimWorker(machine, name, spoil=takes(count)) for name, count in peaks.items()]
    return session(machine, pair, workers, CONFIG)


@pytest.mark.parametrize(("again", "copy", "verdict"), [
    (10.0, 9.6, "FASTER"),
    (10.0, 10.0, "EQUIVALENT"),
    (10.0, 9.995, "EQUIVALENT"),
    (9.7, 9.6, "INCONCLUSIVE"),  # the two of the baseline are 3 % apart
    (9.7, 9.0, "FASTER"),
    (10.3, 11.2, "SLOWER"),
    (10.3, 10.0, "INCONCLUSIVE"),
])  # fmt: skip
def test_a_verdict_on_memory_is_beyond_what_two_processes_of_one_arm_differ_by(
    pair, again, copy, verdict
):
    found = built(measured(pair, int(again * GB), int(copy * GB)))
    [entry] = [e for (_, metric), e in speedups(found, "copy").items() if metric == "peak_bytes"]
    assert entry["verdict"] == verdict, entry
    assert not found["run"]["invalid_reasons"], "it is how finely memory is known, not an error"
    low, high = entry["ci"]
    heap = math.log1p(peak.HEAP_BYTES / (min(10, copy) * GB))
    known = max(2 * abs(math.log(again / 10)), heap)
    assert low == pytest.approx(10 / copy / math.exp(known)) and low < 10 / copy < high
    assert "two processes of one arm" in entry["reasons"]["processes"]


@pytest.mark.parametrize("base, copy", [(433, 500), (500, 433), (240, 300), (500, 500)])
def test_a_heap_of_the_allocator_more_in_either_process_is_no_difference(pair, base, copy):
    outcome = measured(pair, base * 1_000_000, copy * 1_000_000, base * 1_000_000)
    found = built(outcome)
    [entry] = [e for (_, metric), e in speedups(found, "copy").items() if metric == "peak_bytes"]
    assert entry["verdict"] == "INCONCLUSIVE", "none is shown, and none to be negligible"
    turns = collect(outcome.measured.samples)
    three = [turns[name, CELLS[0]] for name in ("baseline", "copy", AGAIN)]
    known = math.log1p(2**26 / (min(base, copy) * 1e6))
    assert peak.slack(*three, True) == pytest.approx(known) and peak.slack(*three, False) == 0
    assert f"may differ by {math.expm1(known):.1%}" in entry["reason"]


def test_what_a_run_can_resolve_is_what_two_processes_may_differ_by(pair):
    [cell, *_] = built(measured(pair, int(9.7 * GB), 9 * GB))["run"]["design"]["resolution"]
    entry, twice = cell["peak_bytes"], 2 * math.log(10 / 9.7)
    low, high = entry["ci"]
    assert low == pytest.approx(10 / 9.7 / math.exp(twice))
    assert high == pytest.approx(10 / 9.7 * math.exp(twice)) and "differs" not in entry["reasons"]
