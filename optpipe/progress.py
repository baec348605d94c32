"""How far a stage has come: a live bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from optpipe.stage import Progress

log = logging.getLogger(__name__)
LINE_EVERY_S = 5.0
SPEED_OVER_S = 3600.0
"""The bar estimates the time left from this much history: one layer can take minutes."""


@contextmanager
def shown(stage: str) -> Iterator[Progress]:
    """What ``stage`` reports its progress to while the context lasts."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(stage)
        return
    columns = (
        TextColumn("[bold]{task.fields[stage]}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=console, transient=True, speed_estimate_period=SPEED_OVER_S) as bar:
        task = bar.add_task("", total=None, stage=stage)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


class _Lines:
    """Logs progress, at most one line in LINE_EVERY_S seconds."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.started_s = self.logged_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done == 0:  # a stage may pass over the model more than once
            self.started_s = now_s
        if now_s - self.logged_s < LINE_EVERY_S:
            return
        self.logged_s = now_s
        elapsed_s = now_s - self.started_s
        left = f", about {clock(elapsed_s / done * (total - done))} left" if done else ""
        log.info("%s: %s, %d of %d, %s%s", self.stage, what, done, total, clock(elapsed_s), left)


def clock(seconds: float) -> str:
    """As m:ss or h:mm:ss."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Logs to whatever ``sys.stderr`` is at that moment, so that lines go above a live bar.

    A traceback is for the log file: cli.py says in one line what happened and where that file is.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not record.exc_info:
            self.stream = sys.stderr
            super().emit(record)
