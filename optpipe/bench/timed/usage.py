"""What a piece of work took of the machine besides time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from optpipe.bench.backend import Backend

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of a worker, while it did what it was asked for."""

    cpu_s: float
    """CPU time of all threads of the worker."""
    peak_bytes: int | None
    """None where the system does not keep a peak that can be reset."""
    device_s: tuple[float, ...] | None = None
    """What the device worked in each step, between events of its own; None on a CPU."""


def used(backend: Backend, work: Callable[[], T]) -> tuple[T, Usage]:
    """The result of ``work``, and what it took."""
    has_peak = True
    try:
        backend.reset_peak()
    except OSError:
        has_peak = False
    cpu_ns = backend.cpu_ns()
    result = work()
    return result, Usage(
        cpu_s=(backend.cpu_ns() - cpu_ns) / 1e9,
        peak_bytes=backend.peak_bytes() if has_peak else None,
        device_s=backend.device_s(),
    )
