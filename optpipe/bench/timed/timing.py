"""One cell of the paired, interleaved design: warm-up, then blocks until the results suffice."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.statistics import log_ratios, median
from optpipe.bench.evidence.stopping import late_start, settled
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell, hash_ids, prompt_seed, prompts
from optpipe.bench.serving.load import Load, find_rate, load_of
from optpipe.bench.serving.serve import Serve, Served
from optpipe.bench.timed.clock import Clock
from optpipe.bench.timed.contention import Meter, Watch, ticks
from optpipe.bench.timed.samples import Measured, Sample
from optpipe.bench.timed.series import Turns, collect, pairs
from optpipe.bench.worker import Command, Iterate, Iteration, Loaded, Rewarm, Worker
from optpipe.errors import StageError

SETTLE_S = 0.02
"""Pause between two arms: threads of the last one that still spin go to sleep."""
PATIENCE = 3.0
"""A worker is ended when it has not answered for this many times the limit of an iteration."""
TURN_S = 0.05
"""An arm whose iteration is shorter repeats it within its turn."""
MOST_ITERATIONS = 50
WARM = 1000
"""Prompts below this number are those of the warm-up."""
RERUNS = 1.5
"""Most blocks that are begun, as a multiple of those wanted: tainted ones are run again."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Arms that are resident together, the baseline first, and what they told when loaded."""

    number: int
    workers: Mapping[str, Worker]
    loaded: Mapping[str, Loaded]
    budget_s: float
    clock: Clock = time.perf_counter_ns
    meter: Meter = ticks

    @property
    def vocab(self) -> int:
        return min(loaded.vocab for loaded in self.loaded.values())


@dataclass(kw_only=True)
class Timer:
    """One cell in one session; ``primary`` are the metrics that decide when it may end."""

    session: Session
    cell: Cell
    config: BenchConfig
    found: Measured
    rng: np.random.Generator
    primary: tuple[str, ...]
    iterations: int = 1
    """In one turn of an arm."""
    watch: Watch = field(init=False)
    load: Load | None = field(init=False)
    order: list[str] = field(default_factory=list)
    """Of the arms in the last block."""
    ids: dict[int, Ids] = field(default_factory=dict)
    """The prompts of this block and the last, by number."""

    def __post_init__(self) -> None:
        self.watch = Watch(meter=self.session.meter)
        self.load = load_of(self.cell, self.found, self.session.vocab, self.config)

    def rounds(self, budget_s: float) -> Iterator[float]:
        """Warm up, then run blocks until they suffice or the time is over; yields a share done."""
        end_ns = self.session.clock() + int(budget_s * 1e9)
        yield from self.warm_up()
        yield from self._timed(end_ns)

    def warm_up(self) -> Iterator[float]:
        """Whole iterations of every arm until all have settled, or the time for it is over."""
        self._drop_what_does_not_fit()
        if self.load is not None:
            find_rate(self.load, self._arms(), self._ask, self.found)
        end_ns = self.session.clock() + int(self.config.warmup_s * 1e9)
        taken: dict[str, list[float]] = defaultdict(list)
        number = 0
        while number < self.config.warmup or (
            self.session.clock() < end_ns and not all(settled(taken[n]) for n in self._arms())
        ):
            if not self._arms() or number >= WARM:
                return
            for sample in self.block(-1 - number, number, "warmup"):
                taken[sample.arm].append(_seconds(sample))
            number += 1
            yield 0.0
        usual = [median(values[-3:]) for name in self._arms() if (values := taken[name])]
        if usual and min(usual) > 0:
            wanted = math.ceil(TURN_S / min(usual))
            self.iterations = min(max(wanted, 1), MOST_ITERATIONS)

    def _drop_what_does_not_fit(self) -> None:
        for name, loaded in self.session.loaded.items():
            if self.cell.tokens > loaded.capacity:
                self.found.dropped[name, self.cell] = (
                    f"{self.cell.tokens} tokens do not fit in its KV cache of {loaded.capacity}"
                )

    def _timed(self, end_ns: int) -> Iterator[float]:
        """Blocks until a look finds them enough; tainted ones are run again."""
        looks, kept, block = self.config.looks, 0, 0
        while kept < looks[-1] and block < RERUNS * looks[-1] and self._arms():
            if kept and self.session.clock() > end_ns:
                self.found.stopped[self.cell] = (
                    f"the time budget (bench.budget_s={self.config.budget_s:g}) ended it after "
                    f"{kept} of at least {looks[0]} and at most {looks[-1]} blocks"
                )
                return
            # two blocks share their prompts: an arm that remembers would be faster in the second
            samples = self.block(block, WARM + block // 2 * self.iterations, None)
            block += 1
            if not any(sample.note for sample in samples):
                kept += 1
            if kept in looks and kept < looks[-1]:
                if cut := self._late():
                    kept -= cut
                elif self._narrow():
                    return
            yield kept / looks[-1]
        if kept < looks[-1] and self._arms():
            self.found.stopped[self.cell] = f"{block - kept} of {block} blocks were disturbed"

    def _arms(self) -> list[str]:
        """The arms that are still in this cell."""
        return [
            name
            for name in self.session.workers
            if name not in self.found.dead and (name, self.cell) not in self.found.dropped
        ]

    def block(self, block: int, prompt: int, reason: str | None) -> list[Sample]:
        """A turn of every arm; a tainted turn taints the whole block.

        The order is random, and in the block after it the reverse: what comes of being second falls
        on all arms alike, exactly, not only on average.
        """
        arms = self._arms()
        turned = block % 2 == 1 and set(self.order) == set(arms)
        shuffled = [arms[index] for index in self.rng.permutation(len(arms))]
        self.order = self.order[::-1] if turned else shuffled
        self.ids = {number: ids for number, ids in self.ids.items() if number >= prompt}
        samples: list[Sample] = []
        for position, name in enumerate(self.order):
            time.sleep(SETTLE_S)
            samples += self._turn(name, (block, position), prompt, reason)
        if reason is None and any(sample.note for sample in samples):
            samples = [replace(sample, reason="tainted") for sample in samples]
        self.found.samples += samples
        return samples

    def _turn(
        self, name: str, place: tuple[int, int], prompt: int, reason: str | None
    ) -> list[Sample]:
        """Some iterations of one arm, each on the next prompts."""
        before = self.session.meter()
        rewarm = Rewarm(ids_BS=self._prompts(prompt))
        if len(self.session.workers) > 1 and self._ask(name, rewarm) is None:
            return []
        samples: list[Sample] = []
        start_ns = self.session.clock()
        for iteration in range(self.iterations):
            sample = self._iteration(name, prompt + iteration, reason)
            if sample is None:
                break
            samples.append(replace(sample, block=place[0], position=place[1], iteration=iteration))
        wall_s = (self.session.clock() - start_ns) / 1e9
        if not samples or wall_s <= 0:
            return samples
        cpu_s = sum(sample.cpu_s for sample in samples)
        note = self.watch.disturbed(name, wall_s, cpu_s, before, self.session.meter())
        return [replace(sample, note=note) for sample in samples]

    def _iteration(self, name: str, prompt: int, reason: str | None) -> Sample | None:
        """One iteration of one arm; None if it does not come back, which ends its process."""
        command, limit_s = self._command(prompt, reason), self.config.iteration_limit_s
        limit_s += command.longest_s if isinstance(command, Serve) else 0.0
        answer = self._ask(name, command)
        if answer is None or answer[1] is None:
            return None
        submit_ns, got, done_ns = answer
        taken_s = (done_ns - submit_ns) / 1e9
        if reason and taken_s > limit_s:
            self.found.dropped[name, self.cell] = (
                f"a warm-up iteration took {taken_s:.1f} s for {len(got.trace.token_ns)} of "
                f"{self.cell.new_tokens} tokens, more than bench.iteration_limit_s={limit_s:g}"
            )
        return Sample(
            arm=name,
            cell=self.cell,
            session=self.session.number,
            block=0,
            position=0,
            prompt=prompt,
            reason=reason,
            submit_ns=submit_ns,
            start_ns=got.trace.start_ns,
            token_ns=got.trace.token_ns,
            done_ns=done_ns,
            cpu_s=got.cpu_s,
            device_s=got.device_s,
            peak_bytes=got.peak_bytes,
            rows=got.trace.tokens_NB.shape[1],
            tokens_hash=hash_ids(got.trace.tokens_NB),
            served=got if isinstance(got, Served) else None,
        )

    def _command(self, prompt: int, reason: str | None) -> Iterate | Serve:
        """What is asked of every arm on these prompts."""
        limit_ns = int(self.config.iteration_limit_s * 1e9) if reason else None
        ids_BS = self._prompts(prompt)
        if self.load is None:
            return Iterate(ids_BS=ids_BS, new_tokens=self.cell.new_tokens, limit_ns=limit_ns)
        command = self.load.command(prompt, self.found.rates[self.cell])
        self.found.prompts[self.cell][prompt] = command.ids_hash
        return command

    def _ask(self, name: str, command: Command) -> tuple[int, Iteration | Served, int] | None:
        """Submitted, answered, done; an arm that breaks or does not answer costs itself only."""
        worker, doing = self.session.workers[name], str(self.cell)
        try:
            submit_ns = worker.submit(command, doing)
            longest_s = command.longest_s if isinstance(command, Serve) else 0.0
            got = worker.result(doing, PATIENCE * (longest_s + self.config.iteration_limit_s))
        except (TimeoutError, StageError) as error:
            worker.kill()
            self.found.dead[name] = f"its process was ended in '{doing}': {error}"
            self.found.dropped[name, self.cell] = self.found.dead[name]
            return None
        return submit_ns, got, self.session.clock()

    def _prompts(self, number: int) -> Ids:
        """Token ids of this number, the same for all arms; remembers their hash."""
        known = self.found.prompts.setdefault(self.cell, {})
        if number not in self.ids:
            seed, texts = prompt_seed(self.config.seed, number), self.found.texts
            ids_BS = prompts(self.cell, self.session.vocab, seed, texts.get(self.cell.scenario))
            self.ids[number] = ids_BS
            known[number] = hash_ids(self.ids[number])
        return self.ids[number]

    def _late(self) -> int:
        """Blocks at the beginning that were still warm-up for some arm: they are marked so."""
        series = [turns.by_block("e2e_s") for turns in self._turns().values()]
        kept = sorted({place for of in series for place in of})
        cut = max((late_start([*of.values()]) for of in series), default=0)
        late = {block for _, block in kept[:cut]}
        if late:
            self.found.samples[:] = [
                replace(s, reason="warmup") if self._counts(s) and s.block in late else s
                for s in self.found.samples
            ]
        return len(late)

    def _narrow(self) -> bool:
        """Whether every primary ratio of every arm is known well enough to end."""
        turns = self._turns()
        base = turns.pop(next(iter(self.session.workers)), None)
        widths = [
            _half_width(*pairs(base, own, metric), self.config.level)
            for own in turns.values()
            for metric in self.primary
            if base is not None
        ]
        return all(width <= self.config.half_width for width in widths)

    def _turns(self) -> dict[str, Turns]:
        found = collect(sample for sample in self.found.samples if self._counts(sample))
        return {arm: turns for (arm, _), turns in found.items()}

    def _counts(self, sample: Sample) -> bool:
        same = sample.cell == self.cell and sample.session == self.session.number
        return same and sample.reason is None


def _half_width(before: list[float], after: list[float], level: float) -> float:
    """Of the interval of the log-ratio; infinite where there is none."""
    if not before:
        return math.inf
    ci = paired(log_ratios(before, after), level).ci
    return (ci[1] - ci[0]) / 2 if ci else math.inf


def _seconds(sample: Sample) -> float:
    assert sample.done_ns is not None
    return (sample.done_ns - sample.submit_ns) / 1e9
