"""The host's share of a step: wall time in which the device did not work.

Events around a step in the timed runs leave out what lies between steps. Launches inside a step
that the device waits for are between its events too, so that they look like work; a step that was
queued whole before the device began (`profile.busy_s`) has none, and tells how long the work is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optpipe.bench.evidence.statistics import median
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import collect

Key = tuple[str, Cell]
Times = Mapping[Key, Mapping[str, float]]
"""(arm, cell) -> seconds of a 'prefill' and of a 'decode' step."""
NO_EVENTS = "this runtime has no events of the device's own; on a CPU there are none"
SERVED = "a server also waits for requests"


def entry(samples: Iterable[Sample], why: str) -> tuple[dict[str, Any], dict[str, str]]:
    """``device_s`` of one iteration and of its prefill alone, and ``host_gap_s``; medians."""
    given = [*samples]
    alone = [s for s in given if s.served is None]
    device = [sum(s.device_s) for s in given if s.device_s is not None]
    gaps = [e2e - sum(s.device_s) for s in alone if s.device_s and (e2e := s.metrics["e2e_s"])]
    prefills = [s.device_s[0] for s in alone if s.device_s]
    values = {
        "device_s": median(device) if device else None,
        "prefill_device_s": median(prefills) if prefills else None,
        "host_gap_s": max(median(gaps), 0.0) if gaps else None,
    }
    is_served = any(s.served is not None for s in given)
    reasons = {
        "device_s": why or NO_EVENTS,
        "prefill_device_s": why or (SERVED if is_served else NO_EVENTS),
        "host_gap_s": why or (SERVED if is_served else NO_EVENTS),
    }
    return values, {key: reasons[key] for key, value in values.items() if value is None}


def from_events(samples: Iterable[Sample], busy_s: Times) -> Times:
    """Seconds of each step without the device, of every arm that has events; medians.

    The device worked as long as its events say, or as ``busy_s`` does where that is less.
    """
    found: dict[Key, dict[str, float]] = {}
    for key, turns in collect(samples).items():
        given = [s for s in turns.samples if s.served is None and s.device_s]
        steps = {
            "prefill": [(s.metrics["prefill_s"], s.device_s[0]) for s in given if s.device_s],
            "decode": [
                (s.metrics["tpot_s"], sum(s.device_s[1:]) / (len(s.device_s) - 1))
                for s in given
                if s.device_s and len(s.device_s) > 1
            ],
        }
        known = {
            phase: median([max(wall - min(device, busy), 0.0) for wall, device in of if wall])
            for phase, of in steps.items()
            if any(wall for wall, _ in of)
            for busy in [busy_s.get(key, {}).get(phase, float("inf"))]
        }
        if known:
            found[key] = known
    return found
