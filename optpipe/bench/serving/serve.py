"""A server around a backend: a queue, a batch, requests that come unasked.

The scheduler is the simplest honest one: it takes what waits, at most ``max_batch`` requests in
order of arrival, runs them to the end of the longest answer, and looks again. An engine that
schedules requests itself gets each as it comes, as long as there are fewer than ``max_batch``; an
endpoint, too, on a connection for each. Requests of an open loop come at absolute deadlines
whatever the server does, so that its delays are not left out (coordinated omission).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from optpipe.bench.backend import Backend
from optpipe.bench.scenario import Objective, hash_ids
from optpipe.bench.serving import request
from optpipe.bench.serving.feeds import Arrived, Ask, Closed, Feed, Open
from optpipe.bench.serving.live import UNANSWERED, Answers, Live, request_of
from optpipe.bench.serving.request import Request, Values
from optpipe.bench.serving.streams import Streams, concurrent
from optpipe.bench.timed.clock import Clock, Trace, greedy
from optpipe.bench.timed.usage import Usage, used

LEAD_NS = 5_000_000
"""From the command to time 0 of the arrivals."""


@runtime_checkable
class Scheduler(Protocol):
    """A backend that batches requests as they come and go."""

    def submit(self, ids: Sequence[int], new_tokens: int) -> str:
        """Start a request; its name."""

    def step(self) -> Mapping[str, Sequence[int]]:
        """Work until some requests have tokens; those, by name."""


def serve(
    backend: Backend | Scheduler | Streams, feed: Feed, max_batch: int, until_ns: int, clock: Clock
) -> Answers:
    """Serve until no more comes; the queue is empty then, or the time over."""
    found = Answers()
    if isinstance(backend, Scheduler):
        _continuous(backend, feed, max_batch, until_ns, clock, found)
    elif isinstance(backend, Streams):
        concurrent(backend, feed, max_batch, until_ns, clock, found)
    else:
        while batch := feed.take(max_batch):
            _batch(backend, batch, until_ns, clock, found)
            feed.finished(len(batch))
    left, now = feed.close(), clock()
    for arrived in left:
        end_ns = max(now, arrived.submit_ns)
        found.requests.append(request_of(arrived, None, (), end_ns, UNANSWERED))
        found.events.extend([(arrived.submit_ns, 1), (end_ns, -1)])
    return found


def _continuous(
    engine: Scheduler, feed: Feed, max_batch: int, until_ns: int, clock: Clock, found: Answers
) -> None:
    """Feed the engine as requests come; whatever it has not answered in time has failed."""
    live: dict[str, Live] = {}
    while clock() <= until_ns:
        room = max_batch - len(live)
        batch = feed.take(room, wait=not live) if room else ()
        if not batch and not live:
            break
        for arrived in batch:
            found.events.append((arrived.submit_ns, 1))
            name = engine.submit(arrived.ask.ids_S.tolist(), arrived.ask.new_tokens)
            live[name] = Live(arrived, clock())
        for name, tokens in engine.step().items():
            if live[name].grow(tokens, clock()):
                live.pop(name).leave(found)
                feed.finished(1)
    for rest in live.values():
        rest.failed = clock(), UNANSWERED
        rest.leave(found)


def _batch(
    backend: Backend, batch: Sequence[Arrived], until_ns: int, clock: Clock, found: Answers
) -> None:
    """Run one static batch; rows that are done stay in it until the longest is."""
    found.events.extend((arrived.submit_ns, 1) for arrived in batch)
    lengths_B = np.array([len(arrived.ask.ids_S) for arrived in batch])
    ids_BS = np.zeros((len(batch), lengths_B.max()), np.int64)
    for row, arrived in zip(ids_BS, batch, strict=True):
        row[: len(arrived.ask.ids_S)] = arrived.ask.ids_S
    steps = max(arrived.ask.new_tokens for arrived in batch)
    trace = greedy(backend, (ids_BS, lengths_B), steps, until_ns - clock(), clock)
    for row, arrived in zip(trace.tokens_NB.T, batch, strict=True):
        own, start_ns = trace.token_ns[: arrived.ask.new_tokens], trace.start_ns
        late = None if len(own) == arrived.ask.new_tokens else UNANSWERED
        chunks = [(at, 1) for at in own]
        found.requests.append(request_of(arrived, start_ns, chunks, own[-1], late))
        found.events.append((own[-1], -1))
        found.tokens.extend(row[: len(own)].tolist())


@dataclass(frozen=True, kw_only=True)
class Served(Usage):
    """The answer to :class:`Serve`; has all that the answer to ``Iterate`` has."""

    requests: tuple[Request, ...]
    events: tuple[tuple[int, int], ...]
    """(stamp, +1 or -1) as requests came and left; see :func:`request.little`."""
    tokens: tuple[int, ...]
    objective: Objective
    together: int | None = None
    """How many could be served at once; None: all of them."""

    @property
    def trace(self) -> Trace:
        """The block as one iteration; a row a token, not a step."""
        return Trace(
            start_ns=min((r.start_ns for r in self.requests if r.start_ns), default=0),
            token_ns=tuple(sorted(at for r in self.requests for at, _ in r.chunks)),
            tokens_NB=np.array(self.tokens, dtype=np.int64)[:, None],
        )

    @property
    def metrics(self) -> Values:
        return request.metrics(self.requests, self.objective, self.together)

    @property
    def invalid(self) -> list[str]:
        """Why its numbers mean nothing, if so."""
        return request.invalid(self.requests, self.events)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """A command to a worker: serve one block of requests; the queue is drained when it answers."""

    asks: tuple[Ask, ...]
    max_batch: int
    limit_s: float
    """After the last arrival; what is not answered then has failed."""
    objective: Objective
    clients: int | None = None
    """Of a closed loop; None: an open one."""

    @property
    def ids_hash(self) -> str:
        """Of all prompts, in order."""
        return hash_ids(np.concatenate([ask.ids_S for ask in self.asks]))

    @property
    def longest_s(self) -> float:
        """Longest time to the answer, but for a prefill that runs at the limit."""
        return self.asks[-1].at_ns / 1e9 + self.limit_s

    def __call__(self, backend: Backend) -> Served:
        found, usage = used(backend, lambda: self._serve(backend, time.perf_counter_ns))
        return Served(
            requests=tuple(found.requests),
            events=tuple(found.events),
            tokens=tuple(found.tokens),
            objective=self.objective,
            together=min(self.max_batch, self.clients or self.max_batch, len(self.asks)),
            **vars(usage),
        )

    def _serve(self, backend: Backend, clock: Clock) -> Answers:
        start_ns = clock() + LEAD_NS
        until_ns = start_ns + int(self.longest_s * 1e9)
        feed: Feed = (
            Open(self.asks, start_ns, until_ns)
            if self.clients is None
            else Closed(self.asks, self.clients, until_ns, clock)
        )
        return serve(backend, feed, self.max_batch, until_ns, clock)
