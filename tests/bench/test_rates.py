"""Rates of a cell without a server, and of the busy times of one, worked out by hand."""

import pytest
from test_host import CELL, MS, sample

from optpipe.bench import rates
from optpipe.bench.serving.request import busy
from optpipe.bench.timed.clock import NO_STAMPS, ONE_TOKEN
from optpipe.bench.timed.series import Turns


def told(device_ms=(30, 4, 4), cell=CELL, **fields):
    """Of samples of 2 rows, 100 tokens in and 3 out: 51 ms to the first, then two of 10 ms."""
    given = [sample(device_ms, cell=cell, **fields)]
    return rates.entry(given, cell, given[0].metrics, "")


def test_rates_are_the_times_in_other_words():
    found, reasons = told()
    assert found == pytest.approx(
        {
            "user_tokens_per_s": 1 / 0.010,
            "user_e2e_tokens_per_s": 3 / 0.071,
            "decode_tokens_per_s": 2 * 2 / 0.020,  # B (m - 1) from the first to the last token
            "requests_per_s": 2 / 0.071,
            "total_tokens_per_s": 2 * 103 / 0.071,
            "prefill_tokens_per_s": 200 / 0.030,  # by the device's clock
            "icl_max_s": 0.010,
        }
    )
    assert found.keys() == {*rates.NAMES} and reasons == {}


def test_without_events_prompts_are_timed_by_the_wall():
    assert told(device_ms=None)[0]["prefill_tokens_per_s"] == pytest.approx(200 / 0.050)


def test_the_longest_gap_is_that_of_the_median_iteration():
    late = [sample(token_ns=(0, 1 * MS, (1 + gap) * MS), start_ns=0) for gap in (5, 7, 90)]
    found, _ = rates.entry(late, CELL, late[0].metrics, "")
    assert found["icl_max_s"] == pytest.approx(0.007)


def test_what_has_no_rate_says_why():
    found, reasons = told(cell=CELL._replace(new_tokens=1), token_ns=(51 * MS,))
    assert reasons == dict.fromkeys(rates.OF_DECODING, ONE_TOKEN)
    assert found["user_e2e_tokens_per_s"] == pytest.approx(1 / 0.051)
    assert {*told(device_ms=None, token_ns=())[1].values()} == {NO_STAMPS}
    nothing = dict.fromkeys(("tpot_s", "tokens_per_s", "e2e_s"))
    assert rates.entry([], CELL, nothing, "too slow")[1] == dict.fromkeys(rates.NAMES, "too slow")


@pytest.mark.parametrize(("together", "spans"), [
    (1, [(0, 1), (1, 2), (2, 4), (4, 5), (7, 9)]), (2, [(1, 2), (2, 4)]), (3, []),
])  # fmt: skip
def test_when_so_many_spans_overlap(together, spans):
    """The third begins as the second ends; the last is only a moment."""
    assert busy([(0, 4), (1, 2), (2, 5), (7, 9), (12, 12)], together) == spans


def test_the_rate_of_a_turn_is_all_its_tokens_by_all_its_time():
    """Iterations of 0.1, 0.1 and 0.4 s, 6 tokens each: 18 in 0.6 s; of a latency the median."""
    turn = Turns([sample(token_ns=(MS, 2 * MS, ms * MS)) for ms in (100, 100, 400)])
    assert turn.by_block("tokens_per_s") == {(0, 0): pytest.approx(18 / 0.6)}
    assert turn.by_block("e2e_s") == {(0, 0): 0.1}
