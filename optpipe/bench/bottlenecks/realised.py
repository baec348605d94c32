"""How much of a predicted speed-up came true, from the artifacts of the same report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from optpipe.bench.bottlenecks.cost import PhaseCost
from optpipe.bench.bottlenecks.whatif import Bound, Remedy
from optpipe.bench.evidence.verdict import INVALID
from optpipe.bench.scenario import Cell

Entry = dict[str, Any]
TIMES = {"prefill": "prefill_s", "decode": "tpot_s"}
"""Phase -> the metric of a cell that times one step of it."""
ENGINES = {"ort", "tensorrt"}
"""Formats of artifacts that were built for one runtime."""
ENGINE = "engine"
MARKED = {"prune", "lowrank", "quant", "export", "build"}
"""Stages whose figures or format say what they did; others did what they are called."""
NO_ARTIFACT = "no later artifact of this run is this one with this remedy alone"
NOT_BYTES = "an engine is not about what is moved and multiplied"
LEAST = 1.1
"""Of smaller promises the share that came true says nothing: noise of 5 % is more than they are."""
NO_RATIO = "no paired ratio that is valid, or less than a tenth was promised"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One phase of one artifact in one cell of a report."""

    report: Entry
    artifact: Entry
    cell: Entry
    phase: str


def cell_of(entry: Mapping[str, Any]) -> Cell:
    return Cell(*(entry[name] for name in Cell._fields))


def realised(speedup: float | None, predicted: float | None) -> float | None:
    """ln S / ln(predicted S): 1 as predicted, 0 no gain, below 0 slower; None without a promise."""
    if not speedup or not predicted or abs(log(predicted)) < log(LEAST):
        return None
    return log(speedup) / log(predicted)


def promised(bytes_ratio: float, floor_ratio: float, cell: Entry, phase: str) -> Entry:
    """Two promises against the baseline, of bytes and of the roofline, with what came true."""
    speedup = _gain(cell, phase)
    return {
        "byte_ratio": bytes_ratio,
        "byte_realised": realised(speedup, bytes_ratio),
        "ratio": floor_ratio,
        "realised": realised(speedup, floor_ratio),
        "reasons": {
            name: NO_RATIO
            for name, ratio in (("byte_realised", bytes_ratio), ("realised", floor_ratio))
            if realised(speedup, ratio) is None
        },
    }


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A later artifact that is an earlier one with one remedy."""

    artifact: Entry
    cost: PhaseCost
    """As its own runner executes the step."""
    amount: float
    """How much of the remedy: bits a weight with scales, or the share of the weights it kept."""


def twins(where: Place, cost_of: Callable[[Entry], PhaseCost | None]) -> dict[str, Twin]:
    """What was done alone, as Remedy.does names it -> the last artifact that is this."""
    own, found = cost_of(where.artifact), {}
    for later in _after(where, where.artifact):
        done, cost = _done(where, later), cost_of(later)
        if len(done) == 1 and own is not None and cost is not None:
            ((mark, amount),) = done.items()
            kept = cost.weights / own.weights
            found[mark] = Twin(artifact=later, cost=cost, amount=kept if amount is None else amount)
    return found


def advice(remedy: Remedy) -> Entry:
    """A remedy as a report shows it, without an artifact that is one."""
    needs = f"it needs {remedy.needs}" if remedy.needs else ""
    figures = ("executed_speedup", "artifact", "speedup", "realised")
    return {
        "name": remedy.name,
        "why": "; ".join(part for part in (remedy.why, needs, remedy.unknown) if part),
        "predicted_speedup": remedy.predicted,
        **dict.fromkeys(figures),
        "reasons": dict.fromkeys(figures, NO_ARTIFACT)
        | ({} if remedy.predicted else {"predicted_speedup": remedy.unknown}),
    }


def outcome(remedy: Remedy, twin: Twin | None, bound: Bound, where: Place) -> Entry:
    """A remedy, and what came of it in the artifact that is this one with it alone, if any is."""
    found = advice(remedy)
    if twin is not None:
        same = next(c for c in twin.artifact["cells"] if cell_of(c) == cell_of(where.cell))
        after, before = (_gain(cell, where.phase) for cell in (same, where.cell))
        speedup = after / before if after and before else None
        found |= {
            "artifact": twin.artifact["name"],
            "executed_speedup": None if remedy.does == ENGINE else bound.faster(twin.cost),
            "speedup": speedup,
            "realised": realised(speedup, remedy.predicted),
        }
        found["reasons"] |= dict.fromkeys(("speedup", "realised"), NO_RATIO)
        found["reasons"]["executed_speedup"] = NOT_BYTES
    found["reasons"] = {k: why for k, why in found["reasons"].items() if found[k] is None}
    return found


def _gain(cell: Entry, phase: str) -> float | None:
    """How many times better than the baseline, unless that is INVALID."""
    speedup = cell["speedup"][TIMES[phase]]
    ratio: float | None = speedup["ratio"]
    return None if speedup.get("verdict") == INVALID else ratio


def _after(where: Place, artifact: Entry) -> list[Entry]:
    """Artifacts that were made from this one, in pipeline order; from the baseline also itself in
    another dtype."""
    own = artifact["lineage"]
    return [
        a
        for a in where.report["artifacts"]
        if (len(a["lineage"]) > len(own) and a["lineage"][: len(own)] == own)
        or (a["role"] == "reference" and artifact["role"] == "baseline")
    ]


def _done(where: Place, later: Entry) -> dict[str, float | None]:
    """What lies between an artifact and a later one, as Remedy.does names it; and how much of it,
    where its stage says so."""
    own, done = where.artifact, dict[str, float | None]()
    if later["format"] != own["format"]:
        done[ENGINE if later["format"] in ENGINES else "runtime"] = None
    if later["dtype"] != own["dtype"]:
        done[later["dtype"]] = None
    made = _after(where, own)
    for stage in (a for a in made if a is later or later in _after(where, a)):
        if not stage["lineage"]:
            continue
        stats = stage["stats"]
        done |= _rounded(stats) if "bits" in stats else {}
        done |= {"ranks": None} if stats.get("ranks") else {}
        done |= {f"pattern {stats.get('pattern')}": None} if stats.get("sparsity") else {}
        done |= dict.fromkeys({stage["lineage"][-1]} - MARKED)
    return done


def _rounded(stats: Entry) -> dict[str, float | None]:
    """'4-bit weights', 'mixed-bit weights', '8-bit weights, 8-bit inputs'; bits with scales."""
    facts = {**stats, **stats.get("verified", {})}
    bits = {*facts.get("layer_bits", {"": stats["bits"]}).values()}
    name = f"{bits.pop() if len(bits) == 1 else 'mixed'}-bit weights"
    if inputs := facts.get("layer_inputs"):
        name += f", {4 if inputs == ['nvfp4_block'] else 8}-bit inputs"
    return {name: facts.get("bits_per_quantized_weight", stats["bits"])}
