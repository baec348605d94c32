"""When to begin counting and when to stop: warm-up truncation, looks at the data, their level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from optpipe.bench.evidence.statistics import LEVEL, Floats

BATCH = 5
LEFT = 4
"""Values that must remain for them to be a state."""
STEP, MAD_SD = 6.0, 1.4826
"""Standard deviations that a start is above what follows; one of them in median deviations. Of 24
values that drift (autocorrelation 0.75) and do not leap, 4.7 % were cut at 4, 1.9 % are at 6."""
FALSE_CUT, ORDERS = 0.01, 10_000
"""How often a steady series is cut, and how many random orders tell what that takes."""


def looks(first: int, last: int) -> tuple[int, ...]:
    """Block counts at which it may stop: doubling from ``first`` (20, 40, 80, 160), then ``last``.

    >>> looks(12, 24)
    (12, 24)
    """
    counts = [first]
    while 2 * counts[-1] < last:
        counts.append(2 * counts[-1])
    return (*counts, last) if last > counts[-1] else tuple(counts)


def level(number_of_looks: int, overall: float = LEVEL) -> float:
    """Level of each look such that all of them together keep ``overall`` (Bonferroni).

    Pocock's constant (1 - 0.018 for four looks) presumes looks at equal distances; ours double,
    and a bound that holds whatever the distances costs 4 % of width.
    """
    return 1 - (1 - overall) / number_of_looks


def truncation(values: Sequence[float], batch: int = BATCH) -> int:
    """How many leading values are warm-up, by MSER-5 (White, Cobb and Spratt 2000).

    Cuts where the standard error of what remains is least, at most half of the batches; fewer
    than four batches are taken singly.
    """
    size = batch if len(values) >= 4 * batch else 1
    usable = len(values) // size * size
    means = np.asarray(values[len(values) - usable :], dtype=np.float64).reshape(-1, size).mean(1)
    if len(means) < 4:
        return 0
    errors = [means[cut:].var() / (len(means) - cut) for cut in range(len(means) // 2 + 1)]
    cut = int(np.argmin(errors))
    return 0 if cut == 0 else len(values) - usable + cut * size


def settled(values: Sequence[float], within: float = 0.02) -> bool:
    """Whether warm-up is over: MSER cuts less than a third, or the last five medians agree.

    The medians are of three values each, so that this takes seven; MSER is asked from six on.
    """
    if len(values) >= 6 and truncation(values, 1) < len(values) / 3:
        return True
    medians = [float(np.median(values[i : i + 3])) for i in range(len(values) - 2)][-BATCH:]
    return len(medians) == BATCH and max(medians) <= (1 + within) * min(medians)


def late_start(values: Sequence[float]) -> int:
    """How many leading values belong to another, slower state, such as before a JIT compiled.

    The change point of Pettitt (1979, Applied Statistics 28) on ranks, which a burst does not move:
    0 unless what is before it ranks above what is after it as chance does it in one of a hundred
    orders of the same values. Where there is one, it lies where both parts are nearest to their
    medians, STEP times further apart than values after it scatter: neighbours that resemble each
    other drift, but do not leap.
    """
    z = _steps(np.argsort(np.argsort(values))[None])[0]
    if not len(z) or z.max() < _critical(len(values)):
        return 0
    array = np.asarray(values, dtype=np.float64)
    apart = [_scatter(array[:cut]) + _scatter(array[cut:]) for cut in range(1, len(z) + 1)]
    cut = int(np.argmin(apart)) + 1
    after = float(np.median(array[cut:]))
    leap = float(np.median(array[:cut])) - after
    return cut if leap > STEP * MAD_SD * float(np.median(np.abs(array[cut:] - after))) else 0


def _scatter(values: Floats) -> float:
    return float(np.abs(values - np.median(values)).sum())


def _steps(ranks: NDArray[np.int64]) -> Floats:
    """(rows, cuts): by how many standard deviations the head before each cut ranks too high."""
    n = ranks.shape[1]
    cuts = np.arange(1, n - LEFT + 1)
    excess = np.cumsum(ranks + 1.0, axis=1)[:, : len(cuts)] - cuts * (n + 1) / 2
    steps: Floats = excess / np.sqrt(cuts * (n - cuts) * (n + 1) / 12)
    return steps


@lru_cache(maxsize=256)
def _critical(n: int) -> float:
    """What the largest step of n values in random order reaches in less than FALSE_CUT."""
    ranks = np.random.default_rng(n).permuted(np.tile(np.arange(n), (ORDERS, 1)), axis=1)
    largest = np.sort(_steps(ranks).max(1))
    # the next value above the quantile: ties must not make it more
    beyond = largest[largest > largest[-int(FALSE_CUT * ORDERS) - 1]]
    return float(beyond[0]) if len(beyond) else math.inf
