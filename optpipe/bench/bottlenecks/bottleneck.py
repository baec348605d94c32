"""What bounds each artifact in each cell of a report, what would help, and whether it did.

Works on the entries of report.json, so that it can be run again on a stored report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isclose, log
from typing import Any

from optpipe.bench.bottlenecks import roofline
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import PhaseCost, PhaseCosts
from optpipe.bench.bottlenecks.realised import (
    ENGINES,
    TIMES,
    Place,
    advice,
    cell_of,
    outcome,
    promised,
    twins,
)
from optpipe.bench.bottlenecks.remedies import remedies
from optpipe.bench.bottlenecks.roofline import ImpossibleError, Step
from optpipe.bench.bottlenecks.waiting import capacity_remedies, queue_remedies
from optpipe.bench.bottlenecks.whatif import Bound
from optpipe.bench.scenario import Cell

Entry = dict[str, Any]
Costs = Mapping[tuple[str, Cell], PhaseCosts]
"""By the name of the artifact in the report and the cell."""
HostTimes = Mapping[tuple[str, Cell], Mapping[str, float]]
"""Seconds of a 'prefill' and of a 'decode' step in which the device computed nothing: from a
profile of the kernels, or wall time less that of CUDA events."""
QUEUE, CAPACITY = "queue", "capacity"
QUEUE_SHARE = 0.5
MOST_HOST = 0.99
"""So that something is left that the device did, whatever the error of the host's time."""
USED = ("bytes", "flops", "mbu", "mfu", "intensity", "ridge", "eta")
NUMBERS = ("seconds", "floor_s", "host_share", *USED)
ITSELF = "the baseline itself, or one that was not counted"
NO_COST = "the bytes and FLOPs of this cell were not counted"
NO_HOST = "only the wall time is known: the host's share of it is not"
CROWDED = "no thread of it ran in much of the time, and its host needs less: it waited for a core"
SERVED = "requests of a server differ in length and batch, so that no step is like another"


def attach(
    report: Entry,
    costs: Costs,
    ceilings: Mapping[str, Ceilings],
    host_s: HostTimes | None = None,
) -> None:
    """Give every cell of the report its ``bottleneck``, the run its ``ceilings`` by device.

    A step faster than physics makes its class null and is added to ``run.invalid_reasons``.
    """
    run = report["run"]
    run["ceilings"] = {device: found.entry() for device, found in ceilings.items()}
    run.setdefault("invalid_reasons", [])
    book = _Book(report=report, costs=costs, ceilings=ceilings, host_s=host_s or {})
    for artifact in report["artifacts"]:
        for cell in artifact["cells"]:
            cell["bottleneck"] = book.entry(artifact, cell)
    run["invalid_reasons"] += book.impossible


@dataclass(kw_only=True)
class _Book:
    """A report and all that is known about its steps."""

    report: Entry
    costs: Costs
    ceilings: Mapping[str, Ceilings]
    """Of each device that an artifact ran on."""
    host_s: HostTimes
    impossible: list[str] = field(default_factory=list)

    def entry(self, artifact: Entry, cell: Entry) -> Entry:
        """The ``bottleneck`` of one cell: that of the phase that takes most of its time."""
        phases = {phase: self._phase(phase, artifact, cell) for phase in TIMES}
        kind, why, advice = self._whole(artifact, cell, phases)
        found: Entry = {"class": kind, "phase": phases, "remedies": advice, "reasons": {}}
        if kind is None:
            found["reasons"]["class"] = why
        return found

    def _whole(
        self, artifact: Entry, cell: Entry, phases: Mapping[str, Entry]
    ) -> tuple[str | None, str, list[Entry]]:
        """Class of the cell, why there is none, and the remedies for what no phase shows."""
        steps = {"prefill": 1, "decode": cell["new_tokens"] - 1}
        taken = {p: (cell[TIMES[p]] or 0.0) * count for p, count in steps.items()}
        longest = phases[max(taken, key=lambda phase: taken[phase])]
        if longest["class"] == roofline.HOST:
            return roofline.HOST, "", []
        queue, ttft = cell["queue_s"], cell["ttft_s"]
        # one request at a time waits for no other: what it waits for is the hand-over to a process
        if "arrivals" in cell and queue and ttft and queue > QUEUE_SHARE * ttft:
            return QUEUE, "", [advice(r) for r in queue_remedies(ttft, queue)]
        cost = self.costs.get((artifact["name"], cell_of(cell)))
        if cost is not None and cell_of(cell).tokens > cost.capacity:
            return CAPACITY, "", [advice(r) for r in capacity_remedies()]
        return longest["class"], longest["reasons"].get("class", ""), []

    def _phase(self, phase: str, artifact: Entry, cell: Entry) -> Entry:
        step, why = self._step(phase, artifact, cell)
        if step is None:
            return _unknown(why)
        cost = self._cost(phase, artifact, cell)
        assert cost is not None
        votes, reasons = self._votes(phase, artifact, cell, step)
        host = self._host(phase, artifact, cell)
        crowded = host is not None and _idle(artifact, cell) > host + roofline.HOST_SHARE
        classified = roofline.classify(step.use, votes, cost, host)
        kind, no_class = (None, CROWDED) if crowded else classified
        reasons |= {"class": no_class} if kind is None else {}
        reasons |= {"host_share": NO_HOST} if host is None else {}
        promise = self._promised(phase, artifact, cell)
        reasons |= {"roofline": ITSELF} if promise is None else {}
        found: Entry = {
            "class": kind,
            "seconds": step.use.seconds,
            "floor_s": step.use.floor_s,
            "host_share": host,
            "bytes_of": {name: part.bytes for name, part in cost.traffic.items()},
            **{name: getattr(step.use, name) for name in USED},
            "votes": votes,
            "roofline": promise,
            "remedies": [],
            "reasons": reasons,
        }
        if kind is not None:
            bound = Bound(
                kind=kind,
                phase=phase,
                cost=cost,
                found=step.use,
                host=host,
                ceilings=self.ceilings[artifact["device"]],
                engine=artifact["format"] in ENGINES,
                launched=_launched(phase, artifact),
            )
            found["remedies"] = self._advice(bound, artifact, cell)
        return found

    def _advice(self, bound: Bound, artifact: Entry, cell: Entry) -> list[Entry]:
        """The remedies of a step, and what came of those that were tried."""
        where = Place(report=self.report, artifact=artifact, cell=cell, phase=bound.phase)
        made = twins(where, lambda later: self._cost(bound.phase, later, cell))
        tried = {does: twin.amount for does, twin in made.items()}
        return [outcome(r, made.get(r.does or ""), bound, where) for r in remedies(bound, tried)]

    # ---- what was measured

    def _cost(self, phase: str, artifact: Entry, cell: Entry) -> PhaseCost | None:
        costs = self.costs.get((artifact["name"], cell_of(cell)))
        found: PhaseCost | None = getattr(costs, phase) if costs else None
        return found

    def _step(self, phase: str, artifact: Entry, cell: Entry) -> tuple[Step | None, str]:
        """One step with its use of the machine, or why there is none."""
        wall = cell[TIMES[phase]]
        if "arrivals" in cell:
            return None, SERVED
        if wall is None:
            return None, cell["reasons"].get(TIMES[phase], "it was not timed")
        cost = self._cost(phase, artifact, cell)
        ceilings = self.ceilings.get(artifact["device"])
        if cost is None or ceilings is None:
            return None, NO_COST
        tokens = cell["batch"] * (cell["prompt_tokens"] if phase == "prefill" else 1)
        try:
            whole = roofline.use(cost, wall, ceilings)  # the check is on what was measured
        except ImpossibleError as error:
            reason = f"{artifact['name']}, {cell_of(cell)}, {phase}: {error}"
            if reason not in self.impossible:
                self.impossible.append(reason)
            return None, str(error)
        busy = wall * (1 - (self._known_host(phase, artifact, cell) or 0.0))
        return Step(use=replace(whole, seconds=max(busy, whole.floor_s)), tokens=tokens), ""

    def _known_host(self, phase: str, artifact: Entry, cell: Entry) -> float | None:
        found = self.host_s.get((artifact["name"], cell_of(cell)), {}).get(phase)
        return None if found is None else min(found / cell[TIMES[phase]], MOST_HOST)

    def _host(self, phase: str, artifact: Entry, cell: Entry) -> float | None:
        """Share of the wall time in which nothing was computed, None where unknown.

        Without a profile, on a CPU: where less than one core was busy on average, nobody computed.
        """
        known = self._known_host(phase, artifact, cell)
        if known is not None:
            return known
        idle = _idle(artifact, cell)
        return idle if idle > roofline.HOST_SHARE else None

    def _votes(
        self, phase: str, artifact: Entry, cell: Entry, step: Step
    ) -> tuple[dict[str, str | None], dict[str, str]]:
        other = self._neighbour(phase, artifact, cell, step)
        alone = self._known_host(phase, artifact, cell) is not None
        found = {
            "intensity": roofline.by_intensity(step.use),
            "utilisation": roofline.by_utilisation(step.use),
            "elasticity": roofline.by_elasticity(step, other, alone),
        }
        reasons = {name: why for name, (vote, why) in found.items() if vote is None}
        return {name: vote for name, (vote, _) in found.items()}, reasons

    def _neighbour(self, phase: str, artifact: Entry, cell: Entry, step: Step) -> Step | None:
        """The timed cell whose step feeds the nearest number of tokens, all else alike.

        That is another batch of the same prompts; for a prefill also other prompts at this batch.
        """
        alike = ("batch", "prompt_tokens") if phase == "prefill" else ("prompt_tokens",)
        cells = (c for c in artifact["cells"] if any(c[name] == cell[name] for name in alike))
        steps = (self._step(phase, artifact, c)[0] for c in cells)
        others = [s for s in steps if s is not None and not isclose(s.tokens, step.tokens)]
        return min(others, key=lambda s: abs(log(s.tokens / step.tokens)), default=None)

    def _promised(self, phase: str, artifact: Entry, cell: Entry) -> Entry | None:
        """What its bytes and the roofline promised against the baseline, and what came true."""
        base = self.report["artifacts"][0]
        own, before = (self._cost(phase, a, cell) for a in (artifact, base))
        if artifact is base or own is None or before is None:
            return None
        floors = [
            roofline.floor_s(cost, self.ceilings[device])
            for cost, device in ((before, base["device"]), (own, artifact["device"]))
        ]
        return promised(before.bytes / own.bytes, floors[0] / floors[1], cell, phase)


def _unknown(why: str) -> Entry:
    """A phase of which nothing can be said."""
    empty: Entry = dict.fromkeys(("class", *NUMBERS, "bytes_of", "roofline"))
    votes = dict.fromkeys(("intensity", "utilisation", "elasticity"))
    reasons = dict.fromkeys((*empty, *votes), why)
    return {**empty, "votes": votes, "remedies": [], "reasons": reasons}


def _launched(phase: str, artifact: Entry) -> bool:
    """Whether a host launches the kernels of a step one by one."""
    graphs = phase == "decode" and "CUDA graph" in artifact["decoding"]
    return artifact["device"] != "cpu" and not graphs


def _idle(artifact: Entry, cell: Entry) -> float:
    """Share of the time in which not even one core was busy; 0 on a GPU, or where it is unknown."""
    if artifact["device"] != "cpu" or not cell["cpu_s"]:
        return 0.0
    idle: float = max(1 - cell["cpu_s"] / cell["e2e_s"], 0.0)
    return idle
