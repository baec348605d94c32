"""Every raw timing of a run, one JSON object a line: written once, read for the page's charts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from optpipe.bench.scenario import Cell
from optpipe.bench.timed.samples import Sample, encode
from optpipe.errors import InputError, one_line

SAMPLES = "samples.jsonl.gz"
MOST = 100_000
"""Reading more would take longer than the page is worth."""
LINES = 1000
"""Compressed at a time."""
LEVEL = 1
"""Of gzip: a fifth larger than the default of 9 here, and five times as fast."""
KEPT = ("arm", "session", "residence", "part", "block", "reason")
OLDER = {"residence": 0, "part": 0}
"""What samples of earlier versions lack."""
Point = dict[str, Any]
"""The end-to-end time of one iteration: arm, session, residence, part, block, reason, cell (a
tuple), e2e_s; of a sweep also its job."""


def write(samples: Sequence[Sample], folder: Path) -> None:
    """All samples, in order. Raises ValueError for a number that is not finite."""
    with gzip.open(folder / SAMPLES, "wb", compresslevel=LEVEL) as stream:
        encoded = encode(samples)
        while lines := [*islice(encoded, LINES)]:
            stream.write(("\n".join(lines) + "\n").encode("ascii"))


def points(samples: Iterable[Sample]) -> list[Point]:
    """Of samples in memory, at most ``MOST``; one without a token has no time."""
    return [
        _point(vars(s), s.cell, s.token_ns[-1] - s.submit_ns)
        for s in islice(samples, MOST)
        if s.token_ns
    ]


def read(folder: Path, jobs: Sequence[Mapping[str, Any]] = ()) -> list[Point]:
    """Those of the file in a folder; none where there is no file.

    Of a sweep those of its ``jobs``, as its report lists them, each with the name of its job.
    Raises InputError for a file of anything else.
    """
    if jobs:
        return [
            {**point, "job": job["name"]} for job in jobs for point in read(folder / job["folder"])
        ]
    file = folder / SAMPLES
    if not file.is_file():
        return []
    try:
        return _parsed(file)
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read '{file}': {one_line(error)}") from error


def _parsed(file: Path) -> list[Point]:
    with gzip.open(file, "rt", encoding="ascii") as stream:
        return [
            _point({**OLDER, **s}, Cell(**s["cell"]), s["token_ns"][-1] - s["submit_ns"])
            for s in map(json.loads, islice(stream, MOST))
            if s["token_ns"]
        ]


def _point(sample: Mapping[str, Any], cell: Cell, taken_ns: int) -> Point:
    return {**{key: sample[key] for key in KEPT}, "cell": tuple(cell), "e2e_s": taken_ns / 1e9}
