"""One cell of the paired, interleaved design: warm-up, then blocks until the results suffice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.statistics import log_ratios, median
from optpipe.bench.evidence.stopping import late_start, settled
from optpipe.bench.serving.load import SEARCH_STEPS, Answer, find_rate
from optpipe.bench.serving.serve import Serve
from optpipe.bench.timed.blocks import Blocks
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import Turns, collect, pairs, relative

TURN_S, GPU_TURN_S = 0.05, 0.5
"""The baseline repeats an iteration that is shorter within its turn, and so do all arms. A GPU that
starts to work lowers its clock for some 100 ms until it keeps within its power limit; longer turns
average that."""
ALIKE = 2.0
"""On a CPU, arms that take less than the baseline over this do not make all others repeat: their
own turns are shorter. Counts are equal whatever the speed: on a machine with bursts the median of
several is not that of one, and the first of a turn is not like the others."""
MOST_ITERATIONS = 50
LONGEST = 20
"""No arm repeats for longer than so many such turns, however quick the others are."""
WARM = 1000
"""Prompts below this number are those of the warm-up."""
RERUNS = 1.5
"""Most blocks that are begun, as a multiple of those wanted: tainted ones are run again."""
AFRESH = 15
"""Warm-up iterations, if there is time, of a session that goes on in the midst of a cell: too few
blocks may be left to show a start that a whole session would show."""
SEARCH_SHARE = 0.5
"""Of the time of a cell that the search for a rate may take."""


@dataclass(kw_only=True)
class Timer:
    """One cell in one session; ``primary`` are the metrics that decide when it may end."""

    blocks: Blocks
    primary: tuple[str, ...]

    def rounds(self, budget_s: float) -> Iterator[float]:
        """Warm up, then run blocks until they suffice or the time is over; yields a share done.

        Two warm-up iterations and one block are run whatever the time. A session that goes on warms
        up again, counts the blocks it left, and does neither in a cell that it had finished.
        """
        end_ns = self.blocks.session.clock() + int(budget_s * 1e9)
        finished = self.blocks.recall()
        if not finished:
            yield from self.warm_up(budget_s)
        yield from self._timed(0 if finished else end_ns)
        if not finished:
            self.blocks.keep([], done=True)

    def warm_up(self, budget_s: float = math.inf) -> Iterator[float]:
        """Whole iterations of every arm until all have settled, or the time for it is over."""
        blocks, config, clock = self.blocks, self.blocks.config, self.blocks.session.clock
        begin_ns = clock()
        self._drop_what_does_not_fit()
        self._find_rate(SEARCH_SHARE * budget_s)
        left_s = budget_s - (clock() - begin_ns) / 1e9
        end_ns = clock() + int(min(config.warmup_s, left_s) * 1e9)
        taken: dict[str, list[float]] = defaultdict(list)
        number = first = blocks.warmed
        seen = first + (AFRESH if blocks.past else 0)
        while number < first + config.warmup or (
            clock() < end_ns
            and not (number >= seen and all(settled(taken[n]) for n in blocks.arms()))
        ):
            if not blocks.arms() or number >= WARM:
                return
            for sample in blocks.keep(blocks.run(-1 - number, number, "warmup")):
                taken[sample.arm].append(_seconds(sample))
            number += 1
            yield 0.0
        usual = [median(values[-3:]) for name in blocks.arms() if (values := taken[name])]
        if blocks.past:
            blocks.iterations = blocks.past[0].iterations
        elif usual and min(usual) > 0:
            gpu = any(told.gpu is not None for told in blocks.session.loaded.values())
            least_s = GPU_TURN_S if gpu else TURN_S
            turn_s = least_s if config.turn_s is None else config.turn_s
            blocks.iterations = repeats(usual, turn_s, math.inf if gpu else ALIKE)

    def _drop_what_does_not_fit(self) -> None:
        cell, found = self.blocks.cell, self.blocks.found
        for name, loaded in self.blocks.session.loaded.items():
            if (why := loaded.refuses(cell.batch, cell.tokens)) is not None:
                found.dropped[name, cell] = f"not measured: {why}"

    def _find_rate(self, budget_s: float) -> None:
        """At which requests come, where the cell has a server.

        One request alone and one rate are tried whatever the time, no further rate in overtime.
        """
        blocks, clock = self.blocks, self.blocks.session.clock
        if blocks.load is None:
            return
        end_ns, asked = clock() + min(budget_s, 1e9) * 1e9, 0

        def ask(name: str, command: Serve) -> Answer | None:
            nonlocal asked
            if asked > 1 and clock() > end_ns:
                blocks.found.hurried[blocks.cell] = (
                    f"the time budget (bench.budget_s={blocks.config.budget_s:g}) ended the search "
                    f"after {asked - 1} of at most {SEARCH_STEPS} rates"
                )
                return None
            asked += 1
            return blocks.ask(name, command)

        find_rate(blocks.load, blocks.arms(), ask, blocks.found)

    def _timed(self, end_ns: int) -> Iterator[float]:
        """Blocks until a look finds them enough; tainted ones are run again."""
        blocks, looks = self.blocks, self.blocks.config.looks
        kept = block = 0
        while kept < looks[-1] and block < RERUNS * looks[-1] and (blocks.past or blocks.arms()):
            if kept and not blocks.past and blocks.session.clock() > end_ns:
                break
            samples = blocks.timed(block, WARM)
            block += 1
            if not any(sample.note for sample in samples):
                kept += 1
                if kept in looks:
                    cut = self._late()
                    kept -= cut
                    if not cut and kept < looks[-1] and self._narrow():
                        return
            yield kept / looks[-1]
        kept -= self._late()
        self._explain(kept, block, blocks.session.clock() > end_ns)

    def _explain(self, kept: int, block: int, over: bool) -> None:
        """Why there are fewer blocks than wanted, if so."""
        blocks, looks = self.blocks, self.blocks.config.looks
        if kept >= looks[-1] or not blocks.arms():
            return
        budget_s = blocks.config.budget_s
        why = (
            f"the time budget (bench.budget_s={budget_s:g}) ended it after {kept} of at least "
            f"{looks[0]} and at most {looks[-1]} blocks"
            if over
            else f"{block - kept} of {block} blocks were disturbed or still warm-up"
        )
        blocks.found.stopped.setdefault(blocks.cell, why)

    def _late(self) -> int:
        """Blocks at the beginning that were still warm-up for some arm: they are marked so.

        Each part of a session begins anew, in processes of its own.
        """
        return sum(self._late_in(part) for part in range(self.blocks.session.journal.part + 1))

    def _late_in(self, part: int) -> int:
        """By the blocks alone, and with the warm-up, where a start that lasts into them began.

        Disturbed blocks among them too: what a start does to a machine is no disturbance.
        """
        samples, last = self.blocks.found.samples, -1
        here = [s for s in samples if self._here(s, part)]
        for reasons in ((None,), (None, "warmup")):
            turns = {arm: own for (arm, _), own in collect(here, reasons).items()}
            for of in relative(turns, "e2e_s").values():
                if count := late_start([*of.values()]):
                    last = max(last, [*of][count - 1][1])
        if cut := {s.block for s in here if s.reason is None and s.block <= last}:
            samples[:] = [
                replace(s, reason="warmup") if self._here(s, part) and 0 <= s.block <= last else s
                for s in samples
            ]
        return len(cut)

    def _narrow(self) -> bool:
        """Whether every primary ratio of every arm is known well enough to end."""
        turns, config = self._turns(), self.blocks.config
        base = turns.pop(next(iter(self.blocks.session.workers)), None)
        widths = [
            _half_width(*pairs(base, own, metric), config.level)
            for own in turns.values()
            for metric in self.primary
            if base is not None
        ]
        return all(width <= config.half_width for width in widths)

    def _turns(self) -> dict[str, Turns]:
        found = collect(s for s in self.blocks.found.samples if self._here(s))
        return {arm: turns for (arm, _), turns in found.items()}

    def _here(self, sample: Sample, part: int | None = None) -> bool:
        """Of this cell and session; of all of its parts, or of one."""
        here = sample.cell == self.blocks.cell and sample.session == self.blocks.session.number
        return here and part in (None, sample.part)


def repeats(usual: Sequence[float], turn_s: float, alike: float = ALIKE) -> int:
    """Iterations of a turn, the same for all arms, the baseline first, of which one usually takes
    so many seconds.

    >>> repeats([0.1, 0.2], 0.5), repeats([0.1, 0.07, 0.01], 0.5)
    (5, 8)
    >>> repeats([0.1, 5.0], 0.5), repeats([0.1, 30.0], 0.5)
    (2, 1)
    """
    quickest = min(seconds for seconds in usual if seconds >= usual[0] / alike)
    wanted = min(math.ceil(turn_s / quickest), MOST_ITERATIONS)
    return max(min(wanted, int(LONGEST * turn_s / max(usual))), 1)


def _half_width(before: list[float], after: list[float], level: float) -> float:
    """Of the interval of the log-ratio; infinite where there is none."""
    if not before:
        return math.inf
    ci = paired(log_ratios(before, after), level).ci
    return (ci[1] - ci[0]) / 2 if ci else math.inf


def _seconds(sample: Sample) -> float:
    assert sample.done_ns is not None
    return (sample.done_ns - sample.submit_ns) / 1e9
