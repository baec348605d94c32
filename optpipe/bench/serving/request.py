"""One served request, and the metrics of many: definitions that can be checked by hand.

    scheduled   submitted      started         first token          last token
    sched ------- submit ------- start ----------- first ---------------- last
       dispatch lag |--- queue ---|--- prefill ----|                       |
                    |------------ TTFT ------------|--- TPOT a token ------|
    |--------------- TTFT from schedule -----------|                       |
                    |---------------- end to end --------------------------|

All stamps are nanoseconds of one clock. TPOT leaves out the tokens of the first chunk; tools that
count them in (as the per-token latency of the whole request) report up to twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from optpipe.bench.scenario import Objective
from optpipe.bench.timed import clock

LATENCIES = (*clock.LATENCIES, "ttft_sched_s")
"""Of one request; of many, the median of those that have it."""
RATES = ("tokens_per_s", "total_tokens_per_s", "requests_per_s", "steady_tokens_per_s",
         "prefill_tokens_per_s", "goodput_per_s")  # fmt: skip
LIMITS = ("ttft_s", "tpot_s", "e2e_s")
"""What an objective may limit; the TTFT counts from the scheduled arrival."""
CLIENT_SHARE = 0.01
"""Most of the median TTFT that the sender may be late."""
LITTLE = 0.02
"""Largest accepted error of Little's law."""
NONE_ANSWERED = "no request was answered"
HALF_FAILED = "half or more of the requests failed, so that their median is no time"
Values = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request from its plan to its end."""

    sched_ns: int
    submit_ns: int
    start_ns: int | None
    """First work on it; None: it never started, or the server does not tell."""
    chunks: tuple[tuple[int, int], ...]
    """(stamp, tokens) as they reached the host; a chunk without tokens is no first token."""
    end_ns: int
    """The last token, or when it failed."""
    prompt_tokens: int
    new_tokens: int
    """How many were asked for."""
    error: str | None = None

    def __post_init__(self) -> None:
        """Time does not run backwards."""
        start = [] if self.start_ns is None else [self.start_ns]
        stamps = [self.sched_ns, self.submit_ns, *start, *(at for at, _ in self.chunks)]
        assert all(a <= b for a, b in pairwise([*stamps, self.end_ns])), self

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def full(self) -> list[tuple[int, int]]:
        """The chunks that hold tokens."""
        return [chunk for chunk in self.chunks if chunk[1]]

    @property
    def gaps(self) -> list[tuple[float, int]]:
        """(seconds, tokens) of each chunk after the first, since the one before it."""
        full = self.full
        return [((at - before) / 1e9, count) for (before, _), (at, count) in pairwise(full)]

    def metrics(self) -> Values:
        """Seconds; None where undefined: nothing came, one chunk has no gap, no stage marks."""
        if self.error is not None or not self.full:
            return dict.fromkeys(LATENCIES)
        (first, head), last = self.full[0], self.full[-1][0]
        start, rest = self.start_ns, self.tokens - head
        found: Values = {
            "ttft_s": (first - self.submit_ns) / 1e9,
            "ttft_sched_s": (first - self.sched_ns) / 1e9,
            "queue_s": None if start is None else (start - self.submit_ns) / 1e9,
            "prefill_s": None if start is None else (first - start) / 1e9,
            "tpot_s": (last - first) / 1e9 / rest if rest else None,
            "e2e_s": (last - self.submit_ns) / 1e9,
        }
        return found

    def kept(self, objective: Objective) -> dict[str, bool]:
        """Of every limit there is, whether it was kept: not by an answer that is not whole.

        Nor by one that lacks the time, as the TPOT of an answer in one chunk; but where one token
        was asked for there is no gap that could be too long.
        """
        found = self.metrics()
        found["ttft_s"] = found["ttft_sched_s"]
        if self.new_tokens == 1:
            found["tpot_s"] = 0.0
        limits = ((name, getattr(objective, name)) for name in LIMITS)
        return {
            name: self.whole and (value := found[name]) is not None and value <= limit
            for name, limit in limits
            if limit is not None
        }

    @property
    def whole(self) -> bool:
        """Whether it was answered with as many tokens as were asked for."""
        return self.error is None and self.tokens == self.new_tokens

    def good(self, objective: Objective) -> bool:
        """Whole, and within every limit."""
        return self.whole and all(self.kept(objective).values())


def metrics(
    requests: Sequence[Request], objective: Objective, together: int | None = None
) -> Values:
    """Medians of the latencies, rates over the whole block, and how well it was sent.

    A request that failed is later than any that was answered, and not good. Rates count from the
    first submission to the end of the last request. ``dispatch_lag_s`` is the median. ``together``:
    how many are served at once at most; None: all of them.
    """
    values = pooled(requests)
    found: Values = {name: _median(values[name]) for name in (*LATENCIES, "itl_s")}
    found["icl_max_s"] = max(values["icl_s"], default=None)
    found["user_tokens_per_s"] = _inverse(found["tpot_s"])
    found["user_e2e_tokens_per_s"] = _inverse(_median(_e2e_per_token(requests)))
    done = [r for r in requests if r.error is None and r.full]
    found |= _rates(done, requests, objective)
    found["steady_tokens_per_s"] = _steady(done, together or len(done))
    found["good_share"] = sum(r.good(objective) for r in requests) / len(requests)
    found["dispatch_lag_s"] = _median([(r.submit_ns - r.sched_ns) / 1e9 for r in requests])
    found["failed"] = float(len(requests) - len(done))
    return found


def pooled(requests: Sequence[Request]) -> dict[str, list[float]]:
    """Every value there is of each latency, for percentiles; infinite where the request failed.

    Of ``itl_s`` one for each token that came, its share of its chunk's gap, and of ``icl_s`` one
    for each chunk, the gap itself; those of answers that were cut off included.
    """
    each = [request.metrics() for request in requests]
    failed = [math.inf for one in each if one["ttft_s"] is None]
    known = {name: [v for one in each if (v := one[name]) is not None] for name in LATENCIES}
    found = {name: of + failed if of else [] for name, of in known.items()}
    gaps = [gap for request in requests for gap in request.gaps]
    found["icl_s"] = [gap for gap, _ in gaps]
    return {**found, "itl_s": [gap / count for gap, count in gaps for _ in range(count)]}


def reasons(found: Values) -> dict[str, str]:
    """Why a metric is null."""
    why = {
        "tpot_s": "no request has a token after its first chunk: there is no gap to time",
        "steady_tokens_per_s": "at no time did as many requests decode as are served at once",
        "queue_s": "no request tells when work on it began",
    }
    why |= dict.fromkeys(("itl_s", "icl_max_s", "user_tokens_per_s"), why["tpot_s"])
    why |= dict.fromkeys(("prefill_s", "prefill_tokens_per_s"), why["queue_s"])
    none = NONE_ANSWERED
    if found["requests_per_s"] is not None and found["failed"]:
        none = HALF_FAILED
        why |= dict.fromkeys(LATENCIES, HALF_FAILED)
    lost = found["requests_per_s"] is None
    return {k: none if lost else why.get(k, none) for k, v in found.items() if v is None}


def invalid(requests: Sequence[Request], events: Sequence[tuple[int, int]]) -> list[str]:
    """Why the numbers of a block mean nothing, if so: ``client_bound``, ``little``.

    ``events``: (stamp, +1 or -1) as requests came into the system and left it, counted by the
    server itself, so that a request which is missing among ``requests`` is noticed.
    """
    ttft_s = _median(pooled(requests)["ttft_s"])
    lag_s = _median([(r.submit_ns - r.sched_ns) / 1e9 for r in requests])
    found = []
    if ttft_s is not None and lag_s is not None and lag_s > CLIENT_SHARE * ttft_s:
        found.append(
            f"client_bound: requests were sent {lag_s * 1e3:.3g} ms late (median), more than "
            f"{CLIENT_SHARE:.0%} of the median TTFT of {ttft_s * 1e3:.3g} ms"
        )
    if (error := little(requests, events)) > LITTLE:
        found.append(
            f"little: the requests' times in the system and its load differ by {error:.1%}"
        )
    return found


def little(requests: Sequence[Request], events: Sequence[tuple[int, int]]) -> float:
    """Relative error of Little's law: sum of times in the system against the integral of its load.

    Both divided by the duration: |sum E2E / T - mean concurrency| / mean concurrency.
    """
    ordered = sorted(events)
    stamps = np.array([at for at, _ in ordered], dtype=np.int64)
    load = np.cumsum([change for _, change in ordered])
    area = float((load[:-1] * np.diff(stamps)).sum())
    total = float(sum(r.end_ns - r.submit_ns for r in requests))
    return abs(total - area) / area if area else float(total > 0)


def _rates(
    done: Sequence[Request], requests: Sequence[Request], objective: Objective
) -> dict[str, float | None]:
    span_s = seconds(requests)
    if not done:  # none of them was good; that is known, and so is how long it took
        return {**dict.fromkeys(RATES), "goodput_per_s": 0.0 if span_s else None}
    new, given = sum(r.tokens for r in done), sum(r.prompt_tokens for r in done)
    return {
        "tokens_per_s": new / span_s,
        "total_tokens_per_s": (new + given) / span_s,
        "requests_per_s": len(done) / span_s,
        "prefill_tokens_per_s": _prefill(done),
        "goodput_per_s": sum(r.good(objective) for r in requests) / span_s,
    }


def seconds(requests: Sequence[Request]) -> float:
    """From the first submission to the end of the last request, be it answered or failed."""
    start = min(r.submit_ns for r in requests)
    return (max(r.end_ns for r in requests) - start) / 1e9


def _prefill(done: Sequence[Request]) -> float | None:
    """Prompt tokens a second of the time in which some prompt was read; None: nobody tells."""
    told = [(r.start_ns, r.full[0][0], r.prompt_tokens) for r in done if r.start_ns is not None]
    spans = busy([(begin, end) for begin, end, _ in told], 1)
    taken_ns = sum(end - begin for begin, end in spans)
    return sum(given for *_, given in told) / (taken_ns / 1e9) if taken_ns else None


def _steady(done: Sequence[Request], together: int) -> float | None:
    """Output tokens a second while so many requests are between their first and last token.

    Those of a chunk are counted evenly since the chunk before it.
    """
    spans = busy([(r.full[0][0], r.full[-1][0]) for r in done], together)
    if not spans:
        return None
    ends, count = np.array(spans, dtype=np.int64), 0.0
    for request in done:
        stamps, counts = zip(*request.full, strict=True)
        count += float(np.diff(np.interp(ends, stamps, np.cumsum(counts))).sum())
    return count / (float(np.diff(ends).sum()) / 1e9)


def busy(spans: Sequence[tuple[int, int]], together: int) -> list[tuple[int, int]]:
    """When at least so many of these spans overlap, as spans that do not.

    >>> busy([(0, 4), (1, 3), (2, 6)], 2)
    [(1, 2), (2, 3), (3, 4)]
    """
    events = sorted(event for begin, end in spans for event in ((begin, 1), (end, -1)))
    level = accumulate(change for _, change in events)
    return [
        (before, after)
        for ((before, _), (after, _)), count in zip(pairwise(events), level, strict=False)
        if count >= together and after > before
    ]


def _e2e_per_token(requests: Sequence[Request]) -> list[float]:
    """Seconds of the whole request for each token of it; infinite where it failed."""
    each = [(request.metrics()["e2e_s"], request.tokens) for request in requests]
    return [math.inf if e2e is None else e2e / tokens for e2e, tokens in each]


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _median(values: Sequence[float]) -> float | None:
    """None where there is none, or where it is that of a request that failed."""
    found = float(np.median(values)) if len(values) else math.inf
    return found if math.isfinite(found) else None
