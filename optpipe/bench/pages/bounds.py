"""What binds each artifact and what would help, what was predicted, and what came true: rows."""

from __future__ import annotations

from collections.abc import Iterator

from optpipe.bench.bottlenecks.realised import LEAST, TIMES
from optpipe.bench.pages.view import DASH, Entry, names, number, where

Rows = list[tuple[str, ...]]
LIMIT = ("artifact", "phase", "bound by", "MBU", "MFU", "of roofline", "FLOP/B", "ridge",
         "best remedy here", "predicted x")  # fmt: skip
OUTCOME = ("of", "phase", "remedy", "tried in", "predicted x", "as executed x", "measured x",
           "came true")  # fmt: skip
ALL = "everything up to it"
READ = (
    "A remedy has a row where a later artifact is that remedy alone. Predicted: what the bytes and "
    "FLOPs that it saves bring, everything else as slow as before. As executed: the same with what "
    "the artifact's own runtime moves and multiplies, which may not be what the remedy is about: "
    "torch makes floats of codes at every call, multiplies zeros and keeps its cache in floats. "
    "Measured: the ratio of the two. Came true: ln(measured) / ln(predicted), 100 % as predicted, "
    f"0 % no gain, below it slower; none where less than {LEAST - 1:.0%} was promised. "
    f"'{ALL}': an artifact against the baseline, its runtime included; what "
    "they execute is compared by their rooflines."
)


def limits(report: Entry) -> Iterator[tuple[str, Rows]]:
    """One table a cell, with LIMIT: its title, its rows in pipeline order.

    Nothing for a report without an analysis.
    """
    for title, found in _cells(report):
        yield (
            title,
            [
                _limit_row(name, phase, entry)
                for name, _, phases in found
                for phase, entry in phases.items()
            ],
        )


def outcomes(report: Entry) -> Iterator[tuple[str, Rows]]:
    """One table a cell in which something was predicted and then made, with OUTCOME."""
    called = dict(zip((a["name"] for a in report["artifacts"]), names(report), strict=True))
    for title, found in _cells(report):
        steps = [
            (name, phase, cell, entry)
            for name, cell, phases in found
            for phase, entry in phases.items()
        ]
        rows = [
            (name, phase, remedy["name"], called.get(remedy["artifact"], DASH), *_figures(remedy))
            for name, phase, _, entry in steps
            for remedy in entry["remedies"]
            if remedy["artifact"] is not None
        ]
        rows += [
            (found[0][0], phase, ALL, name, *_figures(_whole(promise, phase, cell)))
            for name, phase, cell, entry in steps
            if (promise := entry.get("roofline"))
        ]
        if rows:
            yield title, rows


def _cells(report: Entry) -> Iterator[tuple[str, list[tuple[str, Entry, Entry]]]]:
    """The title of each cell, and of each artifact its name, its cell, and its analysed phases."""
    called = names(report)
    analysed = report["artifacts"][0]["cells"] if "ceilings" in report["run"] else []
    for index, cell in enumerate(analysed):
        cells = [artifact["cells"][index] for artifact in report["artifacts"]]
        yield where(cell), [(n, c, _phases(c)) for n, c in zip(called, cells, strict=True)]


def _phases(cell: Entry) -> Entry:
    """By name, decode last; nothing of a cell of a sweep that its job does not have."""
    phases = (cell.get("bottleneck") or {}).get("phase") or {}
    return {name: entry for name in TIMES if (entry := phases.get(name))}


def _limit_row(name: str, phase: str, entry: Entry) -> tuple[str, ...]:
    best: Entry = next(iter(entry["remedies"]), {})
    given = [entry["mbu"], entry["mfu"], entry["eta"], entry["intensity"], entry["ridge"]]
    shown = [number(value, 1, "{:.2f}") for value in given]
    predicted = number(best.get("predicted_speedup"), 1, "{:.2f}")
    return (name, phase, entry["class"] or DASH, *shown, best.get("name", DASH), predicted)


def _whole(promise: Entry, phase: str, cell: Entry) -> Entry:
    """What the roofline promised an artifact against the baseline, as of a remedy."""
    return {
        "predicted_speedup": None,
        "executed_speedup": promise["ratio"],
        "speedup": cell["speedup"][TIMES[phase]]["ratio"],
        "realised": promise["realised"],
    }


def _figures(remedy: Entry) -> tuple[str, ...]:
    keys = ("predicted_speedup", "executed_speedup", "speedup")
    shown = [number(remedy.get(key), 1, "{:.2f}") for key in keys]
    return (*shown, number(remedy["realised"], 1, "{:.0%}"))
