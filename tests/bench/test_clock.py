import time

import numpy as np
import pytest
from fakes import VOCAB

from optpipe.bench.backend import Backend
from optpipe.bench.timed.clock import ONE_TOKEN, generate, metrics


class Virtual:
    """A clock that only moves when a backend works."""

    def __init__(self, now_ns=1_000):
        self.now_ns = now_ns

    def __call__(self):
        return self.now_ns


class Timed:
    """A backend whose prefill takes 50 ms and whose steps take 5, 6, 7 .. ms of virtual time."""

    first_tokens, next_tokens = Backend.first_tokens, Backend.next_tokens

    def __init__(self, clock):
        self.clock, self.fed = clock, []

    def prefill(self, ids_BS, lengths_B):
        assert (lengths_B == ids_BS.shape[1]).all()
        self.clock.now_ns += 50_000_000
        return np.eye(VOCAB, dtype=np.float32)[[3, 7]]

    def decode(self, tokens_B):
        self.clock.now_ns += (5 + len(self.fed)) * 1_000_000
        self.fed.append(tokens_B.tolist())
        return np.eye(VOCAB, dtype=np.float32)[(tokens_B + 1) % VOCAB]


def run(new_tokens, limit_ns=None):
    clock = Virtual()
    backend = Timed(clock)
    trace = generate(backend, np.zeros((2, 4), np.int64), new_tokens, limit_ns, clock)
    return trace, backend


def test_every_metric_is_exact_on_a_virtual_clock():
    trace, _ = run(4)
    found = metrics(trace.start_ns - 2_000_000, trace.start_ns, trace.token_ns, batch=2)
    assert found == pytest.approx(
        {
            "ttft_s": 0.052,
            "queue_s": 0.002,
            "prefill_s": 0.050,
            "tpot_s": (0.005 + 0.006 + 0.007) / 3,
            "e2e_s": 0.070,
            "tokens_per_s": 2 * 4 / 0.070,
        },
        rel=1e-12,
    )
    assert found["ttft_s"] == pytest.approx(found["queue_s"] + found["prefill_s"], rel=1e-12)
    assert found["e2e_s"] == pytest.approx(found["ttft_s"] + 3 * found["tpot_s"], rel=1e-12)


def test_one_token_has_no_gap_to_time():
    trace, backend = run(1)
    found = metrics(trace.start_ns, trace.start_ns, trace.token_ns, batch=2)
    assert found["tpot_s"] is None and ONE_TOKEN
    assert found["tokens_per_s"] == pytest.approx(2 / 0.050)
    assert backend.fed == []


def test_the_greedy_token_of_each_row_is_fed_back():
    trace, backend = run(3)
    assert backend.fed == [[3, 7], [4, 8]]
    assert trace.tokens_NB.tolist() == [[3, 7], [4, 8], [5, 9]]


def test_it_stops_between_two_tokens_once_over_the_limit():
    assert len(run(9, limit_ns=54_000_000)[0].token_ns) == 2
    assert len(run(9, limit_ns=10_000_000)[0].token_ns) == 1


@pytest.mark.parametrize("stamps", [(5, 4, (6, 7)), (1, 2, (6, 5)), (1, 2, ()), (3, 3, (3,))])
def test_stamps_that_run_backwards_or_are_missing_are_no_measurement(stamps):
    assert set(metrics(*stamps, batch=1).values()) == {None}


def test_the_harness_costs_less_than_twenty_microseconds_a_token():
    """A backend without any delay: what is left is the harness, arg-max included."""

    class Instant:
        logits = np.zeros((1, VOCAB), dtype=np.float32)
        first_tokens, next_tokens = Backend.first_tokens, Backend.next_tokens

        def prefill(self, ids_BS, lengths_B):
            return self.logits

        def decode(self, tokens_B):
            return self.logits

    def per_token_s():
        ids = np.zeros((1, 4), np.int64)
        trace = generate(Instant(), ids, 2000, None, time.perf_counter_ns)
        return metrics(trace.start_ns, trace.start_ns, trace.token_ns, 1)["tpot_s"]

    assert min(per_token_s() for _ in range(5)) < 20e-6
