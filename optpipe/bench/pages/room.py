"""What it takes to have an artifact ready, as rows for report.md and report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.pages.view import DASH, names, number

START = ("artifact", "made s", "import s", "load s", "first request s", "starts",
         "the same, warm s")  # fmt: skip
MEMORY = ("artifact", "MB on disk", "MB of weights", "MB of the process", "MB of the GPU",
          "KV bytes/token", "KV tokens that fit", "rows at once")  # fmt: skip
READ = (
    "Made: the time of its stage alone, once. A start is a new process: importing the runtime (the "
    "least, since arms that stay loaded together import at once), loading, and a first request, "
    "that of the cheapest cell (medians). Files may lie in the page cache. None of it is in any "
    "warm number."
)
ROOM = (
    "Of the process: resident once it is loaded; of the GPU: what its driver says loading took. A "
    "token of one row takes so many bytes in the KV cache, all layers together; what fits is by "
    "itself, in 90 % of the memory that was free at first less what it takes loaded, or in what an "
    "engine reserves. Rows at once: of the longest cell, no more than the runtime takes."
)
Report = Mapping[str, Any]


def starts(report: Report) -> list[tuple[str, ...]]:
    """With START."""
    return [
        (name, number(artifact.get("made_s")), *_start(artifact.get("cold") or {}, artifact))
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
    ]


def memory(report: Report) -> list[tuple[str, ...]]:
    """With MEMORY."""
    return [
        (name, *_memory(artifact))
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
    ]


def _start(cold: Report, artifact: Report) -> Iterator[str]:
    for key in ("import_s", "load_s", "first_request_s"):
        yield number(cold.get(key))
    yield str(cold.get("starts", DASH))
    yield number(_warm(cold, artifact))


def _warm(cold: Report, artifact: Report) -> float | None:
    """The same request in the timed blocks, if it is a cell of its own."""
    asked = cold.get("request")
    alike = (c["e2e_s"] for c in artifact["cells"] if asked and "arrivals" not in c
             and all(c[name] == asked[name] for name in asked))  # fmt: skip
    found: float | None = next(alike, None)
    return found


def _memory(artifact: Report) -> Iterator[str]:
    for key in ("bytes", "weight_bytes", "host_bytes", "device_bytes"):
        yield number(artifact.get(key), 1e-6, "{:.1f}")
    kv = artifact.get("kv_cache") or {}
    yield number(kv.get("bytes_per_token"), 1, "{:,}")
    yield number(kv.get("capacity_tokens"), 1, "{:,}")
    longest = max(artifact["cells"], key=lambda cell: cell["prompt_tokens"] + cell["new_tokens"])
    yield number(longest.get("max_sequences"), 1, "{:,}")
