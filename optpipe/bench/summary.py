"""From all cells to what a user acts on: the crossover batch and a recommendation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from optpipe.bench.evidence.verdict import FASTER, INVALID

ACCEPTED = ("lossless", "near", "compressed")
"""Tiers of quality that may be recommended."""
Entry = dict[str, Any]


def crossover(cells: Sequence[Mapping[str, Any]]) -> Entry:
    """The first batch of a sweep at which the whole interval of tokens/s lies below the baseline.

    null, with the reason, where there is no sweep or it never happens. Batches whose ratio is
    INVALID are left out.
    """
    sweeps: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        sweeps[cell["scenario"], cell["prompt_tokens"]].append(cell)
    sweep = max(sweeps.values(), key=lambda of: len({cell["batch"] for cell in of}), default=[])
    batches = sorted({cell["batch"] for cell in sweep})
    if len(batches) < 2:
        return {"scenario": None, "batch": None, "reason": "no scenario has two batch sizes",
                "reasons": {"scenario": "no sweep", "batch": "no sweep"}}  # fmt: skip
    found: Entry = {"scenario": sweep[0]["scenario"], "batch": None, "reasons": {}}
    told = [c for c in sorted(sweep, key=lambda c: int(c["batch"])) if _interval(c) is not None]
    void = "".join(f"; INVALID at batch {c['batch']}" for c in told if _is_invalid(c))
    told = [cell for cell in told if not _is_invalid(cell)]
    slower = [_interval(cell)[1] < 1 for cell in told]
    for at, cell in enumerate(told):
        if all(slower[at:]):
            return {
                **found,
                "batch": cell["batch"],
                "reason": f"tokens/s: slower from here on{void}",
            }
    why = f"tokens/s: not shown to be slower at any batch of {batches}{void}"
    return {**found, "reason": why, "reasons": {"batch": why}}


def _interval(cell: Mapping[str, Any]) -> Any:
    return cell["speedup"]["tokens_per_s"]["ci"]


def _is_invalid(cell: Mapping[str, Any]) -> bool:
    return bool(cell["speedup"]["tokens_per_s"].get("verdict") == INVALID)


def recommendation(artifacts: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """For each verdict on speed: the fastest artifact that is good enough.

    One cell of a scenario is named by the scenario alone, more of them by what tells them apart.
    """
    found: list[tuple[Mapping[str, Any], str, Entry]] = []
    baseline, *others = [entry for entry in artifacts if entry["role"] != "endpoint"]
    for index, cell in enumerate(baseline["cells"]):
        deciding = {
            metric
            for artifact in others
            for metric, speedup in artifact["cells"][index]["speedup"].items()
            if metric != "peak_bytes" and "p_holm" in speedup
        }
        for metric in sorted(deciding):
            found.append((cell, metric, _best(baseline, others, index, metric)))
    of = Counter(cell["scenario"] for cell, _, _ in found)
    return [{"scenario": _named(cell, metric, of), **entry} for cell, metric, entry in found]


def _named(cell: Mapping[str, Any], metric: str, of: Counter[str]) -> str:
    name: str = cell["scenario"]
    if of[name] == 1:
        return name
    return f"{name} {cell['batch']} x {cell['prompt_tokens']}, {metric}"


def _best(
    baseline: Mapping[str, Any], others: Sequence[Mapping[str, Any]], index: int, metric: str
) -> Entry:
    """By the lower end of the interval, so that a wide one does not win by chance."""
    faster = {
        artifact["name"]: speedup["ci"][0]
        for artifact in others
        if (speedup := artifact["cells"][index]["speedup"][metric])["verdict"] == FASTER
    }
    tiers = {artifact["name"]: artifact["quality"].get("tier") for artifact in others}
    good = {name: low for name, low in faster.items() if tiers[name] in ACCEPTED}
    if good:
        best = max(good, key=lambda name: good[name])
        why = f"{metric}: FASTER, at least {good[best]:.2f} times; quality is {tiers[best]}"
        return {"artifact": best, "why": why}
    if faster:
        refused = ", ".join(f"'{name}' ({tiers[name] or 'unknown'})" for name in faster)
        return {"artifact": baseline["name"], "why": f"faster but not good enough: {refused}"}
    verdicts = {a["cells"][index]["speedup"][metric]["verdict"] or "not measured" for a in others}
    why = f"{metric}: no artifact is shown to be faster ({', '.join(sorted(verdicts))})"
    return {"artifact": baseline["name"], "why": why}
