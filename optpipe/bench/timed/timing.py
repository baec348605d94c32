"""One cell of the paired, interleaved design: warm-up, then blocks until the results suffice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from optpipe.bench.evidence.statistics import median
from optpipe.bench.evidence.stopping import settled
from optpipe.bench.serving.load import SEARCH_STEPS, Answer, find_rate
from optpipe.bench.serving.serve import Serve
from optpipe.bench.timed.blocks import Blocks
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import set_of
from optpipe.bench.timed.starts import late, longest

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
RERUNS = 2.0
"""Most blocks that are begun, as a multiple of those wanted: tainted ones are run again."""
AFRESH = 15
"""Warm-up iterations, if there is time, of a session that goes on in the midst of a cell: too few
blocks may be left to show a start that a whole session would show."""
LEAST = 2
"""Warm-up iterations, whatever the time."""
SEARCH_SHARE = 0.5
"""Of the time of a cell that the search for a rate may take."""


@dataclass(kw_only=True)
class Timer:
    """One cell in one residence."""

    blocks: Blocks

    def rounds(self, budget_s: float) -> Iterator[float]:
        """Warm up, then run the blocks, or until the time is over; yields a share done.

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
        """Whole iterations of every arm until all have settled, or the time for it is over.

        At least bench.warmup, or half of the time that the cell has; two whatever the time.
        """
        blocks, config, clock = self.blocks, self.blocks.config, self.blocks.session.clock
        begin_ns = clock()
        self._drop_what_does_not_fit()
        self._find_rate(SEARCH_SHARE * budget_s)
        left_s = budget_s - (clock() - begin_ns) / 1e9
        end_ns = clock() + int(min(config.warmup_s, left_s) * 1e9)
        half_ns = clock() + min(left_s, 1e9) * 1e9 / 2
        taken: dict[str, list[float]] = defaultdict(list)
        number = first = blocks.warmed
        seen, least = first + (AFRESH if blocks.past else 0), first + self._least()
        while (
            number < first + LEAST
            or (number < least and clock() < half_ns)
            or (clock() < end_ns
                and not (number >= seen and all(settled(taken[n]) for n in blocks.arms())))
        ):  # fmt: skip
            if not blocks.arms() or number >= WARM:
                return
            for sample in blocks.keep(blocks.run(-1 - number, number, "warmup")):
                taken[sample.arm].append(_seconds(sample))
            number += 1
            yield 0.0
        usual = [median(values[-3:]) for name in blocks.arms() if (values := taken[name])]
        if blocks.past:
            blocks.iterations = blocks.past[0].iterations
        elif earlier := [s.iteration for s in self._earlier() if s.block >= 0]:
            blocks.iterations = 1 + max(earlier)  # turns of all processes are alike
        elif usual and min(usual) > 0:
            gpu = any(told.gpu is not None for told in blocks.session.loaded.values())
            least_s = GPU_TURN_S if gpu else TURN_S
            turn_s = least_s if config.turn_s is None else config.turn_s
            blocks.iterations = repeats(usual, turn_s, math.inf if gpu else ALIKE)

    def _least(self) -> int:
        """Fewest warm-up iterations: as many as the processes before these were seen to need."""
        earlier = self._earlier()
        return max(longest(earlier), LEAST) if earlier else self.blocks.config.warmup

    def _earlier(self) -> list[Sample]:
        """What the processes before these took."""
        now = self.blocks.session.residence
        samples = self.blocks.found.samples
        return [s for s in samples if self.blocks.here(s) and s.residence < now]

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
        """Blocks until there are enough; tainted ones are run again, and those of a late start."""
        blocks, wanted = self.blocks, self.blocks.config.blocks
        kept = count = 0
        while kept < wanted and count < RERUNS * wanted and (blocks.past or blocks.arms()):
            if kept and not blocks.past and blocks.session.clock() > end_ns:
                break
            samples = blocks.timed(count, WARM)
            count += 1
            kept += not any(sample.note for sample in samples)
            if kept == wanted:
                kept -= self._late()
            yield kept / wanted
        if kept < wanted:
            kept -= self._late()
        self._explain(kept, count, blocks.session.clock() > end_ns)

    def _explain(self, kept: int, count: int, over: bool) -> None:
        """Why there are fewer blocks than wanted, if so."""
        blocks, wanted = self.blocks, self.blocks.config.blocks
        if kept >= wanted or not blocks.arms():
            return
        why = (
            f"the time budget (bench.budget_s={blocks.config.budget_s:g}) ended it after {kept} of "
            f"{wanted} blocks of a process"
            if over
            else f"{count - kept} of {count} blocks were disturbed or still warm-up"
        )
        blocks.found.stopped.setdefault(blocks.cell, why)

    def _late(self) -> int:
        """How many blocks of this residence were still warm-up for some arm: they are marked so."""
        blocks, samples = self.blocks, self.blocks.found.samples
        last = late([s for s in samples if blocks.here(s)])
        marked = [
            replace(s, reason="warmup") if blocks.here(s) and 0 <= s.block <= last[set_of(s)] else s
            for s in samples
        ]
        cut = {
            old.block
            for old, new in zip(samples, marked, strict=True)
            if old.reason is None and new.reason and old.residence == blocks.session.residence
        }
        samples[:] = marked
        return len(cut)


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


def _seconds(sample: Sample) -> float:
    assert sample.done_ns is not None
    return (sample.done_ns - sample.submit_ns) / 1e9
