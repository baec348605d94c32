"""Requests while a server works on them, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from optpipe.bench.serving.feeds import Arrived
from optpipe.bench.serving.request import Request

UNANSWERED = "not answered when the time was over"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a server did."""

    requests: list[Request] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    """(stamp, +1 or -1) as requests came and left; see :func:`request.little`."""
    tokens: list[int] = field(default_factory=list)
    """Of all answers, one after the other."""


@dataclass
class Live:
    """A request that an engine works on."""

    arrived: Arrived
    start_ns: int | None
    """None: the engine does not tell."""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    failed: tuple[int, str] | None = None
    """When and why, if it has."""

    def grow(self, tokens: Sequence[int], now_ns: int) -> bool:
        """Whether its answer is whole with these tokens."""
        self.tokens.extend(tokens)
        self.chunks.append((now_ns, len(tokens)))
        return len(self.tokens) >= self.arrived.ask.new_tokens

    def leave(self, found: Answers) -> None:
        begin_ns = self.arrived.submit_ns if self.start_ns is None else self.start_ns
        end_ns = self.chunks[-1][0] if self.chunks else begin_ns
        failed_ns, error = self.failed or (end_ns, None)
        end_ns = max(end_ns, failed_ns)
        found.requests.append(request_of(self.arrived, self.start_ns, self.chunks, end_ns, error))
        found.events.append((end_ns, -1))
        found.tokens.extend(self.tokens)


def request_of(
    arrived: Arrived,
    start_ns: int | None,
    chunks: Sequence[tuple[int, int]],
    end_ns: int,
    error: str | None = None,
) -> Request:
    """Answered, or failed with this error; an answer of another length has failed, too."""
    ask, count = arrived.ask, sum(count for _, count in chunks)
    wrong = f"{count} tokens where {ask.new_tokens} were asked for"
    return Request(
        sched_ns=arrived.sched_ns,
        submit_ns=arrived.submit_ns,
        start_ns=start_ns,
        chunks=tuple(chunks),
        end_ns=end_ns,
        prompt_tokens=len(ask.ids_S),
        new_tokens=ask.new_tokens,
        error=error or (None if count == ask.new_tokens else wrong),
    )
