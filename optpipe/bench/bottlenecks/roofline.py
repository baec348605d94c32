"""Which resource bounds one step: three votes on the roofline and a decision list.

The roofline model is that of Williams, Waterman and Patterson (CACM 52(4), 2009). A step that moves
several kinds of bytes and multiplies several dtypes takes at least

    memory_s  = sum of bytes / bandwidth at their working set
    compute_s = sum of FLOPs / matrix rate of their dtype
    floor_s   = max(memory_s, compute_s)

so that MBU = memory_s / t, MFU = compute_s / t, eta = floor_s / t, and intensity over ridge is
compute_s / memory_s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import PhaseCost

MEMORY, COMPUTE, NEITHER = "memory", "compute", "neither"
WEIGHTS, KV = "memory_bandwidth_weights", "memory_bandwidth_kv"
HOST, KERNEL = "host", "kernel"
MOST_USE = 1.05
"""A utilisation above it is a fault of the ceilings, of the count or of the clock."""
DEAD_ZONE = 0.2
"""So near to the ridge, below it or above, the side says nothing."""
IN_USE = 0.4
"""What is used less bounds nothing; gpt-fast's int4 on an A100 uses 0.42 of the bandwidth."""
FAINT_USE = 0.1
"""So little bandwidth used is waiting, such as for threads that have no core."""
POOR_ETA = 0.5
"""Below it, a step that neither resource bounds has kernels to improve."""
HOST_SHARE = 0.2
FLAT, STEEP = 0.25, 0.6
"""Elasticity of time to the tokens of a step: memory up to the one, compute from the other on."""
KV_SHARE = 0.4


class ImpossibleError(ValueError):
    """A step that was faster than physics."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """How one step of ``seconds`` uses the machine."""

    bytes: float
    flops: float
    memory_s: float
    compute_s: float
    seconds: float

    @property
    def floor_s(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def mbu(self) -> float:
        return self.memory_s / self.seconds

    @property
    def mfu(self) -> float:
        return self.compute_s / self.seconds

    @property
    def eta(self) -> float:
        return max(self.mbu, self.mfu)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which this mix of bytes and dtypes is bound by compute."""
        return self.intensity * self.memory_s / self.compute_s


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step as it was measured, and how many tokens it fed."""

    use: Use
    tokens: float


Vote = tuple[str | None, str]
"""'memory', 'compute' or 'neither'; or None, and why."""


def memory_s(cost: PhaseCost, ceilings: Ceilings) -> float:
    parts = (part for part in cost.traffic.values() if part.bytes)
    return sum(part.bytes / ceilings.bytes_per_s(part.working_set) for part in parts)


def compute_s(cost: PhaseCost, ceilings: Ceilings) -> float:
    return sum(flops / ceilings.flops_per_s[dtype] for dtype, flops in cost.flops.items())


def floor_s(cost: PhaseCost, ceilings: Ceilings) -> float:
    """Seconds below which no step can be: what is faster was not measured right."""
    return max(memory_s(cost, ceilings), compute_s(cost, ceilings))


def use(cost: PhaseCost, seconds: float, ceilings: Ceilings) -> Use:
    """Raises ImpossibleError if a utilisation exceeds MOST_USE."""
    found = Use(
        bytes=cost.bytes,
        flops=cost.all_flops,
        memory_s=memory_s(cost, ceilings),
        compute_s=compute_s(cost, ceilings),
        seconds=seconds,
    )
    for name, value in (("MBU", found.mbu), ("MFU", found.mfu)):
        if value > MOST_USE:
            raise ImpossibleError(
                f"{name} {value:.2f} is above {MOST_USE}: {seconds:.3g} s for "
                f"{found.bytes:.3g} bytes and {found.flops:.3g} FLOPs is faster than the ceilings"
            )
    return found


def by_intensity(found: Use) -> Vote:
    """V1: on which side of the ridge the step lies."""
    side = found.compute_s / found.memory_s
    if 1 - DEAD_ZONE <= side <= 1 + DEAD_ZONE:
        return None, f"intensity is {side:.2f} of the ridge, within {DEAD_ZONE:.0%} of it"
    return (COMPUTE if side > 1 else MEMORY), ""


def by_utilisation(found: Use) -> Vote:
    """V2: the resource that the measured time shows to be much used, or neither.

    It contradicts V1, which knows no time, by 'neither': whatever side of the ridge the step lies
    on, something else takes its time. It cannot name the other resource, for MBU / MFU is ridge
    over intensity whatever the time; only counters of the hardware could. Near the ridge, where V1
    abstains, it speaks if one of both is much used. V3 needs no ceiling and can contradict both.
    """
    used = {MEMORY: found.mbu >= IN_USE, COMPUTE: found.mfu >= IN_USE}
    if not any(used.values()):
        return NEITHER, ""
    if all(used.values()):
        return by_intensity(found)
    return (MEMORY if used[MEMORY] else COMPUTE), ""


def by_elasticity(step: Step, other: Step | None, alone: bool = True) -> Vote:
    """V3: how time grows with the tokens of a step, d ln t / d ln n, between neighbouring cells.

    Needs no ceiling where weights are most of the bytes. Where the bytes of a step grow with its
    tokens too (a long KV cache), time grows whatever bounds it, and this says nothing. Neither
    does a flat time that is not that of the device ``alone``: the work of a host is flat, too.
    """
    if other is None:
        return None, "no neighbouring cell in this run"
    grown = log(other.tokens / step.tokens)
    time, memory, compute = (
        log(getattr(other.use, name) / getattr(step.use, name)) / grown
        for name in ("seconds", "memory_s", "compute_s")
    )
    if memory > FLAT or compute < STEEP:
        return None, f"bytes grow as tokens^{memory:.2f}, FLOPs as tokens^{compute:.2f}: too alike"
    if FLAT < time < STEEP:
        return None, f"time grows as tokens^{time:.2f}, between {FLAT} and {STEEP}"
    if time <= FLAT and step.use.mbu < FAINT_USE:
        return None, f"time is flat, but at MBU {step.use.mbu:.2f} it is not memory that takes it"
    if time <= FLAT and not alone and step.use.eta < IN_USE:
        return None, "time is flat, and the host's share of it is not known"
    return (MEMORY if time <= FLAT else COMPUTE), ""


def classify(found: Use, votes: dict[str, str | None], cost: PhaseCost, host: float | None) -> Vote:
    """The class of a step, by the first rule that matches; or None, and why.

    ``host`` is the share of the wall time in which nothing was computed, None where unknown.
    """
    if host is not None and host > HOST_SHARE:
        return HOST, ""
    counted = list(votes.values())
    if counted.count(MEMORY) >= 2:
        return bandwidth_of(cost), ""
    if counted.count(COMPUTE) >= 2:
        return COMPUTE, ""
    if found.eta < POOR_ETA:  # which it is wherever neither is in use
        return KERNEL, ""
    return None, "fewer than two votes agree, and the step is near the roofline"


def bandwidth_of(cost: PhaseCost) -> str:
    """Whether weights or the KV cache take the bandwidth; KV from KV_SHARE of the bytes on."""
    return KV if cost.traffic["kv"].bytes > KV_SHARE * cost.bytes else WEIGHTS
