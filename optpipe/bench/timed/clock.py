"""When the tokens of one iteration came, and the metrics that follow from it.

    submitted        started          first token         last token
    t_submit --queue-- t_start --prefill-- t_first --decode-- t_last
        |----------- TTFT -----------------|                    |
        |----------------------- end to end --------------------|

All stamps are nanoseconds of ``time.perf_counter_ns``, which on one machine is one clock for all
processes. A token counts when its id, argmax included, is on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import le

import numpy as np

from optpipe.bench.backend import Backend, Ids

Clock = Callable[[], int]

LATENCIES = ("ttft_s", "queue_s", "prefill_s", "tpot_s", "e2e_s")
"""Metrics of which less is better."""
METRICS = (*LATENCIES, "tokens_per_s")
COMPARED = (*(metric for metric in METRICS if metric != "queue_s"), "peak_bytes")
"""What arms are compared in, and so what a verdict may be about."""
NO_STAMPS = "its time stamps are missing or run backwards"
ONE_TOKEN = "one output token: there is no gap between tokens to time"


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one iteration of a worker left behind; stamps in nanoseconds."""

    start_ns: int
    """First work on this request."""
    token_ns: tuple[int, ...]
    """When each new token of the batch was on the host."""
    tokens_NB: Ids
    """The greedy tokens, one row a step."""


def generate(
    backend: Backend, ids_BS: Ids, new_tokens: int, limit_ns: int | None, clock: Clock
) -> Trace:
    """`greedy` of prompts that are all of one length."""
    lengths_B = np.full(len(ids_BS), ids_BS.shape[1], dtype=np.int64)
    return greedy(backend, (ids_BS, lengths_B), new_tokens, limit_ns, clock)


def greedy(
    backend: Backend,
    prompts: tuple[Ids, Ids],
    new_tokens: int,
    limit_ns: int | None,
    clock: Clock,
) -> Trace:
    """Greedy decoding; end-of-text does not stop it, so that all arms do the same work.

    ``prompts``: token ids (B, S) and how many of each row are real. It stops early, between two
    tokens, once it has taken ``limit_ns``.
    """
    start = clock()
    tokens = [backend.first_tokens(*prompts)]
    stamps = [clock()]
    while len(stamps) < new_tokens and (limit_ns is None or stamps[-1] - start <= limit_ns):
        tokens.append(backend.next_tokens(tokens[-1]))
        stamps.append(clock())
    return Trace(start_ns=start, token_ns=tuple(stamps), tokens_NB=np.stack(tokens))


def metrics(
    submit_ns: int, start_ns: int, token_ns: tuple[int, ...], batch: int
) -> dict[str, float | None]:
    """The latencies of one iteration in seconds and its throughput in output tokens a second.

    All None where there is no token, or a stamp is before the one ahead of it: such stamps are no
    measurement (and `checks` makes the arm INVALID).
    """
    if not in_order(submit_ns, start_ns, token_ns):
        return dict.fromkeys(METRICS)
    first, last, count = token_ns[0], token_ns[-1], len(token_ns)
    return {
        "ttft_s": (first - submit_ns) / 1e9,
        "queue_s": (start_ns - submit_ns) / 1e9,
        "prefill_s": (first - start_ns) / 1e9,
        "tpot_s": (last - first) / 1e9 / (count - 1) if count > 1 else None,
        "e2e_s": (last - submit_ns) / 1e9,
        "tokens_per_s": batch * count / ((last - submit_ns) / 1e9),
    }


def in_order(submit_ns: int, start_ns: int, token_ns: tuple[int, ...]) -> bool:
    """Whether there is a token, and time went forwards up to the last one."""
    stamps = (submit_ns, start_ns, *token_ns)
    return bool(token_ns) and stamps[-1] > submit_ns and all(map(le, stamps, stamps[1:]))
