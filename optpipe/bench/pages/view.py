"""What tables and charts of report.html have in common: names, relations and how numbers look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Entry = Mapping[str, Any]
DASH = "\u2013"
"""For what is not there."""
METRICS = {"ttft_s": "TTFT", "queue_s": "queue", "prefill_s": "prefill", "tpot_s": "TPOT",
           "e2e_s": "end to end", "tokens_per_s": "tokens/s", "peak_bytes": "memory",
           "bytes": "size", "made_s": "time of making", "load_s": "load time",
           "goodput_per_s": "goodput", "icl_max_s": "longest gap",
           "user_tokens_per_s": "a user's tokens/s", "user_e2e_tokens_per_s": "... with TTFT",
           "decode_tokens_per_s": "decode tokens/s", "steady_tokens_per_s": "full batch tokens/s",
           "total_tokens_per_s": "all tokens/s", "requests_per_s": "requests/s",
           "prefill_tokens_per_s": "prompt tokens/s"}  # fmt: skip


def short(artifact: Mapping[str, Any]) -> str:
    """A baseline by its name, an artifact by the last of the stages that made it.

    In the report of a sweep it has a label, since several jobs have the same stages.
    """
    if "label" in artifact:
        return str(artifact["label"])
    return f"+ {artifact['stage']}" if artifact["lineage"] else str(artifact["name"])


def names(report: Entry) -> list[str]:
    """What artifacts are called in tables and charts: their number and their last stage."""
    return [f"{n} {short(artifact)}" for n, artifact in enumerate(report["artifacts"], 1)]


def where(cell: Entry) -> str:
    """A cell in words."""
    return (
        f"{cell['scenario']}: {cell['batch']} \u00d7 {cell['prompt_tokens']} tokens in, "
        f"{cell['new_tokens']} out"
    )


def interval(speedup: Entry, pattern: str = "{:.2f}") -> str:
    """6.80x [5.12, 8.44], or a dash."""
    if speedup["ratio"] is None:
        return DASH
    text = f"{pattern.format(speedup['ratio'])}\u00d7"
    ends = [pattern.format(end) for end in speedup["ci"] or ()]
    return f"{text} [{', '.join(ends)}]" if ends else text


def is_reference(report: Entry, artifact: Entry) -> bool:
    """The baseline in another dtype: nothing was made from it."""
    first = report["artifacts"][0]
    return not artifact["lineage"] and artifact is not first and artifact["key"] == first["key"]


def parent(report: Entry, artifact: Entry) -> Entry | None:
    """The artifact this one was made from, of the same job in a sweep; None for a baseline."""
    if not artifact["lineage"]:
        return None
    jobs = {*artifact.get("jobs", ())}
    made_from = (
        other
        for other in report["artifacts"]
        if other["lineage"] == artifact["lineage"][:-1]
        and (not jobs or jobs & {*other.get("jobs", ())})
    )
    return next(made_from, None)


def slower_from(artifact: Entry, scenario: str) -> int | None:
    """The batch size of a scenario from which on an artifact is slower, if one was found."""
    found = artifact.get("crossover") or {"scenario": None}
    batch: int | None = found["batch"] if found["scenario"] == scenario else None
    return batch


def breaks(report: Entry) -> Iterator[str]:
    """Where the run was killed and went on, in words."""
    for one in report["run"]["design"].get("resumed", ()):
        yield (
            f"The run was killed after {one['after_blocks']} blocks of all cells and went on "
            f"{one['pause_s']:.0f} s later, in new processes that were warmed up again; its "
            "intervals hold what the two parts differ by"
        )


def number(value: float | None, scale: float = 1, pattern: str | None = None) -> str:
    """A number as people read it, three digits unless there is a pattern, or a dash."""
    if value is None:
        return DASH
    shown = value * scale
    return three_digits(shown) if pattern is None else pattern.format(shown)


def three_digits(value: float) -> str:
    """12300, 123, 12.3, 1.23, 0.00123; 1.2e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def share(value: float | None) -> str:
    """A share in per cent, or a dash."""
    return number(value, 100, "{:.2f} %")
