"""A report in its folder: report.json, report.md and report.html, all from the same dict."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from optpipe.bench.pages import html, schema, tables
from optpipe.errors import InputError, one_line

REPORT, SAMPLES = "report.json", "samples.jsonl.gz"
CELL = ("scenario", "batch", "prompt_tokens", "new_tokens")
MOST_SAMPLES = 100_000
"""Reading more would take longer than the page is worth."""
Report = dict[str, Any]


def publish(found: Mapping[str, Any], out: Path) -> None:
    """Write the three files; the timings in report.html are those of samples.jsonl.gz beside them.

    Raises ValueError if the report breaks the schema, but only once it is written: nobody wants to
    lose an hour of measurements to a misspelt key of ours.
    """
    text = json.dumps(found, indent=1, allow_nan=False)
    (out / REPORT).write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(tables.markdown(found), encoding="utf-8")
    (out / "report.html").write_text(html.page(found, series(out)), encoding="utf-8")
    schema.check(found)


def read(folder: Path) -> Report:
    """The report in a folder. Raises InputError if there is none, or one of another schema."""
    file = folder / REPORT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {REPORT} in '{folder}'") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}': {one_line(error)}") from error
    try:
        schema.check(found)
    except ValueError as error:
        raise InputError(f"'{file}' is {one_line(error)}") from error
    report: Report = found
    return report


def series(folder: Path) -> list[Report]:
    """The end-to-end time of the raw timings in a folder, at most ``MOST_SAMPLES``.

    Each has arm, session, block, reason, the cell as a tuple and ``e2e_s``. None if there is no
    file of them, as beside the report of a sweep. One without a token has no time.
    """
    file = folder / SAMPLES
    if not file.is_file():
        return []
    with gzip.open(file, "rt", encoding="ascii") as stream:
        samples = map(json.loads, islice(stream, MOST_SAMPLES))
        return [_point(sample) for sample in samples if sample["token_ns"]]


def _point(sample: Report) -> Report:
    return {
        **{key: sample[key] for key in ("arm", "session", "block", "reason")},
        "cell": tuple(sample["cell"][key] for key in CELL),
        "e2e_s": (sample["token_ns"][-1] - sample["submit_ns"]) / 1e9,
    }
