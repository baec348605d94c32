"""Blocks that were still warm-up for some arm, found once they are timed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from optpipe.bench.evidence.statistics import median
from optpipe.bench.evidence.stopping import LEAP, late_start
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import Place, Set, collect, relative, set_of

SHOWN = 0.7
"""Of the height of a start in the mean of several sets, what each of them shows."""
WHOLE = (None, "warmup")


def late(samples: Sequence[Sample]) -> dict[Set, int]:
    """Of one cell in one session: the last late block of each set of processes; -1: it has none.

    Every set is looked at by its blocks alone, and with the warm-up, where a start that lasts into
    them began; and all sets together, iteration by iteration, as what a process does when it
    starts, the next one does, too. Without disturbed blocks.
    """
    sets = _sets(samples)
    found = dict.fromkeys(sets, -1)
    blocks = [{one: _relative(own, (None,))} for one, own in sets.items()]
    whole = {one: _relative(own, WHOLE) for one, own in sets.items()}
    together = [whole] if len(whole) > 1 else []
    for group in (*blocks, *({one: of} for one, of in whole.items()), *together):
        for one, block in _starts(group):
            found[one] = max(found[one], block)
    return found


def longest(samples: Sequence[Sample]) -> int:
    """Iterations, those of the warm-up among them, that the start of any process lasted; 0: none
    is seen.
    """
    whole = [_relative(own, WHOLE) for own in _sets(samples).values()]
    return max((late_start([*of.values()]) for one in whole for of in one.values()), default=0)


def _sets(samples: Sequence[Sample]) -> Mapping[Set, list[Sample]]:
    found: dict[Set, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[set_of(sample)].append(sample)
    return found


def _starts(group: Mapping[Set, Mapping[str, Mapping[Place, float]]]) -> Iterator[tuple[Set, int]]:
    """The last block of the start of every arm that has one, in each of these sets."""
    for arm in {arm for of in group.values() for arm in of}:
        own = {one: of[arm] for one, of in group.items() if arm in of}
        if count := _start([[*of.values()] for of in own.values()]):
            for one, of in own.items():
                yield one, [*of][min(count, len(of)) - 1][1]


def _start(series: Sequence[Sequence[float]]) -> int:
    """How many leading values of all of these are a start. What drifts by chance leaps in their
    mean, too, where they are several: each has to show most of it.
    """
    mean = _together(series)
    if not (count := late_start(mean, LEAP / math.sqrt(len(series)))):
        return 0
    height = _height(mean, count)
    shown = (_height(values, count) / height for values in series if len(values) > count)
    return count if all(share >= SHOWN for share in shown) else 0


def _height(values: Sequence[float], count: int) -> float:
    return median(values[:count]) - median(values[count:])


def _relative(
    samples: Sequence[Sample], reasons: tuple[str | None, ...]
) -> dict[str, dict[Place, float]]:
    turns = {arm: own for (arm, _), own in collect(samples, reasons).items()}
    return {arm: of for arm, of in relative(turns, "e2e_s").items() if of}


def _together(series: Sequence[Sequence[float]]) -> list[float]:
    """Their mean as far as two of them go, each around its own middle: one process may be quicker
    than another.
    """
    if len(series) == 1:
        return [*series[0]]
    middles = [median(values) for values in series]
    apart = [[v - middle for v in values] for values, middle in zip(series, middles, strict=True)]
    columns = ([v for v in column if v is not None] for column in zip_longest(*apart))
    return [float(np.mean(column)) for column in columns if len(column) > 1]
