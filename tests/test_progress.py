"""What a user sees of a running stage: its name, the layer, and how long it will take."""

import io
import logging
import sys

import pytest
from rich.console import Console

from optpipe import progress


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, caplog):
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    caplog.set_level(logging.INFO)
    with progress.shown("quant") as report:
        for done in range(60):
            report(f"layer.{done}", done, 60)
            now_s += 2.0
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "quant: layer.3, 3 of 60, 0:06, about 1:54 left"
    assert len(lines) == 19  # every third of 60 reports, which come every 2 s


def test_a_second_pass_has_an_estimate_of_its_own(monkeypatch, caplog):
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    caplog.set_level(logging.INFO)
    with progress.shown("quant") as report:
        now_s = 100.0
        report("pass", 0, 4)
        now_s = 110.0
        report("pass", 1, 4)
    assert caplog.records[-1].getMessage() == "quant: pass, 1 of 4, 0:10, about 0:30 left"


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with progress.shown("quant") as report:
        report("model.layers.3.mlp", 3, 12)
    shown = screen.getvalue()
    assert "quant" in shown and "model.layers.3.mlp" in shown and "25%" in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


def test_the_screen_shows_no_traceback(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    log = logging.Logger("test")
    log.addHandler(progress.StderrHandler())
    try:
        raise ValueError("inside")
    except ValueError as error:
        log.error("failed", exc_info=error)
    log.info("fine")
    assert screen.getvalue() == "fine\n"
