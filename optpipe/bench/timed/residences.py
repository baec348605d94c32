"""Several processes of every arm, one set of them after the other; each times all cells.

Arms that are resident together keep their processes as long as the set is at work. What a process
drew when it started, blocks repeat: it takes several to see how much that is (`processes`). Looks
at the results, too, come between two sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from optpipe.bench.cells import Table
from optpipe.bench.evidence.verdict import primary
from optpipe.bench.outcome import Outcome
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.blocks import Session
from optpipe.bench.timed.clock import Clock
from optpipe.bench.timed.measure import measure
from optpipe.stage import Progress


@dataclass(frozen=True, kw_only=True)
class Residences:
    """Of one session; ``start`` gives its arms new processes."""

    outcome: Outcome
    number: int
    start: Callable[[], AbstractContextManager[Session]]
    progress: Progress
    clock: Clock = time.perf_counter_ns

    def run(self) -> None:
        """Time all cells in one residence after the other, until a look knows enough of them."""
        outcome, looks = self.outcome, self.outcome.bench.looks
        cells, left_s = [*outcome.cells], outcome.bench.budget_s / len(outcome.sessions)
        left_s -= outcome.journal.spent_s(self.number)
        for index in range(looks[-1]):
            if index and left_s <= 0 and not outcome.journal.began(self.number, index):
                self._explain(index, cells)
                return
            with self._opened(index, cells) as session:
                begin_ns, budget_s = self.clock(), left_s / (looks[-1] - index)
                given = replace(session, residence=index, budget_s=budget_s)
                measure(given, cells, outcome.bench, outcome.measured, self._part(index))
                left_s -= (self.clock() - begin_ns) / 1e9
            if index + 1 in looks[:-1]:
                cells = [cell for cell in cells if not self._is_known(cell)]
            if not cells:
                return

    def _opened(self, index: int, cells: Sequence[Cell]) -> AbstractContextManager[Session]:
        """With no processes where earlier parts of the run left nothing to be timed."""
        journal = self.outcome.journal
        if journal.finished(self.number, index, cells) and not self._unknown():
            return nullcontext(Session(number=self.number, workers={}, loaded={}, journal=journal))
        return self.start()

    def _unknown(self) -> bool:
        """Whether an endpoint of an earlier part of the run has yet to tell what it is."""
        outcome = self.outcome
        served = (arm.name for arm in outcome.arms if arm.endpoint)
        return any(n not in outcome.loaded and outcome.absent(n) is None for n in served)

    def _part(self, index: int) -> Progress:
        """Progress of one residence as that of all."""
        of = self.outcome.bench.looks[-1]

        def tell(what: str, done: int, total: int) -> None:
            self.progress(what, index * total + done, of * total)

        return tell

    def _is_known(self, cell: Cell) -> bool:
        """Whether every primary ratio of every arm is known well enough to end."""
        outcome, table = self.outcome, Table(self.outcome)
        metrics = primary(outcome.cells, outcome.measured.scenarios)[cell]
        arms = [arm for arm, at in table.turns if at == cell and arm != outcome.baseline]
        shifts = [table.shift(arm, cell, metric)[0] for arm in arms for metric in metrics]
        cis = [shift.ci for shift in shifts if shift is not None]
        most = 2 * outcome.bench.half_width
        return all(ci is not None and math.log(ci[1] / ci[0]) <= most for ci in cis)

    def _explain(self, index: int, cells: Sequence[Cell]) -> None:
        bench = self.outcome.bench
        for cell in cells:
            self.outcome.measured.stopped[cell] = (
                f"the time budget (bench.budget_s={bench.budget_s:g}) ended it after {index} of at "
                f"least {bench.processes} and at most {bench.max_processes} processes of every arm"
            )
