"""The paired, interleaved design: in every block every arm has a turn, in random order, on the same
token ids, so that whatever drifts on the machine drifts for all arms alike.

Two identical arms timed one after the other instead "differ" in 38 to 66 % of trials.
"""

from __future__ import annotations

from collections.abc import Sequence

from optpipe.bench.evidence.verdict import primary
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.blocks import Blocks, Session
from optpipe.bench.timed.samples import Measured, Sample
from optpipe.bench.timed.timing import Timer
from optpipe.stage import Progress

__all__ = ["BenchConfig", "Measured", "Sample", "Session", "measure"]
STEPS = 100
"""Units of progress in a cell."""
UNDECIDED = 0.5
"""Of the time of others, what a cell gets in which there is nothing to decide."""


def measure(
    session: Session,
    cells: Sequence[Cell],
    config: BenchConfig,
    found: Measured,
    progress: Progress,
) -> None:
    """Time every cell with every arm of a residence; results are added to ``found``."""
    end_ns = session.clock() + int(session.budget_s * 1e9)
    # short cells first: an allocator that keeps its peak would pass it on to the cells after it
    order = sorted(cells, key=lambda cell: cell.batch * cell.tokens)
    deciding, total = primary(cells, found.scenarios), STEPS * len(cells)
    for index, cell in enumerate(order):
        blocks = Blocks(session=session, cell=cell, config=config, found=found)
        timer = Timer(blocks=blocks)
        left_s = max((end_ns - session.clock()) / 1e9, 0.0)
        for done in timer.rounds(left_s * share([deciding[c] for c in order[index:]])):
            progress(f"benchmark: {cell}", index * STEPS + int(done * STEPS), total)
    progress("benchmark: timed", total, total)


def share(deciding: Sequence[Sequence[str]]) -> float:
    """Of the time that is left, what the first of these cells gets, by their primary metrics.

    >>> share([["tpot_s"], []]), share([[], ["tpot_s"]]), share([[]])
    (0.6666666666666666, 0.3333333333333333, 1.0)
    """
    weights = [1.0 if metrics else UNDECIDED for metrics in deciding]
    return weights[0] / sum(weights)
