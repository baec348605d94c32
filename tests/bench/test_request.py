"""Definitions: T1(a), T7 and the checks of a block, all against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpipe.bench.scenario import Objective
from optpipe.bench.serving.request import Request, invalid, little, metrics, pooled, reasons

MS = 1_000_000
LOOSE = Objective(ttft_s=None, tpot_s=None, e2e_s=None)


def request(sched, submit, start, chunks, **more):
    """Times in ms; chunks are (ms, tokens); the prompt has 10 tokens."""
    known = {"new_tokens": sum(count for _, count in chunks), **more}
    known["end_ns"] = round(known.pop("end", chunks[-1][0] if chunks else 0) * MS)
    return Request(
        sched_ns=round(sched * MS),
        submit_ns=round(submit * MS),
        start_ns=None if start is None else round(start * MS),
        chunks=tuple((round(at * MS), count) for at, count in chunks),
        prompt_tokens=10,
        **known,
    )


def same(found, expected):
    """Equal up to rounding, null where and only where null is expected."""
    numbers = {name: value for name, value in expected.items() if value is not None}
    assert found.keys() == expected.keys()
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(
        numbers, rel=1e-12
    )


# Sent 10 ms late, queued for 500 ms, first token after 2 s, 20 ms for each of 127 others.
STEADY = request(0, 10, 510, [(2010 + 20 * n, 1) for n in range(128)])
# An empty chunk, then two tokens, four after 100 ms, two after 60 ms.
CHUNKED = request(1000, 1000, 1100, [(1150, 0), (1200, 2), (1300, 4), (1360, 2)])
ONE_TOKEN = request(1500, 1500, 1550, [(1600, 1)])
FAILED = request(2000, 2000, None, [], new_tokens=8, error="refused", end=2500)
SHORT = request(2100, 2100, 2100, [(2200, 1), (2210, 1)], new_tokens=8, error="cut off")
LOG = [STEADY, CHUNKED, ONE_TOKEN, FAILED, SHORT]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (STEADY, {"ttft_s": 2.0, "ttft_sched_s": 2.01, "queue_s": 0.5, "prefill_s": 1.5,
                  "tpot_s": 0.02, "e2e_s": 4.54}),
        (CHUNKED, {"ttft_s": 0.2, "ttft_sched_s": 0.2, "queue_s": 0.1, "prefill_s": 0.1,
                   "tpot_s": 0.16 / 6, "e2e_s": 0.36}),
        (ONE_TOKEN, {"ttft_s": 0.1, "ttft_sched_s": 0.1, "queue_s": 0.05, "prefill_s": 0.05,
                     "tpot_s": None, "e2e_s": 0.1}),
        (FAILED, dict.fromkeys(["ttft_s", "ttft_sched_s", "queue_s", "prefill_s", "tpot_s",
                                "e2e_s"])),
    ],
)  # fmt: skip
def test_every_metric_of_one_request_is_exact(one, expected):
    same(one.metrics(), expected)


def test_a_gap_between_tokens_is_a_token_s_share_of_its_chunk():
    """ITL, and ICL: the gap between chunks as it is, which is how long a reader waited."""
    assert CHUNKED.gaps == [(0.1, 4), (0.06, 2)]
    found = pooled([CHUNKED, STEADY])
    assert found["itl_s"] == [0.025] * 4 + [0.03] * 2 + [0.02] * 127
    assert found["icl_s"] == [0.1, 0.06] + [0.02] * 127
    assert ONE_TOKEN.gaps == FAILED.gaps == []


def test_metrics_of_a_block_are_those_worked_out_by_hand():
    found = metrics(LOG, Objective(ttft_s=2.005, tpot_s=0.03, e2e_s=5.0))
    span = 4.55 - 0.01  # first submission to the last token of STEADY
    same(
        found,
        {
            "ttft_s": 2.0,  # of 0.1, 0.2, 2.0 and two that failed
            "ttft_sched_s": 2.01,
            "queue_s": 0.5,
            "prefill_s": 1.5,
            "tpot_s": None,  # of 0.02, 0.027 and two that failed
            "e2e_s": 4.54,
            "itl_s": 0.02,  # 127 of 134 gaps, that of the answer cut off among them
            "icl_max_s": 0.1,
            "user_tokens_per_s": None,
            "user_e2e_tokens_per_s": 1 / 0.1,  # of 128 / 4.54, 8 / 0.36, 1 / 0.1, failed twice
            "tokens_per_s": 137 / span,
            "total_tokens_per_s": 167 / span,
            "requests_per_s": 3 / span,
            "steady_tokens_per_s": None,
            "prefill_tokens_per_s": 30 / 1.5,  # STEADY's 1.5 s hold the prefills of the others
            "goodput_per_s": 2 / span,  # STEADY waited 2010 ms from its schedule
            "good_share": 2 / 5,
            "dispatch_lag_s": 0.0,
            "failed": 2.0,
        },
    )
    why = reasons(found)
    assert why.keys() == {"steady_tokens_per_s", "tpot_s", "user_tokens_per_s"}
    assert why["tpot_s"] == "half or more of the requests failed, so that their median is no time"


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, 3),
        ({"ttft_s": 2.01}, 3),
        ({"ttft_s": 2.005}, 2),  # counted from the schedule, not from the late submission
        ({"tpot_s": 0.021}, 2),  # a single token has no gap that could be too long
        ({"e2e_s": 0.3}, 1),
        ({"ttft_s": 0.05}, 0),
    ],
)
def test_good_is_complete_and_within_every_limit(limits, good):
    objective = Objective(**({"ttft_s": None, "tpot_s": None, "e2e_s": None} | limits))
    assert sum(one.good(objective) for one in LOG) == good


def test_an_answer_in_one_chunk_keeps_no_limit_on_tpot():
    """It has no TPOT, and a limit on what is missing is not kept; one token has no gap at all."""
    lump, limits = request(0, 0, 0, [(100, 8)]), Objective(ttft_s=0.2, tpot_s=0.05, e2e_s=None)
    assert lump.kept(limits) == {"ttft_s": True, "tpot_s": False} and not lump.good(limits)
    assert ONE_TOKEN.kept(limits) == {"ttft_s": True, "tpot_s": True}
    assert SHORT.kept(LOOSE) == {} and not SHORT.good(LOOSE) and lump.good(LOOSE)
    assert FAILED.kept(limits) == {"ttft_s": False, "tpot_s": False}
    early = request(0, 0, 0, [(100, 1), (110, 1)], new_tokens=8)
    assert early.kept(limits) == {"ttft_s": False, "tpot_s": False}, "quick, but not whole"


def test_nothing_answered_is_null_with_a_reason_and_never_zero():
    found = metrics([FAILED], LOOSE)
    nulls = {name for name, value in found.items() if value is None}
    known = {"good_share", "goodput_per_s", "dispatch_lag_s", "failed"}
    assert nulls == found.keys() - known
    assert reasons(found) == dict.fromkeys(nulls, "no request was answered")
    assert found["good_share"] == found["goodput_per_s"] == 0 and found["failed"] == 1


def test_without_stage_marks_the_queue_is_unknown():
    blind = request(0, 0, None, [(10, 1), (20, 1)])
    found = metrics([blind], LOOSE)
    assert found["queue_s"] is None and found["prefill_s"] is None and found["ttft_s"] == 0.01
    assert "tells when work on it began" in reasons(found)["queue_s"]


def test_steady_throughput_counts_the_window_in_which_all_rows_decode():
    """Two rows, 10 ms a token; the window is 20 .. 40 ms, its ends within chunks of both."""
    early = request(0, 0, 0, [(10, 1), (20, 1), (30, 1), (40, 1)])
    late = request(0, 0, 0, [(20, 1), (35, 3), (50, 3)])
    found = metrics([early, late], LOOSE)
    assert found["steady_tokens_per_s"] == pytest.approx((2 + 3 + 1) / 0.020)
    assert metrics([early, late], LOOSE, 3)["steady_tokens_per_s"] is None
    either = metrics([early, late], LOOSE, 1)["steady_tokens_per_s"]
    assert either == pytest.approx((3 + 6) / 0.040), "10 .. 50 ms: all but the first tokens"


def test_steady_throughput_of_a_server_is_that_of_its_full_batches():
    """Two batches of two, 30 ms of decoding each; nobody is past the first token in between."""
    rows = [request(0, 0, at, [(at + 10, 1), (at + 40, 3)]) for at in (0, 0, 50, 50)]
    found = metrics(rows, LOOSE, 2)
    assert found["steady_tokens_per_s"] == pytest.approx(4 * 3 / 0.060)
    assert found["prefill_tokens_per_s"] == pytest.approx(40 / 0.020), "rows share their prefill"
    assert found["user_tokens_per_s"] == pytest.approx(1 / 0.010)


def test_time_does_not_run_backwards():
    with pytest.raises(AssertionError):
        request(0, 10, 5, [(20, 1)])
    with pytest.raises(AssertionError):
        request(0, 0, 5, [(20, 1), (19, 1)])


stamps = st.lists(st.integers(0, 10**10), min_size=5, max_size=9).map(sorted)


@given(stamps, st.lists(st.integers(0, 5), min_size=9, max_size=9))
def test_identities_hold_for_whatever_came(times, counts):
    sched, submit, start, *chunks = times
    one = Request(
        sched_ns=sched, submit_ns=submit, start_ns=start, end_ns=chunks[-1], prompt_tokens=1,
        chunks=tuple(zip(chunks, counts, strict=False)), new_tokens=sum(counts[: len(chunks)]),
    )  # fmt: skip
    found = one.metrics()
    if one.full:
        head = one.full[0][1]
        assert found["ttft_s"] == pytest.approx(found["queue_s"] + found["prefill_s"], abs=1e-9)
        rest = (found["tpot_s"] or 0.0) * (one.tokens - head)
        assert found["e2e_s"] == pytest.approx(found["ttft_s"] + rest, abs=1e-9)
        assert sum(pooled([one])["itl_s"]) == pytest.approx(rest, abs=1e-9), "a gap a token"
        assert sum(pooled([one])["icl_s"]) == pytest.approx(rest, abs=1e-9)


# What other tools make of one request: the formulas in their sources, on the same stamps (s).


def seconds(one):
    first, last = one.full[0][0], one.full[-1][0]
    return one.submit_ns / 1e9, first / 1e9, last / 1e9, one.tokens


def vllm(one):
    """benchmarks/serve.py: tpot = (latency - ttft) / (output_len - 1); itl = raw chunk gaps."""
    submit, first, last, n = seconds(one)
    at = [stamp / 1e9 for stamp, _ in one.full]
    return {
        "ttft": first - submit,
        "tpot": ((last - submit) - (first - submit)) / (n - 1) if n > 1 else None,
        "itl": np.diff(at).tolist(),
    }


def guidellm(one):
    """schemas/request_stats.py: "tpot" counts from the request's start, "itl" leaves out one."""
    submit, first, last, n = seconds(one)
    return {
        "ttft": first - submit,
        "tpot": (last - submit) / n,
        "itl": (last - first) / (n - 1) if n > 1 else None,
    }


def aiperf(one):
    """Metrics "inter token latency" (a mean of the request) and "inter chunk latency"."""
    submit, first, last, n = seconds(one)
    at = [stamp / 1e9 for stamp, _ in one.full]
    itl = ((last - submit) - (first - submit)) / (n - 1) if n > 1 else None
    return {"ttft": first - submit, "itl": itl, "icl": np.diff(at).tolist()}


def mlperf(one):
    """LoadGen, server: latencies count from the scheduled time; TPOT leaves out one token."""
    _, first, last, n = seconds(one)
    tpot = (last - first) / (n - 1) if n > 1 else None
    return {"ttft": first - one.sched_ns / 1e9, "tpot": tpot}


def test_the_same_log_in_the_words_of_other_tools():
    ours = STEADY.metrics()
    assert guidellm(STEADY)["tpot"] == pytest.approx(4.54 / 128)
    assert guidellm(STEADY)["tpot"] / ours["tpot_s"] == pytest.approx(1.7734, abs=1e-4), "the trap"
    same = [vllm(STEADY)["tpot"], guidellm(STEADY)["itl"], aiperf(STEADY)["itl"]]
    assert [*same, mlperf(STEADY)["tpot"]] == pytest.approx([ours["tpot_s"]] * 4)
    assert np.mean(vllm(STEADY)["itl"]) == pytest.approx(ours["tpot_s"])
    clients = [vllm(STEADY)["ttft"], guidellm(STEADY)["ttft"], aiperf(STEADY)["ttft"]]
    assert clients == pytest.approx([ours["ttft_s"]] * 3)
    assert mlperf(STEADY)["ttft"] == pytest.approx(ours["ttft_sched_s"])


def test_chunks_of_several_tokens_pull_the_tools_apart():
    ours = CHUNKED.metrics()["tpot_s"]
    assert vllm(CHUNKED)["tpot"] / ours == pytest.approx(6 / 7), "its first chunk held two tokens"
    assert aiperf(CHUNKED)["icl"] == vllm(CHUNKED)["itl"] == pytest.approx([0.1, 0.06])
    assert guidellm(CHUNKED)["tpot"] == pytest.approx(0.36 / 8)
    for tool in (vllm, mlperf):
        assert tool(ONE_TOKEN)["tpot"] is None
    assert guidellm(ONE_TOKEN)["tpot"] == pytest.approx(0.1), "all of it is the first token"


def events(requests):
    return [event for r in requests for event in ((r.submit_ns, 1), (r.end_ns, -1))]


def test_littles_law_notices_a_request_that_went_missing():
    log = [request(n, n, n, [(n + 10, 1), (n + 60, 1)]) for n in range(0, 1000, 20)]
    assert little(log, events(log)) < 1e-12 and invalid(log, events(log)) == []
    assert little(log[:-1], events(log)) == pytest.approx(1 / 50)
    (reason,) = invalid(log[:-2], events(log))
    assert reason.startswith("little: ") and "4.0%" in reason


@pytest.mark.parametrize(("late_ms", "flagged"), [(0.9, False), (1.1, True)])
def test_a_sender_that_is_late_by_more_than_a_hundredth_of_ttft_is_the_bottleneck(late_ms, flagged):
    log = [request(0, late_ms, late_ms, [(late_ms + 100, 1)]) for _ in range(5)]
    found = invalid(log, events(log))
    assert [reason.partition(":")[0] for reason in found] == ["client_bound"] * flagged
