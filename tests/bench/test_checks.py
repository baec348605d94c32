"""T10: ten ways to look faster than one is, each caught by its name; and honest arms pass."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import CELLS, MS, Machine, SimWorker, built, session, speedups

from optpipe.bench.timed import clock, samples
from optpipe.bench.timed.checks import failures, unstable
from optpipe.bench.timed.measure import BenchConfig
from optpipe.bench.timed.samples import AGAIN, Sample
from optpipe.bench.timed.series import collect

CONFIG = BenchConfig(blocks=16, processes=1, max_processes=1, warmup_s=0.0, budget_s=1e9)


pytestmark = pytest.mark.usefixtures("no_pause")


@pytest.fixture
def judged(arm):
    """judged(spoil) -> the report on an honest baseline and an arm that is spoilt."""

    def run(spoil, **fields):
        machine = Machine(0, sd=0.02, bursts=0)
        workers = [
            SimWorker(machine, "baseline"),
            SimWorker(machine, AGAIN),
            SimWorker(machine, "cheat", spoil=spoil),
        ]
        arms = [arm("baseline"), arm("cheat")]
        return built(session(machine, arms, workers, CONFIG, **fields))

    return run


def stamps(answer, token_ns, tokens_NB=None):
    trace = replace(answer.trace, token_ns=tuple(token_ns))
    if tokens_NB is not None:
        trace = replace(trace, tokens_NB=tokens_NB)
    return replace(answer, trace=trace)


def shrunk(answer, by):
    start = answer.trace.start_ns
    return stamps(answer, (start + int((t - start) * by) for t in answer.trace.token_ns))


def cached_response(answer, ids, worker):
    """Answers every prompt as it did the first, at once."""
    worker.first = getattr(worker, "first", answer.trace.tokens_NB[:1] * 0)
    tokens = np.broadcast_to(worker.first, answer.trace.tokens_NB.shape)
    return stamps(shrunk(answer, 0.1), shrunk(answer, 0.1).trace.token_ns, tokens)


def early_eos(answer, ids, worker):
    half = len(answer.trace.token_ns) // 2
    return stamps(answer, answer.trace.token_ns[:half], answer.trace.tokens_NB[:half])


def zero_token(answer, ids, worker):
    return stamps(answer, (), answer.trace.tokens_NB[:0])


def drops_failures(answer, ids, worker):
    return None if worker.iterations % 5 == 0 else answer


def clock_jumps_back(answer, ids, worker):
    first, *rest = answer.trace.token_ns
    return stamps(answer, (first, *(t - 60 * MS for t in rest)))


def batch_split(answer, ids, worker):
    """Feeds half of the rows at a time where it is asked to feed all."""
    tokens, times = answer.trace.tokens_NB, answer.trace.token_ns
    rows = tokens.shape[1] // 2
    if not rows:
        return answer
    halves = np.concatenate([tokens[:, :rows], tokens[:, rows:]])
    return stamps(answer, (*times, *(t + times[-1] - times[0] + MS for t in times)), halves)


def faster_second_time(answer, ids, worker):
    """Keeps what it computed for a prompt: a quarter faster when it comes again."""
    worker.seen = getattr(worker, "seen", set())
    again = ids.tobytes() in worker.seen
    worker.seen.add(ids.tobytes())
    return shrunk(answer, 0.75) if again else answer


CHEATS = [
    (cached_response, "cached_response"),
    (early_eos, "token_count"),
    (zero_token, "no_tokens"),
    (drops_failures, "requests_lost"),
    (clock_jumps_back, "clock_backwards"),
    (batch_split, "batch_split"),
    (faster_second_time, "faster_second_time"),
]


@pytest.mark.parametrize(("cheat", "name"), CHEATS, ids=lambda value: getattr(value, "__name__", 0))
def test_a_cheat_is_invalid_by_its_name(judged, cheat, name):
    found = judged(cheat)
    entries = speedups(found, "cheat")
    caught = [key for key, e in entries.items() if e["verdict"] == "INVALID"]
    wanted = [("batch", "tokens_per_s")] if cheat is batch_split else [*entries]
    assert set(wanted) <= set(caught)
    reasons = found["run"]["invalid_reasons"]
    assert reasons and all(why.startswith("cheat, ") for why in reasons)
    assert any(f": {name}: " in why for why in reasons), reasons
    assert not {e["verdict"] for e in entries.values()} & {"FASTER"}


def test_an_asynchronous_runner_is_faster_than_physics(judged):
    floors = {("cheat", cell): {"ttft_s": 0.02, "tpot_s": 0.002} for cell in CELLS}
    found = judged(lambda answer, ids, worker: shrunk(answer, 0.01), floors=floors)
    assert any("cheat" in why and "faster_than_physics: tpot_s" in why
               for why in found["run"]["invalid_reasons"])  # fmt: skip
    assert {e["verdict"] for e in speedups(found, "cheat").values()} == {"INVALID"}


def test_work_after_the_last_stamp_is_seen_by_the_clock_of_the_parent(judged):
    def late(answer, ids, worker):
        fast = shrunk(answer, 0.01)
        worker.late_ns = answer.trace.token_ns[-1]
        return fast

    class Late(SimWorker):
        def result(self, doing, timeout_s=None):
            answer = super().result(doing, timeout_s)
            self.machine.now_ns = max(self.machine.now_ns, getattr(self, "late_ns", 0))
            return answer

    machine = Machine(0, sd=0.02, bursts=0)
    workers = [SimWorker(machine, "baseline"), Late(machine, "cheat", spoil=late)]
    outcome = session(machine, [], workers, CONFIG)
    found = failures(collect(outcome.measured.samples), {})
    assert {arm for arm, _ in found} == {"cheat"}
    assert all(why.startswith("hidden_work") for of in found.values() for why in of)


def test_a_prefill_that_is_counted_twice_breaks_the_identity(judged, monkeypatch):
    """TPOT with the first token in it, as some tools define it: 1.77 times too much."""

    def doubled(submit_ns, start_ns, token_ns, batch):
        honest = clock.metrics(submit_ns, start_ns, token_ns, batch)
        return {**honest, "tpot_s": (token_ns[-1] - submit_ns) / 1e9 / len(token_ns)}

    monkeypatch.setattr(samples, "metrics", doubled)
    found = judged(None)
    assert any("identity" in why for why in found["run"]["invalid_reasons"])
    assert {e["verdict"] for e in speedups(found, "cheat").values()} == {"INVALID"}


def test_an_arm_that_was_ended_is_not_accused_of_losing_requests(arm):
    """What it answered before counts; why the rest is missing is said where it was ended."""

    class Dies(SimWorker):
        def result(self, doing, timeout_s=None):
            if self.iterations > 8:
                raise TimeoutError("no answer within 60 s")
            return super().result(doing, timeout_s)

    machine = Machine(0, sd=0.02, bursts=0)
    workers = [SimWorker(machine, "baseline"), SimWorker(machine, AGAIN), Dies(machine, "cheat")]
    arms = [arm("baseline"), arm("cheat")]
    outcome = session(machine, arms, workers, CONFIG)
    assert "no answer" in outcome.measured.dead["cheat"]
    assert built(outcome)["run"]["invalid_reasons"] == []


def test_an_artifact_edited_after_the_gate_is_invalid(judged):
    why = "artifact_changed: 0a was loaded, 0b is there now"
    found = judged(None, changed={"cheat": why})
    assert found["run"]["invalid_reasons"] == [why]
    assert {e["reason"] for e in speedups(found, "cheat").values()} == {why}


@pytest.mark.parametrize("which", ["cheat", "baseline"])
@pytest.mark.parametrize("field", ["changed", "unlike"])
def test_what_is_not_what_was_judged_has_no_valid_ratio_at_all(judged, field, which):
    """Of the baseline, either: every ratio is to it. Secondary metrics and the crossover, too."""
    found = judged(None, **{field: {which: "it is another"}})
    cells = found["artifacts"][1]["cells"]
    for cell in cells:
        for metric, entry in cell["speedup"].items():
            if metric != "bytes" and entry["ratio"] is not None:
                assert (entry["verdict"], entry["reason"]) == ("INVALID", "it is another"), metric
    assert cells[0]["speedup"]["bytes"]["verdict"] is None, "not timed"
    assert "it is another" in found["run"]["invalid_reasons"]
    assert found["recommendation"] and all(
        r["artifact"] == "baseline" for r in found["recommendation"]
    )


def test_an_instrument_that_is_off_makes_all_invalid(judged):
    told = {"ttft_error": 0.0, "tpot_error": 0.03, "e2e_error": 0.0, "passed": False}
    found = judged(None, instrument=told)
    assert found["run"]["design"]["instrument"] == told
    assert {e["verdict"] for e in speedups(found, "cheat").values()} == {"INVALID"}


def test_answers_that_vary_are_no_greedy_decoding(judged):
    def vary(answer, ids, worker):
        return stamps(answer, answer.trace.token_ns, answer.trace.tokens_NB + worker.iterations)

    assert any("varying_answers" in why for why in judged(vary)["run"]["invalid_reasons"])


def test_a_device_cannot_work_longer_than_the_request_took(judged):
    found = judged(lambda answer, ids, worker: replace(answer, device_s=(4.0, 6.0)))
    assert all("device_exceeds_wall" in why for why in found["run"]["invalid_reasons"])


@pytest.mark.parametrize("seed", range(3))
def test_honest_arms_pass_all_checks(arm, seed):
    machine = Machine(seed)
    floors = {("copy", cell): {"tpot_s": 0.002} for cell in CELLS}
    arms = [arm("baseline"), arm("copy")]
    workers = [SimWorker(machine, n) for n in ("baseline", AGAIN, "copy")]
    found = built(session(machine, arms, workers, floors=floors))
    assert found["run"]["invalid_reasons"] == []


@pytest.mark.parametrize(("count", "share"), [(7, 0.5), (10, 0.2)])
def test_a_few_disturbed_turns_void_no_cell(count, share):
    assert unstable(turns_of(count, share)) == {}


def test_many_disturbed_turns_void_a_cell():
    assert "25%" in unstable(turns_of(8, 0.25))[CELLS[0]]


def turns_of(count, share):
    """Samples of one arm in so many blocks, of which this share is disturbed."""
    noted = round(count * share)
    return [
        Sample(arm="a", cell=CELLS[0], session=0, block=b, position=0, reason=None, submit_ns=0,
               start_ns=1, token_ns=(2,), cpu_s=None, peak_bytes=None, tokens_hash="",
               note="another process" if b < noted else None)
        for b in range(count)
    ]  # fmt: skip
