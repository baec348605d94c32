"""Bootstrap intervals, for what the signed rank cannot give: ratios of sums.

They cover too little below thirty blocks, so that they only ever stand beside an exact interval.
"""

from __future__ import annotations

import numpy as np

from optpipe.bench.evidence.processes import Processes
from optpipe.bench.evidence.statistics import LEVEL, Floats, Interval

FEWEST_BLOCKS = 30
REPEATS, FEWEST_REPEATS = 10_000, 1_000
DRAWS, CHUNK = 40_000_000, 2_000_000
"""Values drawn in all, which large samples reach before REPEATS, and at a time."""


def hierarchical(
    amounts: tuple[Floats, Floats],
    times: tuple[Floats, Floats],
    seed: int,
    level: float = LEVEL,
    processes: Processes | None = None,
) -> Interval:
    """Interval of the log-ratio of two throughputs; blocks are drawn, then requests inside them.

    ``amounts`` and ``times`` hold (blocks, requests) of the baseline and of the artifact. Both
    draw the same blocks, for what a block did to one it did to the other. With ``processes`` it
    reaches as far as these may have moved the ratio; infinite where that is not known.
    """
    blocks = len(amounts[0])
    if blocks < FEWEST_BLOCKS:
        raise ValueError(f"{blocks} blocks; a bootstrap of blocks needs {FEWEST_BLOCKS}")
    rng = np.random.default_rng([seed, blocks])
    found = []
    size = max(a.size for a in amounts)
    repeats, per_round = min(REPEATS, max(DRAWS // size, FEWEST_REPEATS)), max(1, CHUNK // size)
    for start in range(0, repeats, per_round):
        count = min(per_round, repeats - start)
        rows = rng.integers(0, blocks, (count, blocks))
        logs = [
            _throughput(amount, time, rows, rng)
            for amount, time in zip(amounts, times, strict=True)
        ]
        found.append(logs[1] - logs[0])
    low, high = _tails(np.concatenate(found), level)
    if processes is None:
        return low, high
    before, after = (float(np.log(a.sum() / t.sum())) for a, t in zip(amounts, times, strict=True))
    half = processes.half_width(level)
    return min(low, after - before - half), max(high, after - before + half)


def _throughput(
    amounts: Floats, times: Floats, rows: np.ndarray, rng: np.random.Generator
) -> Floats:
    """Log of sum over sum for each row of drawn blocks, requests drawn within each block."""
    requests = amounts.shape[1]
    cols = rng.integers(0, requests, (*rows.shape, requests))
    picked = rows[..., None], cols
    if np.ptp(amounts) == 0:  # any draw has the same amount
        drawn = np.full(len(rows), amounts.flat[0] * cols[0].size)
    else:
        drawn = amounts[picked].sum((1, 2))
    logs: Floats = np.log(drawn) - np.log(times[picked].sum((1, 2)))
    return logs


def _tails(values: Floats, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
