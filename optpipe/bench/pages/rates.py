"""The times of every cell in other words, as rows for report.md and report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.pages.view import names, number, where

HEADER = ("artifact", "tok/s: a user", "with TTFT", "full batch", "all", "prompt", "requests/s",
          "gap ms: p50", "p95", "p99", "longest")  # fmt: skip
READ = (
    "A user's rate is 1 / TPOT, with TTFT the tokens of an answer by its end-to-end time. Full "
    "batch: output tokens while every row decodes, from the last first token to the first end; of "
    "a server, while as many requests decode as are served at once. All: tokens in and out by the "
    "whole time. Prompt tokens by the time of prefill, the device's own on a GPU. Gaps between "
    "tokens; the longest is that of a block (median), between chunks if a server sends several at "
    "once. Percentiles that so few samples do not bound are not given."
)
Report = Mapping[str, Any]


def tables(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The title and the rows of every cell."""
    for index, first in enumerate(report["artifacts"][0]["cells"]):
        cells = [artifact["cells"][index] for artifact in report["artifacts"]]
        rows = zip(names(report), cells, strict=True)
        yield where(first), [(name, *_row(cell)) for name, cell in rows]


def _row(cell: Report) -> Iterator[str]:
    full = cell.get("decode_tokens_per_s") or cell.get("steady_tokens_per_s")
    for value in (cell.get("user_tokens_per_s"), cell.get("user_e2e_tokens_per_s"), full,
                  cell.get("total_tokens_per_s"), cell.get("prefill_tokens_per_s"),
                  cell.get("requests_per_s")):  # fmt: skip
        yield number(value)
    gaps = cell.get("percentiles", {}).get("itl_s") or {}
    for q in ("p50", "p95", "p99"):
        yield number(gaps.get(q), 1e3)
    yield number(cell.get("icl_max_s"), 1e3)
