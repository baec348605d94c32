"""How much of a predicted speed-up came true, from the artifacts of the same report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, log
from typing import Any

from optpipe.bench.bottlenecks.remedies import Remedy
from optpipe.bench.scenario import Cell

Entry = dict[str, Any]
TIMES = {"prefill": "prefill_s", "decode": "tpot_s"}
"""Phase -> the metric of a cell that times one step of it."""
ENGINE = "ort"
"""The format of artifacts that were built for one runtime."""
MARKED = {"prune", "lowrank", "quant", "export", "build"}
"""Stages whose figures or format say what they did; others are no remedy that is listed."""
NO_ARTIFACT = "no later artifact of this run is this one with this remedy alone"
NO_RATIO = "no paired ratio, or nothing was promised"


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
    if not speedup or predicted is None or isclose(predicted, 1.0, rel_tol=0.01):
        return None
    return log(speedup) / log(predicted)


def promised(bytes_ratio: float, floor_ratio: float, cell: Entry, phase: str) -> Entry:
    """Two promises against the baseline, of bytes and of the roofline, with what came true."""
    speedup = cell["speedup"][TIMES[phase]]["ratio"]
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


def advice(remedy: Remedy) -> Entry:
    """A remedy as a report shows it, without an artifact that is one."""
    reasons = dict.fromkeys(("artifact", "speedup", "realised"), NO_ARTIFACT)
    return {
        "name": remedy.name,
        "why": remedy.why,
        "predicted_speedup": remedy.predicted,
        "artifact": None,
        "speedup": None,
        "realised": None,
        "reasons": reasons | ({"predicted_speedup": remedy.why} if not remedy.predicted else {}),
    }


def outcome(remedy: Remedy, where: Place) -> Entry:
    """A remedy, and the last artifact of the run that is this one with it alone, if any is."""
    found = advice(remedy)
    later = [a for a in _after(where, where.artifact) if _done(where, a) == {remedy.does}]
    if later:
        twin = next(c for c in later[-1]["cells"] if cell_of(c) == cell_of(where.cell))
        after, before = (c["speedup"][TIMES[where.phase]]["ratio"] for c in (twin, where.cell))
        speedup = after / before if after and before else None
        found |= {"artifact": later[-1]["name"], "speedup": speedup}
        found["realised"] = realised(speedup, remedy.predicted)
        found["reasons"] |= dict.fromkeys(("speedup", "realised"), NO_RATIO)
    found["reasons"] = {k: why for k, why in found["reasons"].items() if found[k] is None}
    return found


def _after(where: Place, artifact: Entry) -> list[Entry]:
    """Artifacts that were made from this one, in pipeline order."""
    own = artifact["lineage"]
    return [
        a
        for a in where.report["artifacts"]
        if len(a["lineage"]) > len(own) and a["lineage"][: len(own)] == own
    ]


def _done(where: Place, later: Entry) -> set[str]:
    """What the stages between an artifact and a later one did, as Remedy.does names it."""
    done = {"engine"} if later["format"] == ENGINE != where.artifact["format"] else set()
    made = _after(where, where.artifact)
    for stage in (a for a in made if a is later or later in _after(where, a)):
        stats = stage["stats"]
        done |= {f"bits {stats['bits']}"} if "bits" in stats else set()
        done |= {"ranks"} if stats.get("ranks") else set()
        done |= {f"pattern {stats.get('pattern')}"} if stats.get("sparsity") else set()
        done |= {stage["lineage"][-1]} - MARKED
    return done
