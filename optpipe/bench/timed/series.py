"""Samples grouped by arm and cell, and their medians block by block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from optpipe.bench.evidence.processes import Level
from optpipe.bench.evidence.statistics import median
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.clock import LATENCIES
from optpipe.bench.timed.samples import Sample

Place = tuple[int, int]
"""(session, block)."""
Set = tuple[int, int, int]
"""(session, residence, part): processes that were at work together, one of every arm."""


@dataclass(frozen=True)
class Turns:
    """All samples of one arm in one cell that count, in the order they ran."""

    samples: list[Sample]

    @cached_property
    def metrics(self) -> list[dict[str, float | None]]:
        """Of every sample; ``peak_bytes`` among them."""
        return [{**sample.metrics, "peak_bytes": sample.peak_bytes} for sample in self.samples]

    def values(self, metric: str) -> list[float]:
        """Of every sample that has this metric."""
        return [value for of in self.metrics if (value := of[metric]) is not None]

    @cached_property
    def _known(self) -> dict[tuple[str, bool], Mapping[Place, float]]:
        return {}

    def by_block(self, metric: str, anchored: bool = False) -> Mapping[Place, float]:
        """Over the iterations of each turn the median, of a rate all work by all time.

        ``anchored``: relative to the probe that was timed around it, where there was one.
        """
        if (metric, anchored) not in self._known:
            self._known[metric, anchored] = self._by_block(metric, anchored)
        return self._known[metric, anchored]

    def _by_block(self, metric: str, anchored: bool) -> dict[Place, float]:
        found: dict[Place, list[float]] = defaultdict(list)
        for sample, of in zip(self.samples, self.metrics, strict=True):
            value = of[metric]
            if value is not None:
                scale = sample.probe_s if anchored and sample.probe_s else 1.0
                found[sample.session, sample.block].append(_relative(metric, value, scale))
        middle = _harmonic_mean if metric == "tokens_per_s" else median
        return {place: middle(values) for place, values in found.items()}

    @cached_property
    def sets(self) -> Mapping[Place, Set]:
        """Of every block the processes that ran it."""
        return {(s.session, s.block): set_of(s) for s in self.samples}

    @cached_property
    def blocks(self) -> int:
        return len({(sample.session, sample.block) for sample in self.samples})


def set_of(sample: Sample) -> Set:
    return sample.session, sample.residence, sample.part


def collect(
    samples: Iterable[Sample], reasons: Collection[str | None] = (None,)
) -> dict[tuple[str, Cell], Turns]:
    """The samples that are part of a result, or of other ``reasons`` too, by arm and cell."""
    found: dict[tuple[str, Cell], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.reason in reasons:
            found[sample.arm, sample.cell].append(sample)
    return {key: Turns(of) for key, of in found.items()}


def pairs(
    base: Turns, own: Turns, metric: str, anchored: bool = False
) -> tuple[list[float], list[float]]:
    """What the baseline and another arm took in the blocks that both have."""
    before, after = base.by_block(metric, anchored), own.by_block(metric, anchored)
    shared = [place for place in before if place in after]
    return [before[place] for place in shared], [after[place] for place in shared]


def relative(turns: Mapping[str, Turns], metric: str) -> dict[str, dict[Place, float]]:
    """The log of what each arm took over the median of the others, block by block.

    What the machine became in the meantime is in both; an arm that is alone has its own logs.
    """
    series = {arm: own.by_block(metric) for arm, own in turns.items()}
    found: dict[str, dict[Place, float]] = {}
    for arm, own in series.items():
        found[arm] = {}
        for place, value in own.items():
            others = [of[place] for name, of in series.items() if name != arm and place in of]
            found[arm][place] = math.log(value / (median(others) if others else 1.0))
    return found


def levels(turns: Mapping[str, Turns], metric: str) -> list[Level]:
    """What every process usually took: the median over its blocks of the log, less the mean of
    the logs of all arms in the block, of which only those count that all arms have."""
    found: list[Level] = []
    for which in sorted({of for own in turns.values() for of in own.sets.values()}):
        series = {}
        for arm, own in turns.items():
            values = own.by_block(metric)
            mine = {at: math.log(values[at]) for at, of in own.sets.items() if of == which
                    and values.get(at, 0) > 0}  # fmt: skip
            if mine:
                series[arm] = mine
        shared = set.intersection(*map(set, series.values())) if series else set()
        if shared:
            middle = {at: sum(of[at] for of in series.values()) / len(series) for at in shared}
            found += [(arm, which, median([of[at] - middle[at] for at in shared]), len(shared))
                      for arm, of in series.items()]  # fmt: skip
    return found


def _harmonic_mean(rates: Sequence[float]) -> float:
    """All work by all time, of rates of equal work."""
    return len(rates) / sum(1 / rate for rate in rates)


def _relative(metric: str, value: float, probe_s: float) -> float:
    if metric == "peak_bytes":
        return value
    return value / probe_s if metric in LATENCIES else value * probe_s
