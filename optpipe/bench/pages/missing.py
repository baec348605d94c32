"""Every number that a report does not have, and why: each reason once, with all it explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optpipe.bench.pages.view import DASH, METRICS, Entry, names

HEADER = ("reason", "numbers", "of", "in")
MOST = 6
"""Names in one field of a table; the others are counted."""


class Missing(NamedTuple):
    """One number that is not there; ``cell`` is empty where it belongs to no cell."""

    artifact: str
    cell: str
    key: str
    why: str


def rows(report: Entry) -> list[tuple[str, str, str, str]]:
    """A row of HEADER for every reason there is."""
    found: dict[str, list[Missing]] = {}
    for one in reasons(report):
        found.setdefault(one.why, []).append(one)
    artifacts, cells = len(report["artifacts"]), len(report["artifacts"][0]["cells"])
    return [
        (
            why,
            _some([METRICS.get(one.key, one.key) for one in of], 0, ""),
            _some([one.artifact for one in of], artifacts, "all artifacts"),
            _some([one.cell for one in of if one.cell], cells, "all cells") or DASH,
        )
        for why, of in found.items()
    ]


def reasons(report: Entry) -> Iterator[Missing]:
    """Everything with a reason; of ratios only those of a metric that was measured."""
    for key, why in _reasons(report["run"], ("bench", "scenarios")):
        yield Missing("the run", "", key, why)
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        for key, why in _reasons(artifact, ("cells", "stats")):
            yield Missing(name, "", key, why)
        for cell in artifact["cells"]:
            at = f"{cell['scenario']} {cell['batch']} \u00d7 {cell['prompt_tokens']}"
            for key, why in _reasons(cell, ("speedup",)):
                yield Missing(name, at, key, why)
            for key, speedup in cell["speedup"].items():
                if speedup["ratio"] is None and cell.get(key) is not None:
                    ratio = f"{METRICS.get(key, key)} \u00d7"
                    yield Missing(name, at, ratio, speedup["reasons"]["ratio"])


def _reasons(node: Any, without: Sequence[str]) -> Iterator[tuple[str, str]]:
    if isinstance(node, list):
        for item in node:
            yield from _reasons(item, ())
    elif isinstance(node, Mapping):
        yield from (node.get("reasons") or {}).items()
        for key, inner in node.items():
            if key not in without and key != "reasons":
                yield from _reasons(inner, ())


def _some(found: Sequence[str], every: int, all_of_them: str) -> str:
    """Different ones, at most ``MOST`` by name; in one word if it is ``every`` one of several."""
    different = [*dict.fromkeys(found)]
    if len(different) == every > 1:
        return all_of_them
    more = f" and {len(different) - MOST} more" if len(different) > MOST else ""
    return ", ".join(different[:MOST]) + more
