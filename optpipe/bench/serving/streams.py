"""Requests to a server that queues and batches them itself, each on a connection of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, runtime_checkable

from optpipe.bench.serving.feeds import Feed
from optpipe.bench.serving.live import UNANSWERED, Answers, Live
from optpipe.bench.timed.clock import Clock
from optpipe.errors import one_line

LEAST_S = 1e-3
"""What an endpoint gets at least to answer, as 0 would mean not to wait for the network at all."""


@runtime_checkable
class Streams(Protocol):
    """A backend that takes requests from several threads at once."""

    def stream(
        self, ids: Sequence[int], new_tokens: int, limit_s: float
    ) -> Iterator[Sequence[int]]:
        """The tokens of an answer as they come. Raises OSError, TimeoutError after ``limit_s``."""


def concurrent(
    server: Streams, feed: Feed, max_batch: int, until_ns: int, clock: Clock, found: Answers
) -> None:
    """Send requests as they come; one that breaks has failed, with the reason, and no other."""
    live: set[Future[Live]] = set()

    def leave(done: set[Future[Live]]) -> None:
        for future in done:
            future.result().leave(found)
        feed.finished(len(done))

    with ThreadPoolExecutor(max_batch) as pool:
        while clock() <= until_ns:
            batch = feed.take(max_batch - len(live)) if len(live) < max_batch else ()
            for arrived in batch:
                found.events.append((arrived.submit_ns, 1))
                live.add(pool.submit(_answer, server, Live(arrived, None), until_ns, clock))
            if not batch and not live:
                break
            # clients of a closed loop and requests beyond max_batch wait for an answer
            done, live = wait(live, None if not batch else 0, FIRST_COMPLETED)
            leave(done)
    leave(live)


def _answer(server: Streams, live: Live, until_ns: int, clock: Clock) -> Live:
    """Wait for all tokens of one request."""
    ask = live.arrived.ask
    try:
        limit_s = max((until_ns - clock()) / 1e9, LEAST_S)
        for tokens in server.stream(ask.ids_S.tolist(), ask.new_tokens, limit_s):
            live.grow(tokens, clock())
    except TimeoutError:
        live.failed = clock(), UNANSWERED
    except OSError as error:
        live.failed = clock(), one_line(error)
    return live
