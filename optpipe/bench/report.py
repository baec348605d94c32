"""Raw results to report.json: what is undefined is null, and ``reasons`` beside it says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optpipe import evaluate
from optpipe.bench import capacity, cold
from optpipe.bench.cells import Entry, Table
from optpipe.bench.evidence.statistics import LEVEL
from optpipe.bench.fidelity import assess
from optpipe.bench.judgement import Judgement
from optpipe.bench.outcome import Outcome
from optpipe.bench.pages import raw
from optpipe.bench.pages.publish import publish
from optpipe.bench.summary import crossover, recommendation
from optpipe.bench.timed.samples import Sample, resumed
from optpipe.bench.timed.timing import WARM
from optpipe.bench.worker import Arm

SCHEMA = "optpipe.report/1"
NO_LOGITS = "an endpoint tells no logits; its files are those of an artifact that was judged"
GIVEN = "the model was given, no stage made it"
NOT_TIMED = "it was made by a version that did not tell how long that took"
NO_WINDOWS = {"reasons": {"windows": "no arm was left to judge"}}


def build(outcome: Outcome, facts: Mapping[str, Any]) -> Entry:
    """The report: what was run, then every arm with its quality and its cells."""
    table = Table(outcome)
    judgement = Judgement(table)
    artifacts = [_artifact(arm, table) for arm in outcome.arms]
    judgement.add_verdicts(artifacts)
    for artifact in artifacts:
        artifact["crossover"] = crossover(artifact["cells"])
    return {
        "schema": SCHEMA,
        "run": {
            **facts,
            "design": _design(outcome, judgement),
            "invalid_reasons": judgement.invalid_reasons,
        },
        "artifacts": artifacts,
        "recommendation": recommendation(artifacts),
    }


def write(found: Entry, samples: Sequence[Sample], out: Path) -> None:
    """Every raw sample, then report.json, .md and .html from the same numbers."""
    out.mkdir(parents=True, exist_ok=True)
    raw.write(samples, out)
    publish(found, out, raw.points(samples))


def _design(outcome: Outcome, judgement: Judgement) -> Entry:
    """How the numbers came about, and how small a difference they can show."""
    windows, judged, bench = outcome.windows, outcome.judged, outcome.bench
    return {
        "timing": "paired blocks, arms interleaved in random order, resident worker processes, "
        f"{_sets(outcome)} of every arm one after the other",
        "sessions": outcome.sessions,
        "anchored": sorted(outcome.anchored),
        "resumed": resumed(
            outcome.measured.samples, outcome.journal.part, outcome.journal.begun_ns
        ),
        "prompts": [
            {**cell._asdict(), "ids_hash": _first(of)}
            for cell, of in outcome.measured.prompts.items()
        ],
        "quality": {**(windows.source if windows else NO_WINDOWS), "windows": judged.windows},
        "interval": f"{LEVEL:.0%} over all looks ({100 * bench.level:.4g} % each), "
        "on paired log-ratios: signed rank around the Hodges-Lehmann estimate, and the "
        "mean of an AR(1) series, and what processes of one arm differ by, whichever reaches "
        "farthest",
        "looks": list(bench.looks),
        "delta": bench.delta,
        "resolution": judgement.resolution,
        "instrument": dict(outcome.instrument) if outcome.instrument else None,
        "reasons": {} if outcome.instrument else {"instrument": "the self-test was not run"},
    }


def _sets(outcome: Outcome) -> int:
    """The most processes an arm had, apart from those that a kill ended."""
    return 1 + max((sample.residence for sample in outcome.measured.samples), default=0)


def _first(prompts: Mapping[int, str]) -> str:
    """The first that were timed stand for all: how many follow is a matter of time."""
    return prompts[min(prompts, key=lambda number: (number < WARM, number))]


def _artifact(arm: Arm, table: Table) -> Entry:
    outcome, artifact = table.outcome, arm.artifact
    return {
        "name": arm.name,
        "role": _role(arm, outcome),
        "stage": "endpoint" if arm.endpoint else (artifact.lineage or ("baseline",))[-1],
        "lineage": list(artifact.lineage),
        "format": artifact.format,
        "key": artifact.key,
        "bytes": artifact.size_bytes,
        **_told(arm, outcome),
        "stats": artifact.stats,
        "quality": _quality(arm, outcome),
        **({"evaluation": _evaluation(arm.name, outcome)} if outcome.tasks else {}),
        "cells": [table.cell(arm.name, cell) for cell in outcome.cells],
    }


def _told(arm: Arm, outcome: Outcome) -> Entry:
    """What its making, its files and its loading told, with the reason of every null."""
    loaded, starts = outcome.loaded.get(arm.name), outcome.starts.get(arm.name, [])
    why = outcome.absent(arm.name) or "its files were not read"
    started = cold.entry(starts, cold.shape(outcome), "" if starts else why)
    held = capacity.entry(loaded, outcome.free(arm.name), "" if loaded else why)
    names = ("weight_bytes", "dtype", "device", "decoding")
    told: Entry = {
        **{name: None if loaded is None else getattr(loaded, name) for name in names},
        "load_s": started["load_s"],
        "content": outcome.content.get(arm.name),
        "made_s": arm.artifact.made_s,
    }
    reasons = {key: why for key, value in told.items() if value is None}
    if arm.artifact.made_s is None:
        reasons["made_s"] = GIVEN if not arm.artifact.lineage else NOT_TIMED
    return {**told, **held, "cold": started, "reasons": reasons | held["reasons"]}


def _role(arm: Arm, outcome: Outcome) -> str:
    """'reference': the baseline's weights in another dtype; 'endpoint': an artifact, served."""
    if arm.endpoint:
        return "endpoint"
    if arm.name == outcome.baseline:
        return "baseline"
    return "artifact" if arm.artifact.lineage else "reference"


def _evaluation(name: str, outcome: Outcome) -> Entry:
    """What the user's tasks say of an arm, and of each document against the baseline."""
    base, own = outcome.evaluated.get(outcome.baseline), outcome.evaluated.get(name)
    why = outcome.absent(name if own is None else outcome.baseline) or "it was not evaluated"
    found = {"tasks": own, "changes": evaluate.compare(base, own) if base and own else None}
    return {**found, "reasons": {key: why for key, value in found.items() if value is None}}


def _quality(arm: Arm, outcome: Outcome) -> Entry:
    name, judged, windows = arm.name, outcome.judged, outcome.windows
    absent = outcome.left_out.get(name) or outcome.broken.get(name)
    if (why := absent or judged.missing.get(name)) is not None:
        return assess.without(why)
    if arm.endpoint:
        return assess.without(NO_LOGITS)
    if windows is None or name not in judged.scored:
        return assess.without("a window of the held-out text does not fit in its KV cache")
    context = assess.Context(
        references=[arm.name for arm in outcome.arms if not arm.artifact.lineage],
        dtypes={arm: told.dtype for arm, told in outcome.loaded.items()},
        is_text=windows.is_text,
        unpaired=outcome.apart(name),
    )
    return assess.entry(name, judged, context)
