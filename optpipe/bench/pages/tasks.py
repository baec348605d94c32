"""What the user's tasks said of every artifact, as rows for report.md, report.html and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.pages.view import DASH, names, number

HEADER = ("artifact", "task", "metric", "value", "std error", "documents", "to right", "to wrong",
          "McNemar p")  # fmt: skip
READ = (
    "Each document is held against the same document of the baseline: so many became right, so "
    "many wrong. McNemar's exact test asks whether both are equally likely. A metric that is not "
    "right or wrong for a document has neither."
)
Report = Mapping[str, Any]


def rows(report: Report) -> Iterator[list[str]]:
    """One for every metric of every task of every artifact; none where no tasks were run."""
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        found = artifact.get("evaluation") or {}
        changes = found.get("changes") or {}
        for task, of in (found.get("tasks") or {}).items():
            for metric, told in of["metrics"].items():
                yield [
                    name, task, metric, number(told["value"], 1, "{:.4f}"),
                    number(told["stderr"], 1, "{:.4f}"), str(of["documents"]),
                    *_changes(changes.get(task, {}).get(metric)),
                ]  # fmt: skip


def values(artifact: Report) -> dict[str, float]:
    """'TASK.METRIC' -> its value, for a table with a row for every artifact."""
    tasks = (artifact.get("evaluation") or {}).get("tasks") or {}
    return {
        f"{task}.{metric}": told["value"]
        for task, of in tasks.items()
        for metric, told in of["metrics"].items()
    }


def _changes(found: Report | None) -> tuple[str, str, str]:
    if found is None:
        return DASH, DASH, DASH
    return (
        str(found["became_right"]),
        str(found["became_wrong"]),
        number(found["mcnemar_p"], 1, "{:.2g}"),
    )
