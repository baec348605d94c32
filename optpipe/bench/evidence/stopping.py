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
LEAP, MAD_SD = 5.0, 1.4826
"""Standard deviations of neighbours that a start is apart from what follows; one of them in median
deviations."""
FALSE_CUT, ORDERS, ORDERED = 0.01, 10_000, 1_000_000
"""How often a steady series is cut, how many random orders tell what that takes, and of how many
values in all."""


def looks(first: int, last: int) -> tuple[int, ...]:
    """Counts at which it may stop: doubling from ``first`` (20, 40, 80, 160), then ``last``.

    >>> looks(2, 2), looks(4, 8), looks(3, 9)
    ((2,), (4, 8), (3, 6, 9))
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


def late_start(values: Sequence[float], leap: float = LEAP) -> int:
    """How many leading values belong to another state, such as before a JIT compiled.

    Higher or lower: of a ratio, either of the two may have started late. ``leap``: by how many
    standard deviations of neighbours it has to be apart.
    """
    array = np.asarray(values, dtype=np.float64)
    return max(_head(array, leap), _head(-array, leap))


def _head(values: Floats, leap: float) -> int:
    """How many leading values are above the others because they came first.

    The change point of Pettitt (1979, Applied Statistics 28) on ranks, which a burst does not move:
    0 unless what is before it ranks above what is after it as chance does it in one of a hundred
    orders of the same values. Where there is one, it lies where both parts are nearest to their
    medians, ``leap`` times further apart than neighbours in the later half: neighbours that
    resemble each other drift, but do not leap. A start that decays ends later than its best step:
    it lasts until a value is no higher than half of those that follow.
    """
    z = _steps(np.argsort(np.argsort(values))[None])[0]
    if not len(z) or z.max() < _critical(len(values)):
        return 0
    apart = [_scatter(values[:cut]) + _scatter(values[cut:]) for cut in range(1, len(z) + 1)]
    cut = int(np.argmin(apart)) + 1
    steps = np.abs(np.diff(values))  # those of a decay are larger, and may be most
    noise = MAD_SD * float(min(np.median(steps), np.median(steps[len(steps) // 2 :])))
    if np.median(values[:cut]) - np.median(values[cut:]) <= leap * noise:
        return 0
    while values[cut] > np.median(values[cut:]) + noise / 2:
        cut += 1
    return cut


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
    orders = min(ORDERS, ORDERED // n)
    ranks = np.random.default_rng(n).permuted(np.tile(np.arange(n), (orders, 1)), axis=1)
    largest = np.sort(_steps(ranks).max(1))
    # the next value above the quantile: ties must not make it more
    beyond = largest[largest > largest[-int(FALSE_CUT * orders) - 1]]
    return float(beyond[0]) if len(beyond) else math.inf
