"""The reports of a sweep's jobs as one report of the same kind.

Every speed-up stays the one over the baseline of its own job, measured in the same minutes. An
artifact that several jobs share is there once, with the numbers of the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optpipe.bench.pages import raw
from optpipe.bench.pages.publish import CELL, REPORT, publish, read
from optpipe.bench.pages.view import short

Entry = dict[str, Any]
ONE_AFTER_THE_OTHER = (
    "; the jobs of the sweep ran one after the other, so compare their speed-ups, not their times"
)
OTHER_JOB = "not a cell of the job that made this artifact"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    folder: Path
    overrides: tuple[str, ...]
    """As the user gave them, such as quant.bits=3."""
    code: int
    """Its exit code."""


def merge(jobs: Sequence[Job], out: Path) -> bool:
    """Write the report of a sweep into ``out``; False if no job has a report."""
    done = {
        name: read(job.folder)
        for name, job in zip(labels(jobs), jobs, strict=True)
        if (job.folder / REPORT).is_file()
    }
    if done:
        run = _run(jobs, done, out)
        publish({**merged(done), "run": run}, out, raw.read(out, run["jobs"]))
    return bool(done)


def labels(jobs: Sequence[Job]) -> list[str]:
    """What each job sets that not all others set alike, or its number."""
    common = set.intersection(*(set(job.overrides) for job in jobs))
    names = [" ".join(o for o in job.overrides if o not in common) for job in jobs]
    numbered = [f"{name} (job {n})".strip() for n, name in enumerate(names)]
    return names if all(names) and len({*names}) == len(names) else numbered


def merged(done: Mapping[str, Entry]) -> Entry:
    """All artifacts and recommendations of reports, which are given by the names of their jobs."""
    kept: dict[str, Entry] = {}
    for job, report in done.items():
        for artifact in report["artifacts"]:
            known = kept.setdefault(_identity(artifact, report), {**artifact, "jobs": []})
            known["jobs"].append(job)
    new_names = {
        (job, artifact["name"]): artifact["name"] if len(artifact["jobs"]) == len(done)
        else f"{artifact['jobs'][0]} {artifact['name']}"
        for artifact in kept.values() for job in artifact["jobs"]
    }  # fmt: skip
    cells = {_point(cell): cell for artifact in kept.values() for cell in artifact["cells"]}
    artifacts = [_artifact(artifact, new_names, cells, len(done)) for artifact in kept.values()]
    picks = [
        {**_renamed(pick, job, new_names), "scenario": f"{pick['scenario']}, {job}"}
        for job, report in done.items()
        for pick in report.get("recommendation", ())
    ]
    schema = next(iter(done.values()))["schema"]
    return {"schema": schema, "artifacts": artifacts, "recommendation": picks}


def _identity(artifact: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Equal for equal content that was measured in the same way."""
    how = {key: report["run"][key] for key in ("bench", "threads", "versions", "scenarios")}
    served = artifact["role"] == "endpoint"
    return json.dumps([artifact["key"], served, artifact["dtype"], artifact["device"], how])


def _artifact(
    artifact: Entry,
    new_names: Mapping[tuple[str, str], str],
    cells: Mapping[tuple[Any, ...], Entry],
    jobs: int,
) -> Entry:
    """An artifact under its new name, with a cell for every cell of the sweep."""
    job = artifact["jobs"][0]
    own = {_point(cell): cell for cell in artifact["cells"]}
    label = short(artifact)
    return {
        **artifact,
        "name": new_names[job, artifact["name"]],
        "label": label if len(artifact["jobs"]) == jobs else f"{job} {label}",
        "cells": [
            _renamed(own[point], job, new_names) if point in own else _absent(cell)
            for point, cell in cells.items()
        ],
    }


def _absent(cell: Mapping[str, Any]) -> Entry:
    """A cell that only other jobs have."""
    numbers = [key for key in cell if key.endswith(("_s", "_bytes"))]
    nothing = {"ratio": None, "ci": None, "reasons": dict.fromkeys(("ratio", "ci"), OTHER_JOB)}
    return {
        **{key: cell[key] for key in CELL},
        **dict.fromkeys(numbers),
        "blocks": 0,
        "speedup": dict.fromkeys(cell["speedup"], nothing),
        "reasons": dict.fromkeys(numbers, OTHER_JOB),
    }


def _renamed(node: Any, job: str, new_names: Mapping[tuple[str, str], str]) -> Any:
    """Whatever names an artifact of its job names it as the sweep does."""
    if isinstance(node, list):
        return [_renamed(item, job, new_names) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: new_names.get((job, value), value)
        if key == "artifact" and isinstance(value, str)
        else _renamed(value, job, new_names)
        for key, value in node.items()
    }


def _run(jobs: Sequence[Job], done: Mapping[str, Entry], out: Path) -> Entry:
    """How the sweep was run; of what should be alike, what the first job says."""
    runs = {name: report["run"] for name, report in done.items()}
    first = next(iter(runs.values()))
    designs = [run["design"] for run in runs.values()]
    design = {
        **designs[0],
        "timing": designs[0]["timing"] + ONE_AFTER_THE_OTHER,
        **{
            key: [one for design in designs for one in design.get(key, ())]
            for key in ("sessions", "resumed")
        },
        **{key: _first(designs, key) for key in ("prompts", "resolution")},
    }
    common = set.intersection(*(set(job.overrides) for job in jobs))
    differ = {key for key in ("recipe", "stages") for run in runs.values()
              if run.get(key) != first.get(key)}  # fmt: skip
    found = {
        **{key: value for key, value in first.items() if key not in differ},
        "overrides": [override for override in jobs[0].overrides if override in common],
        "duration_s": sum(run["duration_s"] for run in runs.values()),
        "scenarios": {k: v for run in runs.values() for k, v in run["scenarios"].items()},
        "preflight": [
            {**one, "check": f"{job}: {one['check']}"}
            for job, run in runs.items()
            for one in run.get("preflight", ())
        ],
        "design": design,
        "jobs": [*_jobs(jobs, runs, out)],
    }
    bad = [f"{job}: {why}" for job, run in runs.items() for why in run.get("invalid_reasons", ())]
    return {**found, "invalid_reasons": bad} if bad else found


def _first(designs: Sequence[Entry], key: str) -> list[Entry]:
    """The entry of every cell, as its numbers that of the first job that has it."""
    found: dict[tuple[Any, ...], Entry] = {}
    for one in (one for design in designs for one in design.get(key, ())):
        found.setdefault(_point(one), one)
    return [*found.values()]


def _jobs(jobs: Sequence[Job], runs: Mapping[str, Entry], out: Path) -> Iterator[Entry]:
    for name, job in zip(labels(jobs), jobs, strict=True):
        folder = job.folder.relative_to(out) if job.folder.is_relative_to(out) else job.folder
        entry: Entry = {"name": name, "folder": str(folder), "overrides": [*job.overrides]}
        if name in runs:
            times = {key: runs[name][key] for key in ("started", "duration_s")}
            yield {**entry, "report": True, **times}
        else:
            reason = f"it ended with exit code {job.code}; its log is in its folder"
            yield {**entry, "report": False, "reason": reason}


def _point(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in CELL)
