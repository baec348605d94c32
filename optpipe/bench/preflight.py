"""What may spoil a measurement and was there before it began: checked, recorded, shown.

None of it makes a result INVALID by itself: load that is always there falls on all arms alike, and
what comes and goes taints its block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpipe.bench.nvml import SLOWED
from optpipe.bench.outcome import Outcome

Check = dict[str, Any]


def checks(host: Mapping[str, Any], outcome: Outcome) -> list[Check]:
    """{"check", "found", "wanted", "passed"} of each; ``host`` as `machine.describe` told it.

    A GPU that some arm ran on has four of its own. The self-test is missing where it was not run.
    """
    used = {told.gpu for told in outcome.loaded.values()}
    gpus = [gpu for gpu in host["gpus"] if gpu["uuid"] in used]
    return [*_host(host, outcome), *(one for gpu in gpus for one in _gpu(gpu))]


def _host(host: Mapping[str, Any], outcome: Outcome) -> Iterator[Check]:
    load, cores = host["load"][0], host["cores_usable"]
    yield _check("load", f"{load:.2f}", f"at most {cores}, the usable cores", load <= cores)
    squeezed = [n for n, why in outcome.left_out.items() if not why.startswith("not benchmarked")]
    apart = [*squeezed, *sorted(outcome.anchored)]
    yield _check(
        "free memory",
        f"{host['memory_available_bytes'] / 1e9:.1f} GB"
        + (f"; no room beside the baseline: {', '.join(apart)}" if apart else ""),
        "room for every arm beside the baseline",
        not apart,
    )
    devices = {told.device for told in outcome.loaded.values()}
    if len(devices) > 1:
        yield _check(
            "devices",
            "; ".join(f"{device}: {_on(outcome, device)}" for device in sorted(devices)),
            "one device for all: a ratio between two also compares them",
            False,
        )
    if outcome.instrument is not None:
        errors = {k: v for k, v in outcome.instrument.items() if k.endswith("_error")}
        yield _check(
            "self-test",
            ", ".join(f"{k.partition('_')[0].upper()} {v:+.2%}" for k, v in errors.items()),
            "known delays as planned",
            bool(outcome.instrument["passed"]),
        )


def _on(outcome: Outcome, device: str) -> str:
    return ", ".join(n for n, told in outcome.loaded.items() if told.device == device)


def _gpu(gpu: Mapping[str, Any]) -> Iterator[Check]:
    name = gpu["name"] or "GPU"
    if (others := gpu["processes"]) is not None:
        found = f"processes {', '.join(map(str, others))}" if others else "none"
        yield _check(f"{name}: others on it", found, "none", not others)
    if (limits := gpu["clocks_limited_by"]) is not None:
        slowed = [limit for limit in limits if limit in SLOWED.values()]
        yield _check(f"{name}: clocks", ", ".join(limits) or "free", "not slowed", not slowed)
    if gpu["mig"] is not None:
        shown = "on: a part of a GPU" if gpu["mig"] else "off"
        yield _check(f"{name}: MIG", shown, "off", not gpu["mig"])
    if gpu["memory_bytes"] and gpu["memory_used_bytes"] is not None:
        share = gpu["memory_used_bytes"] / gpu["memory_bytes"]
        yield _check(f"{name}: memory in use", f"{share:.1%}", "at most 5 %", share <= 0.05)


def _check(name: str, found: str, wanted: str, passed: bool) -> Check:
    return {"check": name, "found": found, "wanted": wanted, "passed": passed}
