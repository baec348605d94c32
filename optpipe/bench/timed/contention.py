"""Whether the machine was disturbed while an arm had its turn.

A turn is compared with the arm's own and the session's usual state: load that is always there falls
on all arms alike, a burst falls on one.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optpipe.bench import nvml
from optpipe.bench.evidence.statistics import median
from optpipe.bench.machine import usable_cores

STAT = Path("/proc/stat")
CONTENTION = 1.5
"""Wall clock over CPU time per thread, against the arm's own recent median."""
OTHERS = 0.25
"""Share of the usable cores that other processes took, above the session's median."""
STOLEN = 0.10
"""Share of the usable cores that the hypervisor took, above the session's median."""
BUSY = 0.5
"""An arm that uses less of a core, such as one that waits for a GPU, is not judged by CPU time."""
HISTORY = 3
"""Turns before which nothing can be called unusual."""
RECENT = 7
"""Turns of an arm that say what is usual for it: once it has compiled, it may need fewer cores."""


@dataclass(frozen=True, kw_only=True)
class Ticks:
    """CPU time of the usable cores since boot, seconds."""

    busy_s: float
    stolen_s: float
    slowed: str = ""
    """Why the driver holds the clocks of a GPU down, other than by its power limit."""


Meter = Callable[[], Ticks | None]


def ticks() -> Ticks | None:
    """Read /proc/stat; None where there is none."""
    if sys.platform != "linux" or not STAT.is_file():
        return None
    usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    rows = [line.split() for line in STAT.read_text().splitlines()]
    cores = [[int(n) for n in row[1:9]] for row in rows if row and row[0] in usable]
    hertz = os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal
    busy = sum(sum(core[:3]) + sum(core[5:7]) for core in cores)
    return Ticks(busy_s=busy / hertz, stolen_s=sum(core[7] for core in cores) / hertz)


def meter_of(gpus: Iterable[str], board: Callable[[str], nvml.Board] = nvml.Board) -> Meter:
    """Ticks that also tell what slows these GPUs, by their UUIDs."""
    boards = [board(gpu) for gpu in gpus]

    def read() -> Ticks | None:
        found, slowed = ticks(), {why for one in boards if (why := one.slowed())}
        return found and replace(found, slowed=", ".join(sorted(slowed)))

    return read


@dataclass(kw_only=True)
class Watch:
    """What is usual in one cell of one session."""

    meter: Meter = ticks
    cores: int = field(default_factory=usable_cores)
    _work: dict[str, deque[float]] = field(default_factory=dict)
    _others: list[float] = field(default_factory=list)
    _stolen: list[float] = field(default_factory=list)
    _slowed: list[float] = field(default_factory=list)

    def disturbed(
        self, arm: str, wall_s: float, cpu_s: float, before: Ticks | None, after: Ticks | None
    ) -> str | None:
        """Why a turn that took ``wall_s`` is tainted, if it is; also remembers the turn."""
        work = self._work.setdefault(arm, deque(maxlen=RECENT))
        found = [self._contended(work, cpu_s / wall_s)]
        work.append(cpu_s / wall_s)
        if before is not None and after is not None:
            others = (after.busy_s - before.busy_s - cpu_s) / (wall_s * self.cores)
            stolen = (after.stolen_s - before.stolen_s) / (wall_s * self.cores)
            found.append(_unusual(self._others, others, OTHERS, "other processes"))
            found.append(_unusual(self._stolen, stolen, STOLEN, "the hypervisor"))
            found.append(self._held_down(after.slowed))
        return next((why for why in found if why), None)

    def _held_down(self, slowed: str) -> str | None:
        """Whether a GPU was slowed that is not so most of the time."""
        history = self._slowed
        is_usual = len(history) < HISTORY or median(history) > 0
        history.append(float(bool(slowed)))
        return f"the GPU was slowed: {slowed}" if slowed and not is_usual else None

    def _contended(self, work: Sequence[float], share: float) -> str | None:
        if len(work) < HISTORY or (usual := median(work)) < BUSY or share * CONTENTION >= usual:
            return None
        return f"it got {share:.2f} cores where {usual:.2f} are usual"


def _unusual(history: list[float], share: float, limit: float, who: str) -> str | None:
    usual = median(history) if len(history) >= HISTORY else None
    history.append(share)
    if usual is None or share <= usual + limit:
        return None
    return f"{who} took {share:.0%} of the cores where {usual:.0%} are usual"
