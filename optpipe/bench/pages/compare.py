"""Two reports side by side: what changed between two runs, and how little that may mean.

Nothing here is a verdict of the kind a run gives: arms of two runs were never interleaved, and
arms timed one after the other "differ" by the drift of the machine alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench import machine
from optpipe.bench.evidence.verdict import INVALID
from optpipe.bench.pages.view import METRICS, interval, number, where

Report = Mapping[str, Any]
SPEEDS = ("ttft_s", "tpot_s", "e2e_s", "tokens_per_s")
POINT = ("scenario", "batch", "prompt_tokens", "new_tokens")
NOT_INTERLEAVED = (
    "not interleaved: the two runs came one after the other, so a ratio of times holds the drift "
    "of the machine too; put both artifacts into one run for a verdict"
)
UNCONTROLLED = "uncontrolled: the two runs differ in {}; no verdict is possible"


def compare(before: Report, after: Report) -> dict[str, Any]:
    """Ratios of ``after`` to ``before`` for all artifacts of one name; above 1 is better.

    ``controlled`` is whether machine, versions and threads are the same. Only then ``change`` says
    whether the intervals of the two speed-ups, each over its own baseline, are disjoint; else it is
    null, as it is where one of them is INVALID (``invalid``: why). What one report alone has is
    listed by name.
    """
    differ = differences(before, after)
    old = {artifact["name"]: artifact for artifact in before["artifacts"]}
    new = {artifact["name"]: artifact for artifact in after["artifacts"]}
    return {
        "controlled": not differ,
        "differences": differ,
        "note": UNCONTROLLED.format(", ".join(differ)) if differ else NOT_INTERLEAVED,
        "same_text": _text(before) == _text(after),
        "only_before": [name for name in old if name not in new],
        "only_after": [name for name in new if name not in old],
        "artifacts": [
            _artifact(old[name], artifact, not differ)
            for name, artifact in new.items()
            if name in old
        ],
    }


def differences(before: Report, after: Report) -> list[str]:
    """What about the environment of the two runs is not the same."""
    left, right = before["run"], after["run"]
    here, there = machine.lasting(left["machine"]), machine.lasting(right["machine"])
    found = [f"machine.{key}" for key in here if here[key] != there[key]]
    names = sorted({*left["versions"], *right["versions"]})
    found += [n for n in names if left["versions"].get(n) != right["versions"].get(n)]
    found += [key for key in ("threads", "seed") if left[key] != right[key]]
    old_prompts, new_prompts = _prompts(left), _prompts(right)
    asked = old_prompts.keys() & new_prompts.keys()
    found += ["prompts"] if any(old_prompts[p] != new_prompts[p] for p in asked) else []
    shared = sorted(left["scenarios"].keys() & right["scenarios"].keys())
    found += [f"scenario.{n}" for n in shared if left["scenarios"][n] != right["scenarios"][n]]
    old = {artifact["name"]: artifact for artifact in before["artifacts"]}
    twins = [(old[new["name"]], new) for new in after["artifacts"] if new["name"] in old]
    return found + [
        f"{key} of {new['name']}"
        for a, new in twins
        for key in ("device", "dtype", "decoding")
        if key in a and key in new and a[key] != new[key]  # older reports do not say how
    ]


def _prompts(run: Report) -> dict[tuple[object, ...], object]:
    """What was asked at each point, as a hash."""
    return {tuple(p[key] for key in POINT): p["ids_hash"] for p in run["design"]["prompts"]}


def _text(report: Report) -> object:
    """What perplexity was measured on."""
    return report["run"]["design"]["quality"].get("ids_hash")


def _artifact(old: Report, new: Report, controlled: bool) -> dict[str, Any]:
    cells = {tuple(cell[key] for key in POINT): cell for cell in old["cells"]}
    return {
        "name": new["name"],
        "same_key": old["key"] == new["key"],
        "bytes": [old["bytes"], new["bytes"]],
        "perplexity": [old["quality"]["perplexity"], new["quality"]["perplexity"]],
        "kl_mean": [old["quality"]["kl_mean"], new["quality"]["kl_mean"]],
        "cells": [
            _cell(cells[point], cell, controlled)
            for cell in new["cells"]
            if (point := tuple(cell[key] for key in POINT)) in cells
        ],
    }


def _cell(old: Report, new: Report, controlled: bool) -> dict[str, Any]:
    return {
        **{key: new[key] for key in POINT},
        "metrics": {key: _metric(key, old, new, controlled) for key in SPEEDS},
    }


def _metric(key: str, old: Report, new: Report, controlled: bool) -> dict[str, Any]:
    """The raw ratio, and the speed-up over its own baseline in each run with its interval."""
    flip = key == "tokens_per_s"
    ratio = _ratio(new[key], old[key]) if flip else _ratio(old[key], new[key])
    left, right = old["speedup"][key], new["speedup"][key]
    return {
        "unit": "1/s" if flip else "s",
        "before": old[key],
        "after": new[key],
        "ratio": ratio,
        "speedup_before": left["ratio"],
        "speedup_before_ci": left["ci"],
        "speedup_after": right["ratio"],
        "speedup_after_ci": right["ci"],
        "change": _change(left, right) if controlled else None,
        "invalid": next(
            (of["reason"] for of in (left, right) if of.get("verdict") == INVALID), None
        ),
    }


def _change(before: Report, after: Report) -> str | None:
    """Speed-ups were paired each in its run: they are what two runs may be compared by. None where
    one of them is INVALID."""
    if INVALID in (before.get("verdict"), after.get("verdict")):
        return None
    left, right = before["ci"], after["ci"]
    if left is None or right is None:
        return "no interval"
    if right[0] > left[1]:
        return "better over its baseline"
    return "worse over its baseline" if right[1] < left[0] else "intervals overlap"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def text(found: Mapping[str, Any]) -> Iterator[str]:
    """The comparison as lines for a terminal: before -> after, and the ratio (above 1: better)."""
    yield found["note"]
    for side in ("before", "after"):
        if alone := found[f"only_{side}"]:
            yield f"only {side}: {', '.join(alone)}"
    for artifact in found["artifacts"]:
        yield f"\n{artifact['name']}: {'the same' if artifact['same_key'] else 'another'} artifact"
        for key in ("bytes", "perplexity"):
            old, new = artifact[key]
            other = "" if key == "bytes" or found["same_text"] else ", of other text"
            yield f"  {key:10} {number(old)} -> {number(new)}{other}"
        for cell in artifact["cells"]:
            yield f"  {where(cell)}"
            both = {k: m for k, m in cell["metrics"].items() if m["ratio"] is not None}
            for key, metric in both.items():
                yield f"    {METRICS[key]:10} {_line(metric, found['controlled'])}"
            if not both:
                yield "    nothing that both have measured"


def _line(metric: Mapping[str, Any], controlled: bool) -> str:
    before, after = (
        interval({"ratio": metric[f"speedup_{side}"], "ci": metric[f"speedup_{side}_ci"]})
        for side in ("before", "after")
    )
    paired = metric["speedup_before_ci"] or metric["speedup_after_ci"]
    over = f"; over its baseline {before} -> {after}" if paired else ""
    unit = "{:.3f} ms" if metric["unit"] == "s" else "{:.1f}/s"
    scale = 1e3 if metric["unit"] == "s" else 1
    times = " -> ".join(number(metric[side], scale, unit) for side in ("before", "after"))
    end = metric["change"] if controlled else "uncontrolled"
    end = f"INVALID ({metric['invalid']})" if metric["invalid"] else end
    return f"{times}, {metric['ratio']:.3f}x{over}: {end}"
