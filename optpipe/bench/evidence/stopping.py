"""When to begin counting and when to stop: warm-up truncation, looks at the data, their level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optpipe.bench.evidence.statistics import LEVEL

BATCH = 5
Z_STEP = 3.3
"""A head that ranks this many standard deviations above the rest is no accident (p = 0.0005)."""


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

    The change point of Pettitt (1979, Applied Statistics 28) in the first half, on ranks, which a
    burst does not move: 0 unless what is before it ranks clearly above what is after it.
    """
    n = len(values)
    cuts = np.arange(1, n // 2 + 1)
    if not len(cuts):
        return 0
    ranks = np.argsort(np.argsort(values)) + 1.0
    excess = np.cumsum(ranks)[: len(cuts)] - cuts * (n + 1) / 2
    z = excess / np.sqrt(cuts * (n - cuts) * (n + 1) / 12)
    return int(cuts[z.argmax()]) if z.max() > Z_STEP else 0
