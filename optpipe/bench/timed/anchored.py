"""Second best: two arms that do not fit in memory together take turns to be loaded, ABBA.

Each turn is timed relative to a fixed piece of work around it, so that what the machine became in
between cancels as far as that work feels it. Nothing found this way is more than INCONCLUSIVE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from optpipe.bench import cold
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
        had, spent_s = self._recall(), self.outcome.journal.spent_s(self.number)
        end_s = time.monotonic() + self.outcome.bench.budget_s - spent_s
        for index, (name, blocks) in enumerate(residences):
            left = {c: [b for b in blocks if (name, c, b) not in had] for c in self.outcome.cells}
            if index != last and not any(left.values()):
                continue
            if index > 1 and time.monotonic() > end_s:  # one pair there always is
                self._explain(blocks[0])
                if name != self.name:
                    continue
                last, left = index, {}  # loaded once more, to be judged
            if not self._residence(name, left, index == last):
                return

    @property
    def wanted(self) -> int:
        """Pairs, enough for an interval at the level of the run."""
        return max(PAIRS, fewest_pairs(self.outcome.bench.level))

    def _residence(self, name: str, left: Mapping[Cell, Sequence[int]], judged: bool) -> bool:
        """Load an arm and time what is left of its blocks; whether there may be more."""
        [arm] = [arm for arm in self.outcome.arms if arm.name == name]
        with self.reside([arm], self.progress) as residents:
            self.outcome.loaded |= residents.loaded
            self.outcome.broken |= residents.broken | cold.note(self.outcome, residents)
            if not residents.workers or name in self.outcome.measured.dead:
                return False
            for cell in (cell for cell in left if left[cell]):
                self._cell(self._timer(cell, residents), left[cell])
            if judged:
                self.judge(residents)
        return bool(left)

    def _recall(self) -> set[tuple[str, Cell, int]]:
        """Take over what a process before this one left; the arms, cells and blocks of that."""
        entries = self.outcome.journal.of(self.number)
        for entry in entries:
            entry.restore(self.outcome.measured)
            self.outcome.measured.samples += entry.samples
            if entry.is_timed:
                self.iterations[entry.cell] = entry.iterations
        return {(s.arm, s.cell, s.block) for entry in entries for s in entry.samples}

    def _explain(self, pairs: int) -> None:
        """Why there are fewer pairs than wanted; one arm is a block ahead of the other."""
        bench, found = self.outcome.bench, self.outcome.measured
        found.samples[:] = [
            replace(s, reason="unpaired")
            if s.session == self.number and s.block >= pairs and s.reason is None
            else s
            for s in found.samples
        ]
        why = f"(bench.budget_s={bench.budget_s:g}) ended it after {pairs} of {self.wanted}"
        for cell in self.outcome.cells:
            self.outcome.measured.stopped.setdefault(cell, f"the time budget {why} pairs")

    def _timer(self, cell: Cell, residents: Residents) -> Timer:
        session = Session(
            number=self.number,
            workers=residents.workers,
            loaded=residents.loaded,
            budget_s=self.outcome.bench.budget_s,
            journal=self.outcome.journal,
        )
        found, config = self.outcome.measured, self.outcome.bench
        blocks = Blocks(session=session, cell=cell, config=config, found=found)
        return Timer(blocks=blocks)

    def _cell(self, timer: Timer, blocks: Sequence[int]) -> None:
        for _ in timer.warm_up():
            pass
        # both arms answer the same requests, so that the first to be loaded says how many
        given = timer.blocks
        given.iterations = self.iterations.setdefault(given.cell, given.iterations)
        for block in blocks:
            before_s = probe()
            samples = given.run(block, WARM + block // 2 * given.iterations, None)
            probe_s = (before_s + probe()) / 2
            given.keep([replace(sample, probe_s=probe_s) for sample in samples])


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
