"""How each arm was run, and what energy that took, as rows for report.md and report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.pages.view import DASH, names, number

RAN = ("artifact", "format", "dtype", "device", "decoding")
ENERGY = ("artifact", "J/token", "above idle", "J/request", "above idle", "W", "idle W", "counter")
READ = (
    "Energy has a window of its own for every artifact, at least 10 s in which nothing else "
    "worked; above idle: less what the device takes with all artifacts loaded and none at work. "
    "A request is a row of the batch. No intervals: compare differences with those of two runs."
)
Report = Mapping[str, Any]


def ran(report: Report) -> list[tuple[str, ...]]:
    """What every artifact computed in, where, and how it decoded."""
    return [
        (name, *(str(artifact.get(key) or DASH) for key in RAN[1:]))
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
    ]


def energy(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The title and the rows of every cell in which some energy was counted."""
    for index, first in enumerate(report["artifacts"][0]["cells"]):
        cells = [artifact["cells"][index] for artifact in report["artifacts"]]
        if any(cell.get("energy") for cell in cells):
            title = f"{first['scenario']} {first['batch']} x {first['prompt_tokens']}"
            yield (
                title,
                [
                    (name, *_row(cell.get("energy") or {}))
                    for name, cell in zip(names(report), cells, strict=True)
                ],
            )


def _row(told: Report) -> Iterator[str]:
    for key in ("j_per_token", "j_per_token_above_idle", "j_per_request",
                "j_per_request_above_idle", "power_w", "idle_w"):  # fmt: skip
        yield number(told.get(key))
    yield str(told.get("source", DASH))
