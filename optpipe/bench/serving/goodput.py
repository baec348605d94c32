"""Requests that kept an objective: how many, and a second against the baseline's, as a ratio.

Whether a request was good says little by itself, so that the interval needs many blocks: it is a
bootstrap of blocks and of the requests inside them, at least as wide as processes make it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from optpipe.bench.evidence.processes import ONE_PROCESS, Level, Processes
from optpipe.bench.evidence.resampling import FEWEST_BLOCKS, hierarchical
from optpipe.bench.policy import BenchConfig
from optpipe.bench.serving.request import LIMITS, seconds
from optpipe.bench.serving.serve import Served
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import Set, set_of

NONE_GOOD = "no request of {} kept the objective"
RARELY_GOOD = "too few requests kept the objective for an interval"
NO_LIMIT = "the objective has no such limit"
NONE_SENT = "no request was sent"
PROVEN = 0.99
NONE = 0.5
"""Good requests that a process without one counts as."""
Floats = NDArray[np.float64]


def ratio(
    base: Sequence[Sample], own: Sequence[Sample], bench: BenchConfig, drawn: Processes
) -> dict[str, Any]:
    """Of sums over the blocks that both have: good requests by seconds, over the baseline's.

    ``ci`` is null for fewer than thirty blocks, and where nothing is known of what processes differ
    by (``drawn``, from `levels`). Failed requests are not good; their time counts.
    """
    before, after = _blocks(base), _blocks(own)
    shared = [place for place in before if place in after]
    if not shared:
        return _nothing("no block that both have", "ratio", "ci")
    pair = [_arrays([of[place] for place in shared]) for of in (before, after)]
    for name, (good, _) in zip(("the baseline", "this arm"), pair, strict=True):
        if not good.sum():
            return _nothing(NONE_GOOD.format(name), "ratio", "ci")
    (good, taken), (own_good, own_taken) = pair
    value = float(own_good.sum() / own_taken.sum() / (good.sum() / taken.sum()))
    if len(shared) < FEWEST_BLOCKS:
        why = f"{len(shared)} paired blocks; a bootstrap needs {FEWEST_BLOCKS}"
        return {**_nothing(why, "ci"), "ratio": value}
    if not drawn.df:
        return {**_nothing(ONE_PROCESS, "ci"), "ratio": value}
    both = (good, own_good), (taken, own_taken)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw without a good request
        low, high = np.exp(hierarchical(*both, bench.seed, bench.level, drawn))
    if not np.isfinite([low, high]).all() or low <= 0:
        return {**_nothing(RARELY_GOOD, "ci"), "ratio": value}
    return {"ratio": value, "ci": [float(low), float(high)], "reasons": {}}


def levels(arms: Mapping[str, Sequence[Sample]]) -> list[Level]:
    """The log of the goodput of every process; none counts as half a request, which tells processes
    further apart than leaving it out."""
    found: list[Level] = []
    for arm, samples in arms.items():
        sets: dict[Set, list[Served]] = defaultdict(list)
        for sample in samples:
            if sample.served is not None:
                sets[set_of(sample)].append(sample.served)
        for which, blocks in sets.items():
            good, taken = _arrays(blocks)
            rate = max(float(good.sum()), NONE) / float(taken.sum())
            found.append((arm, which, math.log(rate), len(blocks)))
    return found


def kept(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many requests kept each limit of an objective, and all of them ('good').

    ``share`` is of the requests of all blocks; with a confidence of ``PROVEN`` no fewer than
    ``at_least`` would: .99 for 459 of 459, the rule of MLPerf. null where there is no such limit.
    """
    served = [sample.served for sample in samples if sample.served is not None]
    each = [r.kept(of.objective) | {"good": r.good(of.objective)}
            for of in served for r in of.requests]  # fmt: skip
    names = (*LIMITS, "good")
    counts = {name: [one[name] for one in each if name in one] for name in names}
    why = NO_LIMIT if each else NONE_SENT
    return {
        "requests": len(each),
        **{name: _proven(sum(of), len(of)) if of else None for name, of in counts.items()},
        "reasons": {name: why for name, of in counts.items() if not of},
    }


def _proven(count: int, of: int) -> dict[str, float]:
    """Clopper and Pearson's lower bound."""
    low = float(betaincinv(count, of - count + 1, 1 - PROVEN)) if count else 0.0
    return {"share": count / of, "at_least": low}


def _blocks(samples: Sequence[Sample]) -> Mapping[tuple[int, int, int], Served]:
    return {(s.session, s.block, s.iteration): s.served for s in samples if s.served is not None}


def _arrays(blocks: Sequence[Served]) -> tuple[Floats, Floats]:
    """(blocks, requests): 1 where it was good, and its equal share of the seconds of its block."""
    good = np.array([[r.good(of.objective) for r in of.requests] for of in blocks], dtype=float)
    taken = np.array([seconds(of.requests) for of in blocks]) / good.shape[1]
    return good, np.repeat(taken[:, None], good.shape[1], axis=1)


def _nothing(why: str, *keys: str) -> dict[str, Any]:
    return {**dict.fromkeys(keys), "reasons": dict.fromkeys(keys, why)}
