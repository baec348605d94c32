"""What a server did under load, as rows for report.md and report.html: one table a cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.evidence.verdict import INVALID
from optpipe.bench.pages.view import DASH, interval, names, number
from optpipe.bench.serving.request import LIMITS

HEADER = ("artifact", "good/s", "x [95 %]", "good", "kept, %", "TTFT ms", "p95 ms",
          "queue ms", "TPOT ms", "served/s", "failed")  # fmt: skip
READ = (
    "A request is good if it was answered in full and kept every limit, TTFT counted from its "
    "scheduled arrival; one that failed is not good, and later than any other. good/s and served/s "
    "are requests a second, failed those of a block; medians over blocks. Kept: how many of all "
    "requests were within the limit on TTFT / TPOT / E2E. An arm takes one device at most, so that "
    "this is also per GPU. x is the ratio of all good requests a second, its interval a bootstrap "
    "of blocks and requests that needs 30 blocks, no narrower than what processes differ by. "
    "Nothing of it has a verdict: none of these metrics is among those chosen beforehand."
)
Report = Mapping[str, Any]


def tables(report: Report) -> Iterator[tuple[str, list[list[str]]]]:
    """The title and the rows of every cell that has a server."""
    for index, _ in enumerate(report["artifacts"][0]["cells"]):
        cells = [artifact["cells"][index] for artifact in report["artifacts"]]
        # in a sweep, another job may have the server
        if (told := next((c for c in cells if c.get("arrivals") is not None), None)) is not None:
            rows = [[name, *_row(own)] for name, own in zip(names(report), cells, strict=True)]
            yield _title(told), rows


def _title(cell: Report) -> str:
    rate = f" at {cell['rate_per_s']:.3g} a second" if cell["rate_per_s"] else ""
    if rate and (hurried := cell["reasons"].get("rate_per_s")) is not None:
        rate += f" (it may bear more: {hurried})"
    slo = cell["slo"]
    limits = [
        f"{name.removesuffix('_s').upper()} {slo[name] * 1e3:g} ms"
        for name in LIMITS
        if slo[name] is not None
    ]
    return (
        f"{cell['scenario']}: {cell['arrivals']} arrivals{rate}, at most {cell['batch']} at once, "
        f"up to {cell['prompt_tokens']} tokens in, {cell['new_tokens']} out; good within "
        f"{', '.join(limits) or 'any time'}"
    )


def _row(cell: Report) -> list[str]:
    goodput = cell["speedup"].get("goodput_per_s") or {"ratio": None, "ci": None}
    scheduled = cell.get("percentiles", {}).get("ttft_sched_s") or {"p95": None}
    return [
        number(cell.get("goodput_per_s")),
        interval(goodput) + (f" {INVALID}" if goodput.get("verdict") == INVALID else ""),
        number(cell.get("good_share"), 100, "{:.1f} %"),
        _kept(cell.get("slo_kept") or {}),
        number(cell.get("ttft_sched_s"), 1e3),
        number(scheduled["p95"], 1e3),
        number(cell["queue_s"], 1e3),
        number(cell["tpot_s"], 1e3),
        number(cell.get("requests_per_s")),
        number(cell.get("failed")),
    ]


def _kept(told: Report) -> str:
    """Per cent of all requests, for each limit; a dash where there is none."""
    shares = ((told.get(name) or {"share": None})["share"] for name in LIMITS)
    shown = [number(share, 100, "{:.3g}") for share in shares]
    return " / ".join(shown) if {*shown} - {DASH} else DASH
