"""The server: exact on a virtual clock, as queueing theory says, and honest on a real one."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import VOCAB

from optpipe.bench.backend import Backend
from optpipe.bench.scenario import Cell, Objective, Scenario, Serving, hash_ids
from optpipe.bench.serving import load
from optpipe.bench.serving.feeds import Arrived, Ask, Closed, Open
from optpipe.bench.serving.live import UNANSWERED, request_of
from optpipe.bench.serving.load import Load, highest_rate, search
from optpipe.bench.serving.request import invalid, metrics
from optpipe.bench.serving.serve import Serve, Served, serve
from optpipe.bench.timed import blocks, checks
from optpipe.bench.timed.measure import BenchConfig, Measured, Session, measure
from optpipe.bench.worker import Worker

MS = 1_000_000
NEVER = 10**18
LOOSE = Objective(ttft_s=None, tpot_s=None, e2e_s=None)


class Virtual:
    """A clock that only moves when a backend works or the server waits."""

    now_ns = 1_000

    def __call__(self):
        return self.now_ns


class Timed:
    """Virtual time: a prefill and every step take what they are told."""

    first_tokens, next_tokens = Backend.first_tokens, Backend.next_tokens

    def __init__(self, clock, prefill_ms, decode_ms=0.0):
        self.clock, self.prefill_ns = clock, round(prefill_ms * MS)
        self.decode_ns, self.batches = round(decode_ms * MS), []

    def prefill(self, ids_BS, lengths_B):
        self.clock.now_ns += self.prefill_ns
        self.batches.append(lengths_B.tolist())
        return np.eye(VOCAB, dtype=np.float32)[ids_BS[:, 0] % VOCAB]

    def decode(self, tokens_B):
        self.clock.now_ns += self.decode_ns
        return np.eye(VOCAB, dtype=np.float32)[(tokens_B + 1) % VOCAB]


class Due:
    """An open loop on a virtual clock."""

    def __init__(self, asks, clock):
        self.clock, self.left = clock, [Arrived(a, a.at_ns + 1_000, a.at_ns + 1_000) for a in asks]
        self.left.reverse()

    def take(self, most, wait=True):
        if self.left and wait:
            self.clock.now_ns = max(self.clock.now_ns, self.left[-1].submit_ns)
        batch = []
        while self.left and len(batch) < most and self.left[-1].submit_ns <= self.clock.now_ns:
            batch.append(self.left.pop())
        return batch

    def finished(self, count):
        pass

    def close(self):
        return self.left


def ask(at_ms, new_tokens=1, prompt=2):
    return Ask(round(at_ms * MS), np.arange(prompt) + 1, new_tokens)


def served(asks, backend, max_batch=1, until_ns=NEVER):
    return serve(backend, Due(asks, backend.clock), max_batch, until_ns, backend.clock)


def test_every_metric_is_exact_on_a_virtual_clock():
    """Prefill 50 ms, steps 5 ms: the second waits for the first, the third finds nobody."""
    backend = Timed(Virtual(), 50, 5)
    found = served([ask(0, 3), ask(10, 1), ask(200, 2)], backend)
    each = [one.metrics() for one in found.requests]
    assert [one["queue_s"] for one in each] == pytest.approx([0, 0.050, 0])
    assert [one["prefill_s"] for one in each] == pytest.approx([0.05] * 3)
    assert [one["ttft_s"] for one in each] == pytest.approx([0.05, 0.10, 0.05])
    assert [one["e2e_s"] for one in each] == pytest.approx([0.06, 0.10, 0.055])
    assert [each[0]["tpot_s"], each[2]["tpot_s"]] == pytest.approx([0.005] * 2)
    assert each[1]["tpot_s"] is None
    block = metrics(found.requests, Objective(ttft_s=0.06, tpot_s=0.01))
    assert block["tokens_per_s"] == pytest.approx(6 / 0.255)
    assert block["goodput_per_s"] == pytest.approx(2 / 0.255)
    assert invalid(found.requests, found.events) == []
    assert found.tokens == [1, 2, 3, 1, 1, 2]


def test_what_waits_is_served_together_and_each_row_ends_with_its_own_answer():
    """The batch of two runs on for the longer answer; the last request waits for all of it."""
    backend = Timed(Virtual(), 50, 5)
    found = served([ask(0), ask(1, 2, prompt=3), ask(2, 4), ask(3)], backend, max_batch=2)
    assert backend.batches == [[2], [3, 2], [2]]
    ends = [(one.end_ns - 1_000) / MS for one in found.requests]
    assert ends == [50, 105, 115, 165]
    assert [one.tokens for one in found.requests] == [1, 2, 4, 1]
    assert [(one.start_ns - 1_000) / MS for one in found.requests] == [0, 50, 50, 115]


class Engine:
    """Schedules itself: every step takes 10 ms and gives each request a token."""

    def __init__(self, clock):
        self.clock, self.left, self.most, self.count = clock, {}, 0, 0

    def submit(self, ids, new_tokens):
        self.count += 1
        name = f"request {self.count}"
        self.left[name] = new_tokens
        self.most = max(self.most, len(self.left))
        return name

    def step(self):
        self.clock.now_ns += 10 * MS
        found = {name: [7] for name in self.left}
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return found


def test_an_engine_that_schedules_gets_requests_as_they_come():
    """The second joins the first while that still runs, and both leave when they are done."""
    engine = Engine(Virtual())
    found = served([ask(0, 3), ask(12, 2)], engine, max_batch=2)
    first, second = found.requests
    assert [(at - 1_000) / MS for at, _ in first.chunks] == [10, 20, 30]
    assert [(at - 1_000) / MS for at, _ in second.chunks] == [30, 40]
    assert (second.start_ns - second.submit_ns) / MS == 8  # in the middle of a step
    assert first.error is second.error is None and found.tokens == [7] * 5
    assert invalid(found.requests, found.events) == []


def test_an_engine_never_has_more_than_the_batch():
    engine = Engine(Virtual())
    found = served([ask(0, 2)] * 5, engine, max_batch=2)
    assert engine.most == 2 and [one.tokens for one in found.requests] == [2] * 5
    ends = [(one.end_ns - 1_000) / MS for one in found.requests]
    assert ends == [20, 20, 40, 40, 60]


def test_what_an_engine_has_not_answered_in_time_has_failed():
    engine = Engine(Virtual())
    found = served([ask(0, 2), ask(0, 9), ask(0, 9)], engine, max_batch=2, until_ns=50 * MS)
    assert [one.error for one in found.requests] == [None, UNANSWERED, UNANSWERED]
    assert invalid(found.requests, found.events) == []
    assert metrics(found.requests, LOOSE)["failed"] == 2


@pytest.mark.parametrize(("tokens", "error"), [
    (3, "3 tokens where 4 were asked for"), (4, None), (5, "5 tokens where 4 were asked for"),
])  # fmt: skip
def test_an_answer_of_another_length_says_so(tokens, error):
    """T10: an early end is no lack of time."""
    chunks = [(2_000 + n, 1) for n in range(tokens)]
    found = request_of(Arrived(ask(0, 4), 1_000, 1_000), None, chunks, chunks[-1][0])
    assert found.error == error


def test_what_is_not_answered_in_time_has_failed():
    backend = Timed(Virtual(), 50, 5)

    class Ends(Due):
        def take(self, most, wait=True):
            return [] if self.clock() > 90 * MS else super().take(most)

    asks = [ask(0), ask(0, 10), ask(0)]
    found = serve(backend, Ends(asks, backend.clock), 1, 110 * MS, backend.clock)
    assert [one.error for one in found.requests] == [None, UNANSWERED, UNANSWERED]
    assert [one.tokens for one in found.requests] == [1, 3, 0]
    block = metrics(found.requests, LOOSE)
    assert block["failed"] == 2 and block["good_share"] == pytest.approx(1 / 3)
    assert invalid(found.requests, found.events) == [], "failed requests are still accounted for"


def test_the_queue_is_that_of_queueing_theory():
    """M/D/1 at 70 % load: the mean wait is rho s / (2 (1 - rho))."""
    service_s, rho, count = 0.010, 0.7, 30_000
    rng = np.random.default_rng(0)
    at_s = np.cumsum(rng.exponential(service_s / rho, count))
    ids = np.zeros(1, np.int64)
    found = served([Ask(int(t * 1e9), ids, 1) for t in at_s], Timed(Virtual(), 10))
    queue_s = np.mean([(one.start_ns - one.submit_ns) / 1e9 for one in found.requests])
    assert queue_s == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.10)
    assert invalid(found.requests, found.events) == []


def test_clients_of_a_closed_loop_wait_for_their_answers():
    clock = Virtual()
    backend = Timed(clock, 50)
    found = serve(backend, Closed([ask(0)] * 5, 2, NEVER, clock), 1, NEVER, clock)
    queue_ms = [(one.start_ns - one.submit_ns) / MS for one in found.requests]
    assert queue_ms == [0, 50, 50, 50, 50], "one is served while the other waits"
    ended = serve(backend, Closed([ask(0)] * 5, 2, clock() + 70 * MS, clock), 1, NEVER, clock)
    assert [one.error is None for one in ended.requests] == [True, True, False, False]


class Client(Open):
    """A client to which every request costs 200 us, as one over HTTP does."""

    def _send(self, ask, due_ns):
        time.sleep(0.0002)
        super()._send(ask, due_ns)


@pytest.mark.parametrize(("streams", "flagged"), [(8, False), (512, True)])
def test_a_saturated_client_is_flagged(streams, flagged, local):
    """T11: each stream sends a request every 100 ms to a server that takes 100 ms for a batch."""
    backend = local("a", prefill_s=0.1).backend
    per_s = streams / 0.1
    asks = [ask(1000 * n / per_s) for n in range(max(streams, 40))]
    feed = Client(asks, time.perf_counter_ns(), NEVER)
    found = serve(backend, feed, 512, NEVER, time.perf_counter_ns)
    names = [reason.partition(":")[0] for reason in invalid(found.requests, found.events)]
    assert names == ["client_bound"] * flagged
    assert len(found.requests) == len(asks)


CELL = Cell("server", 2, 16, 4)


def made(block=0, rate=50.0, **serving):
    given = Serving(**({"requests": 20} | serving))
    whole = Load(cell=CELL, serving=given, vocab=VOCAB, seed=3, limit_s=5.0)
    return whole.command(block, rate)


def test_blocks_differ_and_arms_do_not():
    one, again, other = made(), made(), made(block=1)
    assert one.max_batch == 2 and one.clients is None
    for a, b in zip(one.asks, again.asks, strict=True):
        assert a.at_ns == b.at_ns and (a.ids_S == b.ids_S).all()
    assert [a.at_ns for a in one.asks] != [a.at_ns for a in other.asks]
    assert len({hash_ids(a.ids_S) for c in (one, other) for a in c.asks}) == 40


def test_loads_of_every_kind():
    drawn = made(sigma=0.5)
    assert len({len(a.ids_S) for a in drawn.asks}) > 3
    assert max(len(a.ids_S) for a in drawn.asks) <= 16
    assert {a.new_tokens for a in drawn.asks} <= {1, 2, 3, 4}
    assert made(arrivals="burst").asks[-1].at_ns != made().asks[-1].at_ns
    closed = made(arrivals="closed", rate=None)
    assert closed.clients == 4 and {a.at_ns for a in closed.asks} == {0}
    traced = made(arrivals="trace", rate=None)
    assert traced.asks[0].at_ns == 0 and len(traced.asks) == 20


def test_a_worker_serves_while_its_parent_sleeps(arm):
    """Times of a real clock; the parent may use 2 % of a core, the worker sends to itself."""
    asks = tuple(ask(20 * n, 3) for n in range(25))
    with Worker(arm("slow", prefill_s=0.01, decode_s=0.002)) as worker:
        worker.imported()
        worker.load(60)
        before = time.process_time(), time.perf_counter()
        answer = worker.ask(
            Serve(asks=asks, max_batch=1, limit_s=5, objective=LOOSE), "serving", 60
        )
        share = (time.process_time() - before[0]) / (time.perf_counter() - before[1])
    found = answer.metrics
    assert answer.trace.token_ns[-1] == max(one.end_ns for one in answer.requests)
    assert share < 0.02
    assert found["failed"] == 0 and len(answer.requests) == 25
    each = [one.metrics() for one in answer.requests]
    assert 0.010 <= min(one["ttft_s"] for one in each) < 0.012
    assert 0.002 <= min(one["tpot_s"] for one in each) < 0.0025
    assert [why for why in answer.invalid if not why.startswith("client_bound")] == [], (
        "a busy machine may delay the sender"
    )
    assert answer.peak_bytes is None or answer.peak_bytes > 1_000_000


@pytest.mark.parametrize("start", [0.5, 3.0, 60.0])
def test_the_search_ends_just_below_the_highest_good_rate(start):
    tried = []

    def share(rate):
        tried.append(rate)
        return 1.0 if rate <= 10.0 else 0.5

    found = highest_rate(share, start, 0.9, steps=12)
    assert 10 / 1.1 <= found <= 10 and found in tried


def test_a_rate_that_only_lets_the_queue_grow_is_too_high():
    """No limit but that of the queue: every request takes 50 ms, so 20 a second are all there is.

    A block of 20 then takes 1 s; it has kept up if its arrivals take at least 0.95 / 1.1 s.
    """
    tried = {}

    def run(command):
        done = served(command.asks, Timed(Virtual(), 50))
        rate = 19e9 / (command.asks[-1].at_ns - command.asks[0].at_ns or 1)  # that came about
        tried[rate] = Served(
            requests=tuple(done.requests), events=tuple(done.events), tokens=tuple(done.tokens),
            objective=LOOSE, cpu_s=0.0, peak_bytes=None,
        )  # fmt: skip
        return tried[rate]

    given = Serving(requests=20, objective=LOOSE)
    load = Load(cell=Cell("server", 1, 2, 1), serving=given, vocab=VOCAB, seed=3, limit_s=5.0)
    assert 10 < search(load, run) < 30
    assert all(done.metrics["good_share"] == 1 for done in tried.values())
    assert max(tried) > 19 / (0.95 / 1.1), "it tried higher ones"


def test_a_rate_that_no_search_finds():
    assert highest_rate(lambda rate: 0.0, 8.0, 0.9, steps=4) is None
    assert highest_rate(lambda rate: 1.0, 8.0, 0.9, steps=4) == 64
    left = iter([1.0, 1.0])
    assert highest_rate(lambda rate: next(left, None), 8.0, 0.9) == 16, "the time was over"


def test_a_server_is_timed_block_by_block_like_any_other_cell(local, monkeypatch):
    """Two equal arms in whole blocks: the same requests for both, at the rate of the baseline."""
    monkeypatch.setattr(blocks, "SETTLE_S", 0.0)
    serving = Serving(requests=6, objective=Objective(ttft_s=0.05, tpot_s=None))
    found = Measured(scenarios={"server": Scenario(serving=serving)})
    workers = {name: local(name, prefill_s=0.004, decode_s=0.001) for name in ("baseline", "twin")}
    session = Session(
        number=0, workers=workers, loaded={n: w.loaded for n, w in workers.items()}, budget_s=0.5
    )
    measure(session, [CELL], BenchConfig(blocks=6, warmup_s=0.1), found, lambda *_: None)
    rate = found.rates[CELL]
    assert rate > 10 and not found.dropped and not found.dead
    timed = [sample for sample in found.samples if sample.reason is None]
    assert timed and {len(sample.served.requests) for sample in timed} == {6}
    asked = {
        name: [c.ids_hash for c in worker.asked if isinstance(c, Serve)][-len(timed) // 2 :]
        for name, worker in workers.items()
    }
    assert asked["baseline"] == asked["twin"]
    assert all(sample.metrics["ttft_sched_s"] >= 0.004 for sample in timed)
    values, why = load.entry(timed, CELL, found)
    assert values["rate_per_s"] == rate and values["slo"]["ttft_s"] == 0.05
    assert values["goodput_per_s"] > 0
    null = {name for name, value in values.items() if value is None}
    assert null == why.keys() - ({"rate_per_s"} if CELL in found.hurried else set())


def test_a_search_that_the_budget_ended_says_so(local, monkeypatch):
    """No time: one request alone and one rate. Whether that was kept depends on the machine."""
    monkeypatch.setattr(blocks, "SETTLE_S", 0.0)
    serving = Serving(requests=3, objective=Objective(ttft_s=5.0, tpot_s=None))
    found = Measured(scenarios={"server": Scenario(serving=serving)})
    worker = local("baseline", prefill_s=0.002)
    session = Session(
        number=0, workers={"baseline": worker}, loaded={"baseline": worker.loaded}, budget_s=0.0
    )
    measure(session, [CELL], BenchConfig(blocks=1, warmup_s=0), found, lambda *_: None)
    said = "the time budget (bench.budget_s=120) ended the search after 1 of at most 20 rates"
    assert found.hurried == {CELL: said}
    timed = [sample for sample in found.samples if sample.reason is None]
    if found.rates[CELL] is None:
        assert found.dropped["baseline", CELL].endswith(f"no rate that was tried; {said}")
    else:
        assert load.entry(timed, CELL, found)[1]["rate_per_s"] == said


def test_only_most_blocks_make_a_server_invalid():
    def sample(lost):
        backend = Timed(Virtual(), 50)
        done = served([ask(n) for n in range(9)], backend)
        block = Served(
            requests=tuple(done.requests[lost:]), events=tuple(done.events), cpu_s=0.0,
            tokens=tuple(done.tokens), objective=LOOSE, peak_bytes=None,
        )  # fmt: skip
        return SimpleNamespace(served=block)

    assert [*checks._served([sample(1), sample(1), sample(0), sample(0)])] == []
    (why,) = checks._served([sample(1), sample(1), sample(0)])
    assert why.startswith("little: ")
