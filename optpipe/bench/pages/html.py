"""report.html: one page for people, from the dict of report.json and the raw timings beside it.

It loads nothing: style and charts are in the file. Numbers that are missing are a dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optpipe.bench.pages import about, sections
from optpipe.bench.pages.markup import Safe, bullets, join, section, tag
from optpipe.bench.pages.tables import NOT_INCLUDED

STYLE = Path(__file__).with_name("report.css")


def page(found: Mapping[str, Any], series: Sequence[Mapping[str, Any]]) -> str:
    """The whole page. ``series``: timings as :func:`.raw.read` gives them."""
    run = found["run"]
    of = f", a sweep of {len(run['jobs'])} jobs" if run.get("jobs") else ""
    title = f"optpipe: {run.get('recipe') or 'benchmark'}{of}"
    head = join([
        Safe('<meta charset="utf-8">'),
        Safe('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Safe('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Safe(STYLE.read_text(encoding="utf-8"))),
    ])  # fmt: skip
    main = join([
        sections.top(found, title),
        sections.headline(found),
        sections.stages(found),
        sections.speedups(found),
        *about.servers(found),
        *about.energy(found),
        sections.tradeoff(found),
        *about.evaluation(found),
        sections.batches(found),
        about.limits(found),
        about.ready(found),
        about.drift(found, series),
        about.lacking(found),
        about.machine(found),
        section("What these numbers do not include", bullets(NOT_INCLUDED)),
        about.reproduce(found),
    ])  # fmt: skip
    body = tag("body", tag("main", main))
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}{body}</html>\n'
