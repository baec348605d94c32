"""Percentiles with their bounds, or why the sample is too small for them.

The bounds are for the processes that were timed; what others differ by is in ratios only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optpipe.bench.evidence.statistics import (
    LEVEL,
    fewest_samples,
    percentile,
    percentile_interval,
)
from optpipe.bench.serving.request import pooled
from optpipe.bench.timed.clock import ONE_TOKEN
from optpipe.bench.timed.series import Turns

PERCENTILES = (50, 95, 99)
OF_REQUESTS = ("ttft_s", "ttft_sched_s", "itl_s", "icl_s")
Entry = dict[str, Any]


def percentiles(own: Turns | None, why: str) -> Entry:
    """Of iterations; of a server's requests, where one that failed is infinitely late.

    ``itl_s`` are the gaps between tokens. Only a server sends several in a chunk, whose gap then is
    shared out; ``icl_s`` are the gaps between chunks as they are.
    """
    served = [s.served for s in own.samples if s.served is not None] if own else []
    if served:
        each = [pooled(one.requests) for one in served]
        values = {k: [v for one in each for v in one[k]] for k in OF_REQUESTS}
    else:
        values = {"ttft_s": own.values("ttft_s") if own else [], "itl_s": _gaps(own) if own else []}
    unsplit = {"itl_s": ONE_TOKEN, "icl_s": ONE_TOKEN}
    return {k: bounded(of, why or unsplit.get(k, "")) for k, of in values.items()}


def _gaps(own: Turns) -> list[float]:
    """Between every two tokens of every iteration, seconds."""
    gaps = [np.diff(np.array(s.token_ns)) / 1e9 for s in own.samples if s.metrics["e2e_s"]]
    return [] if not gaps else np.concatenate(gaps).tolist()


def bounded(values: list[float], why: str) -> Entry:
    """Each with its bounds; null where the sample is too small to bound it.

    A request that failed is infinitely late: a percentile with one of them at its bound is null.
    """
    found: Entry = {}
    reasons: dict[str, str] = {}
    bounds: dict[str, list[float]] = {}
    ranked = np.sort(np.asarray(values, dtype=np.float64))
    failed = int(np.isinf(ranked).sum())
    for q in PERCENTILES:
        within = percentile_interval(ranked, q)
        if within is not None and not np.isfinite(within[1]):
            within = None
            reasons[f"p{q}"] = f"{failed} of {len(values)} requests failed: nothing bounds it"
        elif within is None:
            needed = max(fewest_samples(q), fewest_samples(100 - q))
            few = f"{len(values)} samples; {needed} are the fewest that bound it at {LEVEL:.0%}"
            reasons[f"p{q}"] = few if values else why
        found[f"p{q}"] = percentile(ranked, q) if within else None
        if within is not None:
            bounds[f"p{q}"] = list(within)
    return {**found, "ci": bounds, "samples": len(values), "reasons": reasons}
