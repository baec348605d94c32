"""The second half of report.html: why, how sure, what is missing, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optpipe.bench.pages import bounds, curves, missing, room, served, setups, tasks
from optpipe.bench.pages.markup import (
    Safe,
    bullets,
    details,
    figure,
    join,
    note,
    section,
    table,
    tag,
)
from optpipe.bench.pages.view import DASH, METRICS, Entry, interval, names, number, share, where

CLASSES = {
    "memory_bandwidth_weights": "bandwidth, for weights",
    "memory_bandwidth_kv": "bandwidth, for the KV cache",
}
LIMIT = ("artifact", "limited by", "decode MBU", "decode MFU", "FLOP/byte", "prefill MBU",
         "prefill MFU", "FLOP/byte")  # fmt: skip
VOTES = ("artifact", "phase", "ridge, FLOP/byte", "intensity", "utilisation", "elasticity")
REMEDY = ("artifact", "phase", "remedy", "why", "predicted")


def limits(report: Entry) -> Safe:
    """What bounds every artifact in the first cell, and what would help."""
    given = [
        (name, found)
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
        if (found := artifact["cells"][0].get("bottleneck"))
    ]
    if not given:
        return section("What limits it", note("This report holds no bottleneck analysis."))
    title = "Roofline of this machine"
    svg = curves.roofline(report, 0, title)
    read = (
        "The grey roofs are what this machine was measured to reach; a point on the slope is "
        "limited by memory bandwidth, under the flat part by arithmetic. The distance below the "
        "roof is what the kernels leave unused. Filled: decode, hollow square: prefill."
    )
    votes = [row for name, found in given for row in _vote_rows(name, found)]
    return section(
        "What limits it",
        note(
            f"In {where(report['artifacts'][0]['cells'][0])}. MBU and MFU: the share of the "
            "measured memory bandwidth and of the measured arithmetic rate that was used. Votes: "
            "by intensity, the side of the ridge; by utilisation, what is much used, or neither; "
            "by elasticity, how time grows with the tokens of a step."
        ),
        tag("div", figure(title, svg, read), class_="one") if svg else "",
        table(LIMIT, [_limit_row(*one) for one in given], "what limits every artifact"),
        details("Votes", table(VOTES, votes, "votes on what limits it")),
        *_remedies(given),
        *_outcomes(report),
    )


def _limit_row(name: str, found: Entry) -> tuple[str, ...]:
    row = [name, CLASSES.get(found["class"], found["class"]) or DASH]
    for phase in ("decode", "prefill"):
        facts = (found.get("phase") or {}).get(phase) or {}
        row += [share(facts.get("mbu")), share(facts.get("mfu")), number(facts.get("intensity"))]
    return tuple(row)


def _vote_rows(name: str, found: Entry) -> Iterator[tuple[str, ...]]:
    for phase in ("decode", "prefill"):
        facts = (found.get("phase") or {}).get(phase) or {}
        votes = facts.get("votes") or {}
        yield (name, phase, number(facts.get("ridge")), *(votes.get(key) or DASH
               for key in VOTES[3:]))  # fmt: skip


def _remedies(given: Sequence[tuple[str, Entry]]) -> Iterator[Safe]:
    """Advice for the baseline, which the artifacts may have followed; for those folded away."""
    rows = [row for name, found in given for row in _remedy_rows(name, found)]
    first = [row for row in rows if row[0] == given[0][0]]
    if rows:
        yield tag("h3", "What would help")
        yield table(REMEDY, first or rows, "remedies", "stack")
    if first and len(first) < len(rows):
        yield details(
            "For the other artifacts", table(REMEDY, rows[len(first) :], "remedies", "stack")
        )


def _remedy_rows(name: str, found: Entry) -> Iterator[tuple[str, ...]]:
    phases = found.get("phase") or {}
    places = {"all": found, **{key: facts for key, facts in phases.items() if key != "reasons"}}
    for phase, facts in places.items():
        for remedy in (facts or {}).get("remedies", ()):
            predicted = number(remedy["predicted_speedup"], 1, "{:.2f}\u00d7")
            yield (name, phase, remedy["name"], remedy["why"], predicted)


def _outcomes(report: Entry) -> Iterator[Safe]:
    """Of every cell: a prediction may come true at one batch size and not at another."""
    tables = [*bounds.outcomes(report)]
    if tables:
        yield tag("h3", "Predicted, and what came true")
        yield note(bounds.READ)
    for index, (title, rows) in enumerate(tables):
        drawn = table(bounds.OUTCOME, rows, f"what came true, {title}", "stack pairs")
        yield join([note(f"{title}."), drawn]) if index == 0 else details(title, drawn)


def servers(report: Entry) -> Iterator[Safe]:
    """What came of requests that come by themselves; nothing where no scenario has a server."""
    drawn = [
        part
        for title, rows in served.tables(report)
        for part in (note(f"{title}."), table(served.HEADER, rows, title, "stack pairs"))
    ]
    if drawn:
        yield section("Under load", *drawn, note(served.READ))


def energy(report: Entry) -> Iterator[Safe]:
    """What energy every artifact took, where it was counted."""
    drawn = [
        part
        for title, rows in setups.energy(report)
        for part in (note(f"{title}."), table(setups.ENERGY, rows, title, "stack pairs"))
    ]
    if drawn:
        yield section("Energy", *drawn, note(setups.READ))


def evaluation(report: Entry) -> Iterator[Safe]:
    """The user's tasks, where they were run."""
    if rows := [*tasks.rows(report)]:
        yield section("Tasks", note(tasks.READ), table(tasks.HEADER, rows, "tasks", "stack pairs"))


def ready(report: Entry) -> Safe:
    """What it takes until an artifact answers, and how much it can then hold."""
    return section(
        "Starts and memory",
        details("Cold starts", join([
            table(room.START, room.starts(report), "cold starts", "stack pairs"), note(room.READ),
        ])),
        details("Memory and KV cache", join([
            table(room.MEMORY, room.memory(report), "memory", "stack pairs"), note(room.ROOM),
        ])),
    )  # fmt: skip


def drift(report: Entry, series: Sequence[Entry]) -> Safe:
    """Every iteration of every cell in the order of its blocks; of a sweep, job by job."""
    jobs: dict[str, list[Entry]] = {}
    for one in series:
        jobs.setdefault(one.get("job", ""), []).append(one)
    drawn = {job: parts for job, of in jobs.items() if (parts := [*_drifts(report, of)])}
    if not drawn:
        return section("Drift", note("There are no raw timings beside this report."))
    read = (
        "One line an artifact, black is the baseline; 1 is its own median. Lines that move "
        "together are the machine drifting, which paired ratios cancel; one that moves alone is "
        "its own. Hollow marks are warm-up, crosses are blocks that were disturbed or have one arm "
        "alone: none counts. A grey line is where new processes of all arms began."
    )
    if report["run"]["design"].get("resumed"):
        read += " Where the orange line is, the run was killed and went on."
    grids = [(job, tag("div", join(parts), class_="grid")) for job, parts in drawn.items()]
    return section("Drift", note(read), *(details(job, g) if job else g for job, g in grids))


def _drifts(report: Entry, series: Sequence[Entry]) -> Iterator[Safe]:
    for index, cell in enumerate(report["artifacts"][0]["cells"]):
        if svg := curves.timeline(report, index, series, title := f"Drift: {where(cell)}"):
            yield figure(title, svg)


def lacking(report: Entry) -> Safe:
    """Every reason in the report, and which numbers it explains."""
    rows, title = missing.rows(report), "What is missing, and why"
    if not rows:
        return section(title, note("Nothing: every number was measured."))
    return section(title, table(missing.HEADER, rows, "missing values", "wrap stack"))


def machine(report: Entry) -> Safe:
    """Where it was measured, with what, and how fine the instrument is."""
    run = report["run"]
    host = {key: value for key, value in run["machine"].items() if key != "gpus"}
    gpus = [
        table(("GPU", ""), _facts(gpu), "GPU", "wrap") for gpu in run["machine"].get("gpus", ())
    ]
    versions = [(name, version) for name, version in run["versions"].items()]
    design = run["design"]
    lines = [f"Timing: {design['timing']}.", f"Intervals: {design['interval']}."]
    if instrument := design.get("instrument"):
        errors = [f"{key.partition('_')[0].upper()} {share(value)}" for key, value in
                  instrument.items() if key.endswith("_error")]  # fmt: skip
        lines.append(f"Error of the instrument on known delays: {', '.join(errors)}.")
    return section(
        "Machine, versions, instrument",
        bullets(lines),
        details("How each was run", table(setups.RAN, setups.ran(report), "setups", "wrap stack")),
        *([details("Before it began", table(CHECKS, _checks(run), "preflight", "wrap"))]
          if run.get("preflight") else []),
        *_resolution(design.get("resolution") or ()),
        tag("div", join([
            table(("machine", ""), _facts(host), "machine", "wrap"),
            *gpus,
            table(("package", "version"), versions, "versions", "wrap"),
        ]), class_="grid"),
    )  # fmt: skip


CHECKS = ("check", "found", "wanted", "passed")


def _checks(run: Entry) -> list[tuple[str, ...]]:
    """What was looked at before anything was measured."""
    return [
        (one["check"], one["found"], one["wanted"], "yes" if one["passed"] else "no")
        for one in run["preflight"]
    ]


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = {key: value for key, value in about.items() if key != "reasons"}
    return [(key.replace("_", " "), _fact(key, value)) for key, value in told.items()]


def _resolution(cells: Sequence[Entry]) -> Iterator[Safe]:
    """What the baseline against itself looked like: no ratio means more than this."""
    rows = [
        (where(cell), METRICS.get(key, key), interval(entry, "{:.3f}"),
         share(entry.get("half_width")), share(entry.get("process_sd")))
        for cell in cells
        for key, entry in cell.items()
        if isinstance(entry, dict) and "ratio" in entry
    ]  # fmt: skip
    if rows:
        header = ("cell", "metric", "baseline over baseline", "resolution", "a process")
        yield note(
            "The baseline was also measured against itself; a smaller difference than the "
            "resolution cannot be seen. Blocks repeat what a process drew when it started, such "
            "as where its memory lies: the last column is the standard deviation of that, over "
            "the processes of all arms."
        )
        yield details("Resolution", table(header, rows, "resolution"))


def _fact(key: str, value: Any) -> str:
    if value is None:
        return DASH
    if key.endswith("_bytes"):
        return f"{value / 1e9:.1f} GB"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={inner}" for name, inner in value.items()) or "nothing set"
    if isinstance(value, list):
        return ", ".join(f"{item:.2f}" if isinstance(item, float) else str(item) for item in value)
    return str(value)


def reproduce(report: Entry) -> Safe:
    """The command that makes this report again."""
    run = report["run"]
    command = tag("pre", tag("code", shlex.join(run["command"])), tabindex="0")
    jobs = [
        (job["name"], job["folder"], "yes" if job["report"] else job.get("reason") or DASH)
        for job in run.get("jobs", ())
    ]
    return section(
        "To reproduce",
        command,
        note(f"Seed {run['seed']}, {run['threads']} threads, optpipe "
             f"{run['versions'].get('optpipe', DASH)}, on the machine above."),
        *([table(("job", "folder", "report"), jobs, "jobs of the sweep", "wrap")] if jobs else []),
    )  # fmt: skip
