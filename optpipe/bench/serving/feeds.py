"""Where a server finds its requests: an open loop that sends them at deadlines, or clients."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from optpipe.bench.backend import Ids
from optpipe.bench.timed.clock import Clock

PR_SET_TIMERSLACK = 29


class Ask(NamedTuple):
    """A request before it is sent: nanoseconds after the begin, prompt, length of the answer."""

    at_ns: int
    ids_S: Ids
    new_tokens: int


class Arrived(NamedTuple):
    """A request in the queue."""

    ask: Ask
    sched_ns: int
    submit_ns: int


class Feed(Protocol):
    """Where the server finds its requests."""

    def take(self, most: int, wait: bool = True) -> Sequence[Arrived]:
        """What waits, oldest first. Blocks until there is something, empty: the end; without
        ``wait``, empty only means that nothing is there yet.
        """

    def finished(self, count: int) -> None:
        """So many requests are answered."""

    def close(self) -> Sequence[Arrived]:
        """Those that were sent but never taken."""


class Open:
    """Sends each request at its own deadline, from a thread that sleeps in between."""

    def __init__(self, asks: Sequence[Ask], start_ns: int, until_ns: int) -> None:
        """No request is taken after ``until_ns``."""
        self._asks, self._start_ns, self._until_ns = asks, start_ns, until_ns
        self._waiting: deque[Arrived] = deque()
        self._left = len(asks)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._submit, daemon=True)
        self._thread.start()

    def take(self, most: int, wait: bool = True) -> Sequence[Arrived]:
        with self._changed:
            self._changed.wait_for(lambda: not wait or self._waiting or not self._left)
            if time.perf_counter_ns() > self._until_ns:
                return ()
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def finished(self, count: int) -> None:
        pass  # an open loop does not care

    def close(self) -> Sequence[Arrived]:
        self._thread.join()
        return [*self._waiting]

    def _submit(self) -> None:
        if sys.platform == "linux":  # else every sleep ends 50 us late
            ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        for ask in self._asks:
            due_ns = self._start_ns + ask.at_ns
            while (left_ns := due_ns - time.perf_counter_ns()) > 0:
                time.sleep(left_ns / 1e9)
            self._send(ask, due_ns)

    def _send(self, ask: Ask, due_ns: int) -> None:
        with self._changed:
            self._waiting.append(Arrived(ask, due_ns, time.perf_counter_ns()))
            self._left -= 1
            self._changed.notify()


class Closed:
    """So many clients, each of which sends its next request when it has its answer."""

    def __init__(self, asks: Sequence[Ask], clients: int, until_ns: int, clock: Clock) -> None:
        self._asks, self._until_ns, self._clock = deque(asks), until_ns, clock
        self._waiting: deque[Arrived] = deque()
        self.finished(clients)

    def take(self, most: int, wait: bool = True) -> Sequence[Arrived]:
        if self._clock() > self._until_ns:
            return ()
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def finished(self, count: int) -> None:
        now = self._clock()
        for _ in range(min(count, len(self._asks))):
            self._waiting.append(Arrived(self._asks.popleft(), now, now))

    def close(self) -> Sequence[Arrived]:
        return [*self._waiting]
