"""Second best: two arms that do not fit in memory together take turns to be loaded, ABBA.

Each turn is timed relative to a fixed piece of work around it, so that what the machine became in
between cancels as far as that work feels it. Nothing found this way is more than INCONCLUSIVE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optpipe.bench.evidence.statistics import fewest_pairs
from optpipe.bench.outcome import Outcome
from optpipe.bench.resident import Reside, Residents
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.blocks import Blocks, Session
from optpipe.bench.timed.timing import WARM, Timer
from optpipe.stage import Progress

PAIRS = 8
"""Fewest pairs; enough for an interval at the level of a run with up to six looks."""
PROBE_VALUES = 4_000_000
PROBE_ROWS = 384


@dataclass(frozen=True, kw_only=True)
class Alternation:
    """One pair of arms, the baseline and another, over all cells."""

    outcome: Outcome
    name: str
    number: int
    """Of the session."""
    reside: Reside
    judge: Callable[[Residents], None]
    """Called in the last residence of the other arm."""
    progress: Progress
    iterations: dict[Cell, int] = field(default_factory=dict)

    def run(self) -> None:
        """Load each arm in turn and time all cells; samples are added to the outcome."""
        residences = schedule(self.outcome.baseline, self.name, self.wanted)
        last = max(i for i, (name, _) in enumerate(residences) if name == self.name)
        end_s = time.monotonic() + self.outcome.bench.budget_s
        for index, (name, blocks) in enumerate(residences):
            if index > 1 and time.monotonic() > end_s:  # one pair there always is
                self._explain(blocks[0])
                if name != self.name:
                    continue
                last, blocks = index, []  # loaded once more, to be judged
            arm = next(arm for arm in self.outcome.arms if arm.name == name)
            with self.reside([arm], self.progress) as residents:
                self.outcome.broken |= residents.broken
                if residents.broken or name in self.outcome.measured.dead:
                    return
                self.outcome.loaded |= residents.loaded
                for cell in self.outcome.cells if blocks else ():
                    self._cell(self._timer(cell, residents), blocks)
                if index == last:
                    self.judge(residents)
            if not blocks:
                return

    @property
    def wanted(self) -> int:
        """Pairs, enough for an interval at the level of the run."""
        return max(PAIRS, fewest_pairs(self.outcome.bench.level))

    def _explain(self, pairs: int) -> None:
        """Why there are fewer pairs than wanted."""
        bench = self.outcome.bench
        why = f"(bench.budget_s={bench.budget_s:g}) ended it after {pairs} of {self.wanted}"
        for cell in self.outcome.cells:
            self.outcome.measured.stopped.setdefault(cell, f"the time budget {why} pairs")

    def _timer(self, cell: Cell, residents: Residents) -> Timer:
        session = Session(
            number=self.number,
            workers=residents.workers,
            loaded=residents.loaded,
            budget_s=self.outcome.bench.budget_s,
        )
        blocks = Blocks(
            session=session,
            cell=cell,
            config=self.outcome.bench,
            found=self.outcome.measured,
        )
        return Timer(blocks=blocks, primary=())

    def _cell(self, timer: Timer, blocks: Sequence[int]) -> None:
        samples = self.outcome.measured.samples
        for _ in timer.warm_up():
            pass
        # both arms answer the same requests, so that the first to be loaded says how many
        given = timer.blocks
        given.iterations = self.iterations.setdefault(given.cell, given.iterations)
        for block in blocks:
            before_s, start = probe(), len(samples)
            given.run(block, WARM + block // 2 * given.iterations, None)
            probe_s = (before_s + probe()) / 2
            samples[start:] = [replace(sample, probe_s=probe_s) for sample in samples[start:]]


def schedule(baseline: str, other: str, pairs: int) -> list[tuple[str, list[int]]]:
    """Who is loaded when, and for which blocks: A B, B A, A B; equal neighbours stay loaded.

    >>> schedule("a", "b", 3)
    [('a', [0]), ('b', [0, 1]), ('a', [1, 2]), ('b', [2])]
    """
    turns = [
        (name, pair)
        for pair in range(pairs)
        for name in ((baseline, other) if pair % 2 == 0 else (other, baseline))
    ]
    found: list[tuple[str, list[int]]] = []
    for name, pair in turns:
        if found and found[-1][0] == name:
            found[-1][1].append(pair)
        else:
            found.append((name, [pair]))
    return found


def probe() -> float:
    """Seconds for a fixed piece of work that reads memory and multiplies; the least of three."""
    values = np.ones(PROBE_VALUES, dtype=np.float32)
    square = np.ones((PROBE_ROWS, PROBE_ROWS), dtype=np.float32)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        values.sum()
        square @ square
        taken.append(time.perf_counter() - start)
    return min(taken)
