"""What a remedy would bring: Amdahl's law on the bytes and FLOPs of a step.

A step takes its floor and a rest, that of the host included. A remedy changes the floor; the rest
stays:

    predicted = tokens' / tokens * t / (t - floor_s + floor_s')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from optpipe.bench.bottlenecks import roofline
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import PhaseCost, Traffic


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One advice for one step."""

    name: str
    why: str
    predicted: float | None = None
    """Times faster, per token; None: ``unknown`` says why there is no such number."""
    unknown: str = ""
    does: str | None = None
    """What an artifact that is this remedy did, as in `realised`: '4-bit weights', 'ranks'."""
    needs: str = ""
    """What nobody can give this model on this machine: 'a second device'; '': nothing."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A step whose class is known."""

    kind: str
    phase: str
    """'prefill' or 'decode'."""
    cost: PhaseCost
    found: roofline.Use
    """Of the time in which something was computed."""
    host: float | None
    """Share of the wall time in which nothing was, None where unknown."""
    ceilings: Ceilings
    engine: bool = False
    """Whether it runs on an engine already."""
    launched: bool = False
    """Whether a host launches every kernel of it on a GPU."""

    @property
    def wall_s(self) -> float:
        return self.found.seconds / (1 - (self.host or 0.0))

    def faster(self, changed: PhaseCost, tokens: float = 1.0) -> float:
        """The prediction for a step of another cost and ``tokens`` times the tokens."""
        after = self.wall_s - self.found.floor_s + roofline.floor_s(changed, self.ceilings)
        return tokens * self.wall_s / after

    @property
    def twice(self) -> float:
        """The prediction for twice the rows, which the same weights serve."""
        return self.faster(scaled(self.cost, kv=2, activations=2, flops=2), tokens=2)


def scaled(cost: PhaseCost, flops: float = 1.0, **parts: float) -> PhaseCost:
    """The same step with its FLOPs and the named parts of its bytes multiplied.

    The memory that weights and cache come from shrinks with them, perhaps into a faster one.
    """
    moved = {name: part.bytes * parts.get(name, 1.0) for name, part in cost.traffic.items()}
    before = cost.traffic["weights"].bytes + cost.traffic["kv"].bytes
    smaller = (moved["weights"] + moved["kv"]) / before
    changed = {
        name: Traffic(
            bytes=moved[name],
            working_set=part.working_set * (smaller if name in ("weights", "kv") else 1.0),
        )
        for name, part in cost.traffic.items()
    }
    by_dtype: Mapping[str, float] = {name: f * flops for name, f in cost.flops.items()}
    return replace(cost, traffic=changed, flops=by_dtype)
