"""One arm in one cell of the report: medians, percentiles, and ratios to the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from optpipe.bench import capacity, energy, rates
from optpipe.bench.bottlenecks import host
from optpipe.bench.evidence import resampling
from optpipe.bench.evidence.dependence import DEPENDENT, no_interval, paired
from optpipe.bench.evidence.processes import ONE_PROCESS, Level, Processes, between
from optpipe.bench.evidence.statistics import Shift, exponential, log_ratios, median
from optpipe.bench.outcome import Outcome
from optpipe.bench.percentiles import percentiles
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell
from optpipe.bench.serving import goodput, load
from optpipe.bench.timed.clock import METRICS, NO_STAMPS, ONE_TOKEN
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.timed.series import Turns, collect, levels, pairs

FIELDS = (*METRICS, "peak_bytes")
"""What a cell holds a number of."""
ONE_NUMBER = "a single number: nothing varies from block to block"
HAND_OVER = "one request at a time never queues: this is the hand-over between two processes"
ITSELF = "the baseline itself"
NO_PEAK = "this system keeps no peak of resident memory that can be reset"
GOODPUT = "goodput_per_s"
OTHER_DEVICE = "it runs on another device than the baseline: their memories are two things"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """An outcome with its samples grouped once."""

    outcome: Outcome

    @cached_property
    def turns(self) -> Mapping[tuple[str, Cell], Turns]:
        return collect(self.outcome.measured.samples)

    def timed(self, name: str, cell: Cell) -> tuple[Turns | None, str]:
        """What counts of one arm in one cell, or why there is nothing."""
        outcome = self.outcome
        dropped = outcome.measured.dropped.get((name, cell))
        why = outcome.left_out.get(name) or outcome.broken.get(name) or dropped
        own = self.turns.get((name, cell)) if why is None else None
        return own, "" if own else why or outcome.measured.dead.get(name, "no block was run")

    def shift(self, name: str, cell: Cell, metric: str) -> tuple[Shift | None, str]:
        """How many times better than the baseline over paired blocks, or why there is no ratio."""
        own, why = self.timed(name, cell)
        base, lost = self.timed(self.outcome.baseline, cell)
        if own is None:
            return None, why
        if base is None:
            return None, self._unpaired(name) or f"the baseline has no numbers here: {lost}"
        if metric == "peak_bytes" and self._device(name) != self._device(self.outcome.baseline):
            return None, OTHER_DEVICE
        before, after = pairs(base, own, metric, anchored=True)
        if not before:
            return None, self._unpaired(name) or missing(metric, cell)
        logs = log_ratios(after, before) if metric == "tokens_per_s" else log_ratios(before, after)
        bench, drawn = self.outcome.bench, self._processes(name, cell, metric)
        return exponential(paired(logs, bench.level, bench.margin, drawn)), ""

    def _processes(self, name: str, cell: Cell, metric: str) -> Processes | None:
        """None where arms took turns to be loaded: each of their pairs has processes of its own."""
        outcome, key = self.outcome, (cell, metric)
        if name in outcome.anchored:
            return None
        if key not in self._levels:
            here = {arm: turns for (arm, at), turns in self.turns.items() if at == cell}
            together = {arm: of for arm, of in here.items() if arm not in outcome.anchored}
            self._levels[key] = (
                goodput.levels({arm: of.samples for arm, of in together.items()})
                if metric == GOODPUT
                else levels(together, metric)
            )
        # that the two of the baseline differ is the question there, and what is known elsewhere
        same = {} if name == AGAIN else {AGAIN: outcome.baseline}
        return between(self._levels[key], outcome.baseline, name, same)

    @cached_property
    def _levels(self) -> dict[tuple[Cell, str], list[Level]]:
        return {}

    def cell(self, name: str, cell: Cell) -> Entry:
        """The whole entry of an arm; verdicts are added once the family of them is known."""
        own, why = self.timed(name, cell)
        values, reasons = _values(own, cell, why)
        device, no_device = host.entry(own.samples if own else [], why)
        reasons |= no_device
        spent, no_energy = energy.entry(self.outcome.measured, name, cell, self.outcome.bench, why)
        reasons |= no_energy
        if own is None:
            reasons["cpu_s"] = why
        elif cell in self.outcome.measured.stopped:
            reasons["blocks"] = self.outcome.measured.stopped[cell]
        if own is not None and (name, cell) in self.outcome.measured.slow_starts:
            reasons["warmup"] = self.outcome.measured.slow_starts[name, cell]
        rated, unrated = load.entry(own.samples if own else [], cell, self.outcome.measured)
        if not rated:  # no server
            rated, unrated = rates.entry(own.samples if own else [], cell, values, why)
        told, free = self.outcome.loaded.get(name), self.outcome.free(name)
        most, unknown = capacity.sequences(told, cell, free, self.outcome.absent(name) or "")
        reasons |= unrated | unknown
        return {
            **cell._asdict(),
            **values,
            **rated,
            "blocks": own.blocks if own else 0,
            "max_sequences": most,
            "cpu_s": median([sample.cpu_s for sample in own.samples]) if own else None,
            **device,
            "energy": spent,
            "percentiles": percentiles(own, why),
            "speedup": self._speedups(name, cell),
            "reasons": reasons,
        }

    def _speedups(self, name: str, cell: Cell) -> dict[str, Entry]:
        outcome = self.outcome
        arm = next(arm for arm in outcome.arms if arm.name == name)
        itself = name == outcome.baseline
        smaller = outcome.arms[0].artifact.size_bytes / arm.artifact.size_bytes
        if itself and self.timed(name, cell)[0] is not None:
            found = dict.fromkeys(FIELDS, single(1.0, ITSELF))
        else:
            found = {metric: self._ratio(name, cell, metric) for metric in FIELDS}
        return {
            **found,
            **(
                {GOODPUT: self._goodput(name, cell)}
                if cell in outcome.measured.rates
                else {"queue_s": nothing(HAND_OVER)}
            ),
            "bytes": single(smaller, ITSELF if itself else ONE_NUMBER),
        }

    def _ratio(self, name: str, cell: Cell, metric: str) -> Entry:
        shift, why = self.shift(name, cell, metric)
        if shift is None:
            return nothing(why)
        entry = interval(shift, self.outcome.bench.level)
        base, own = self.turns[self.outcome.baseline, cell], self.turns[name, cell]
        if metric == "tokens_per_s" and shift.pairs >= resampling.FEWEST_BLOCKS:
            entry |= _bootstrap(base, own, cell, self.outcome.bench, shift.processes)
        return entry

    def _goodput(self, name: str, cell: Cell) -> Entry:
        own, why = self.timed(name, cell)
        base, lost = self.timed(self.outcome.baseline, cell)
        if own is None or base is None:
            return nothing(why or f"the baseline has no numbers here: {lost}")
        if name == self.outcome.baseline:
            return single(1.0, ITSELF)
        if (apart := self._unpaired(name)) is not None or name in self.outcome.anchored:
            return nothing(apart or "it took turns with the baseline: no block has both")
        drawn = self._processes(name, cell, GOODPUT)
        assert drawn is not None, "only arms in turns have none"
        entry = goodput.ratio(base.samples, own.samples, self.outcome.bench, drawn)
        known, reasons = _drawn(drawn)
        return {**entry, **known, "reasons": entry["reasons"] | reasons}

    def _device(self, name: str) -> str | None:
        told = self.outcome.loaded.get(self.outcome.baseline if name == AGAIN else name)
        return None if told is None else told.device

    def _unpaired(self, name: str) -> str | None:
        if name == AGAIN or name in self.outcome.anchored:
            return None
        return self.outcome.unpaired(name)


def interval(shift: Shift, level: float) -> Entry:
    """A ratio with its interval, Student's beside it, and what is odd about them."""
    reasons = {} if shift.ci else {"ci": no_interval(shift, level)}
    if shift.check is None:
        reasons["ci_check"] = "one paired block has no standard deviation"
    if shift.rho > DEPENDENT:
        reasons["dependent"] = (
            f"neighbouring blocks are alike (autocorrelation {shift.rho:.2f}): they count as fewer"
        )
    if shift.disputed:
        reasons["disputed"] = "Student's interval disagrees with that of the signed rank: bursts"
    drawn, unknown = _drawn(shift.processes)
    return {
        "ratio": shift.estimate,
        "ci": None if shift.ci is None else list(shift.ci),
        "ci_check": None if shift.check is None else list(shift.check),
        **drawn,
        "reasons": reasons | unknown,
    }


def _drawn(processes: Processes | None) -> tuple[Entry, dict[str, str]]:
    """How many processes of each arm there were, and what they differ by, or why it is null."""
    if processes is None:
        return {}, {}
    known = processes.df > 0
    entry = {"processes": processes.sets, "process_sd": processes.sd if known else None}
    return entry, {} if known else {"process_sd": ONE_PROCESS}


def single(value: float, why: str) -> Entry:
    return {"ratio": value, "ci": None, "reasons": {"ci": why}}


def nothing(why: str) -> Entry:
    return {"ratio": None, "ci": None, "reasons": {"ratio": why, "ci": why}}


def missing(metric: str, cell: Cell) -> str:
    """Why a timed arm has no value of a metric."""
    if metric == "peak_bytes":
        return NO_PEAK
    return ONE_TOKEN if metric == "tpot_s" and cell.new_tokens == 1 else NO_STAMPS


def _values(own: Turns | None, cell: Cell, why: str) -> tuple[Entry, dict[str, str]]:
    """The number of every field, and the reason of every null."""
    if own is None:
        return dict.fromkeys(FIELDS), dict.fromkeys(FIELDS, why)
    blocks = {metric: [*own.by_block(metric).values()] for metric in METRICS}
    values: Entry = {metric: median(of) if of else None for metric, of in blocks.items()}
    values["peak_bytes"] = max((int(peak) for peak in own.values("peak_bytes")), default=None)
    return values, {k: missing(k, cell) for k, value in values.items() if value is None}


def _bootstrap(
    base: Turns, own: Turns, cell: Cell, bench: BenchConfig, drawn: Processes | None
) -> Entry:
    """Of the ratio of total tokens by total time, in blocks where both have as many requests."""
    times = []
    for turns in (base, own):
        by_block: dict[tuple[int, int], list[float]] = {}
        for sample, of in zip(turns.samples, turns.metrics, strict=True):
            if (e2e := of["e2e_s"]) is not None:
                by_block.setdefault((sample.session, sample.block), []).append(e2e)
        times.append(by_block)
    size = max(len(of) for of in times[0].values())
    shared = [p for p, of in times[0].items() if len(of) == size == len(times[1].get(p, []))]
    if len(shared) < resampling.FEWEST_BLOCKS:
        return {}
    taken = [np.array([of[place] for place in shared]) for of in times]
    tokens = np.full(taken[0].shape, float(cell.batch * cell.new_tokens))
    both = (tokens, tokens), (taken[0], taken[1])
    low, high = resampling.hierarchical(*both, bench.seed, bench.level, drawn)
    if not np.isfinite([low, high]).all():
        return {}
    return {"ci_bootstrap": [float(np.exp(low)), float(np.exp(high))]}
