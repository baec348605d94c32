"""Raw results to report.json: what is undefined is null, and ``reasons`` beside it says why."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optpipe.bench import quality
from optpipe.bench.clock import LATENCIES, METRICS, ONE_TOKEN
from optpipe.bench.measure import Sample
from optpipe.bench.outcome import Outcome
from optpipe.bench.publish import publish
from optpipe.bench.scenario import Cell
from optpipe.bench.statistics import LEVEL, fewest_pairs, median, ratio
from optpipe.bench.worker import Arm

SCHEMA = "optpipe.report/1"
FIELDS = (*METRICS, "peak_bytes")
"""What a cell holds a number of."""
NO_PEAK = "this system keeps no peak of resident memory that can be reset"
ONE_NUMBER = "a single number: nothing varies from block to block"
HAND_OVER = "one request at a time never queues: this is the hand-over between two processes"
NO_WINDOWS = {"reasons": {"windows": "no arm was left to judge"}}
ITSELF = "the baseline itself"
Entry = dict[str, Any]


def build(outcome: Outcome, facts: Mapping[str, Any]) -> Entry:
    """The report: what was run, then every arm with its quality and its cells."""
    return {
        "schema": SCHEMA,
        "run": {**facts, "design": _design(outcome)},
        "artifacts": [_artifact(arm, outcome) for arm in outcome.arms],
    }


def write(found: Entry, samples: Sequence[Sample], out: Path) -> None:
    """Every raw sample, then report.json, .md and .html from the same numbers."""
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(out / "samples.jsonl.gz", "wt", encoding="ascii") as stream:
        for sample in samples:
            record = {**asdict(sample), "cell": sample.cell._asdict()}
            stream.write(json.dumps(record, allow_nan=False) + "\n")
    publish(found, out)


def _design(outcome: Outcome) -> Entry:
    """How the numbers came about."""
    windows, judged = outcome.windows, outcome.judged
    return {
        "timing": "paired blocks, arms interleaved in random order, resident worker processes",
        "sessions": outcome.sessions,
        "prompts": [
            {**cell._asdict(), "ids_hash": ids} for cell, ids in outcome.measured.prompts.items()
        ],
        "quality": {**(windows.source if windows else NO_WINDOWS), "windows": judged.windows},
        "interval": f"{LEVEL:.0%}, Hodges-Lehmann and signed rank on paired log-ratios",
    }


def _artifact(arm: Arm, outcome: Outcome) -> Entry:
    loaded = outcome.loaded.get(arm.name)
    told: Entry = {"load_s": None, "weight_bytes": None, "dtype": None, "device": None}
    if loaded is not None:
        told = {key: getattr(loaded, key) for key in told}
    why = outcome.left_out.get(arm.name, "")
    artifact = arm.artifact
    return {
        "name": arm.name,
        "stage": artifact.lineage[-1] if artifact.lineage else "baseline",
        "lineage": list(artifact.lineage),
        "format": artifact.format,
        "key": artifact.key,
        "bytes": artifact.size_bytes,
        **told,
        "stats": artifact.stats,
        "quality": _quality(arm.name, outcome),
        "cells": [_cell(arm, cell, outcome) for cell in outcome.cells],
        "reasons": {key: why for key, value in told.items() if value is None},
    }


def _quality(name: str, outcome: Outcome) -> Entry:
    judged, windows = outcome.judged, outcome.windows
    why = outcome.absent(name) or judged.missing.get(name)
    if why is not None:
        return quality.without(why)
    if windows is None or name not in judged.sums:
        return quality.without("a window of the held-out text does not fit in its KV cache")
    return quality.result(judged.sums[name], windows.is_text, outcome.unpaired(name))


def _cell(arm: Arm, cell: Cell, outcome: Outcome) -> Entry:
    """One arm in one cell: medians over blocks, and ratios to the baseline over paired blocks."""
    own, why = _timed(arm.name, cell, outcome)
    values, reasons = _values(own, why)
    if not own:
        reasons["cpu_s"] = why
    elif cell in outcome.measured.stopped:
        reasons["blocks"] = outcome.measured.stopped[cell]
    return {
        **cell._asdict(),
        **values,
        "blocks": len(own),
        "cpu_s": median([sample.cpu_s for sample in own]) if own else None,
        "speedup": _speedups(arm, cell, outcome),
        "reasons": reasons,
    }


def _timed(name: str, cell: Cell, outcome: Outcome) -> tuple[list[Sample], str]:
    """The samples that count, or why there are none."""
    measured = outcome.measured
    why = outcome.left_out.get(name) or measured.dropped.get((name, cell))
    if why is None:
        own = [s for s in measured.samples if s.arm == name and s.cell == cell and s.reason is None]
        return own, "" if own else measured.dead.get(name, "no block was run")
    return [], why


def _values(own: Sequence[Sample], why: str) -> tuple[Entry, dict[str, str]]:
    """The number of every field, and the reason of every null."""
    if not own:
        return dict.fromkeys(FIELDS), dict.fromkeys(FIELDS, why)
    values: Entry = {}
    reasons = {}
    per_sample = [sample.metrics for sample in own]
    for name in METRICS:
        there = [v for metrics in per_sample if (v := metrics[name]) is not None]
        values[name] = median(there) if there else None
    if values["tpot_s"] is None:
        reasons["tpot_s"] = ONE_TOKEN
    peaks = [sample.peak_bytes for sample in own if sample.peak_bytes is not None]
    values["peak_bytes"] = max(peaks, default=None)
    if not peaks:
        reasons["peak_bytes"] = NO_PEAK
    return values, reasons


def _speedups(arm: Arm, cell: Cell, outcome: Outcome) -> dict[str, Entry]:
    """How many times better than the baseline in each field, always above 1 if better."""
    base = outcome.arms[0]
    pairs, why = _pairs(arm.name, cell, outcome)
    if arm is base and pairs:
        found = dict.fromkeys(FIELDS, _single(1.0, ITSELF))
    else:
        found = {name: _compare(name, pairs) if pairs else _nothing(why) for name in FIELDS}
    smaller = base.artifact.size_bytes / arm.artifact.size_bytes
    return {
        **found,
        "queue_s": _nothing(HAND_OVER),
        "bytes": _single(smaller, ITSELF if arm is base else ONE_NUMBER),
    }


def _pairs(name: str, cell: Cell, outcome: Outcome) -> tuple[list[tuple[Sample, Sample]], str]:
    """Samples of the baseline and of this arm from the same blocks, or why there are none."""
    own, why = _timed(name, cell, outcome)
    base, lost = _timed(outcome.baseline, cell, outcome)
    by_block = {(sample.session, sample.block): sample for sample in base}
    matched = ((by_block.get((s.session, s.block)), s) for s in own)
    pairs = [(b, s) for b, s in matched if b is not None]
    if not own:
        return pairs, why
    unpaired = outcome.unpaired(name) or f"the baseline has no numbers here: {lost}"
    return pairs, "" if pairs else unpaired


def _compare(name: str, pairs: Sequence[tuple[Sample, Sample]]) -> Entry:
    if name == "peak_bytes":
        base = [b.peak_bytes for b, _ in pairs if b.peak_bytes]
        own = [s.peak_bytes for _, s in pairs if s.peak_bytes]
        return _single(max(base) / max(own), ONE_NUMBER) if base and own else _nothing(NO_PEAK)
    values = [(b.metrics[name], s.metrics[name]) for b, s in pairs]
    before = [b for b, _ in values if b is not None]
    after = [s for _, s in values if s is not None]
    if not before:
        return _nothing(ONE_TOKEN)
    shift = ratio(before, after) if name in LATENCIES else ratio(after, before)
    few = f"{shift.pairs} paired blocks; {fewest_pairs()} are the fewest with an interval at 95 %"
    return {
        "ratio": shift.estimate,
        "ci": None if shift.ci is None else list(shift.ci),
        "reasons": {} if shift.ci else {"ci": few},
    }


def _single(value: float, why: str) -> Entry:
    return {"ratio": value, "ci": None, "reasons": {"ci": why}}


def _nothing(why: str) -> Entry:
    return {"ratio": None, "ci": None, "reasons": {"ratio": why, "ci": why}}
