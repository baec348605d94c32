"""A report in its folder: report.json, report.md and report.html, all from the same dict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optpipe.bench.pages import html, raw, schema, tables
from optpipe.errors import InputError, one_line

REPORT = "report.json"
CELL = ("scenario", "batch", "prompt_tokens", "new_tokens")
Report = dict[str, Any]


def publish(found: Mapping[str, Any], out: Path, points: Sequence[raw.Point] = ()) -> None:
    """Write the three files; ``points`` are the timings that report.html draws.

    Raises ValueError if the report breaks the schema, but only once it is written: nobody wants to
    lose an hour of measurements to a misspelt key of ours.
    """
    text = json.dumps(found, indent=1, allow_nan=False)
    (out / REPORT).write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(tables.markdown(found), encoding="utf-8")
    (out / "report.html").write_text(html.page(found, points), encoding="utf-8")
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
