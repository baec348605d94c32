"""What report.json may hold: the JSON Schema beside this file, and a reason for every null."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schema.json")
GIVEN = ("bench", "scenarios", "stats", "slo")
"""What the user set and what a stage told: a null there is a value, not a missing number."""
ESTIMATED = ("ratio", "ci")
"""Keys that the ``reason`` of a verdict does not explain."""
MAY_BE_THERE = ("blocks", "windows")
"""Counts, whose reason says why they are not larger."""


@cache
def load() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    schema: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return schema


def check(report: Mapping[str, Any]) -> None:
    """Raise ValueError, which names the place, unless the report is one of this version."""
    for problem in problems(report):
        raise ValueError(f"not a report of '{load()['$id']}': {problem}")


def problems(report: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong, one line each."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    for error in Draft202012Validator(load()).iter_errors(report):
        deepest = best_match([error]) or error
        yield f"{deepest.json_path}: {deepest.message[:200]}"
    yield from unexplained(report)


def unexplained(
    node: object, path: str = "$", outer: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Every null without a reason, and every 0 that has one: it should be null.

    The reason of ``key`` is ``reasons[key]`` in the same object, or its ``reason`` if the key is
    no estimate. An object without ``reasons`` may have them in those around it (``outer``), for
    each of its keys or as a whole.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from unexplained(item, f"{path}[{index}]", outer)
    if not isinstance(node, dict):
        return
    reasons = node.get("reasons", outer) or {}
    known = _explained(node, path.rpartition(".")[2].partition("[")[0], outer or {})
    for key, value in node.items():
        if value is None and key not in {*known, *reasons}:
            yield f"{path}.{key}: null without a reason"
        elif value == 0 and value is not False and key in {*reasons} - {*MAY_BE_THERE}:
            yield f"{path}.{key}: 0, though it is undefined: {reasons[key]}"
        elif key not in GIVEN:
            yield from unexplained(value, f"{path}.{key}", reasons)


def _explained(node: Mapping[str, Any], name: str, outer: Mapping[str, str]) -> set[str]:
    """The keys that need no entry in ``reasons``, of an object that is called ``name``."""
    if name in outer:
        return {*node}
    return {"reason", *node} - {*ESTIMATED} if node.get("reason") else {"reason"}
