"""One block of the paired design: every arm has its turn on the same token ids, and answers."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from optpipe.artifact import fingerprint
from optpipe.bench.backend import Ids
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell, hash_ids, prompt_seed, prompts
from optpipe.bench.serving.load import Load, load_of
from optpipe.bench.serving.serve import Serve, Served
from optpipe.bench.timed.clock import Clock
from optpipe.bench.timed.contention import Meter, Watch, ticks
from optpipe.bench.timed.journal import Entry, Journal
from optpipe.bench.timed.samples import Measured, Sample
from optpipe.bench.worker import Command, Iterate, Iteration, Loaded, Rewarm, Worker
from optpipe.errors import StageError

SETTLE_S = 0.02
"""Pause between two arms: threads of the last one that still spin go to sleep."""
PATIENCE = 3.0
"""A worker is ended when it has not answered for this many times the limit of an iteration."""
STRIKES = 2
"""An arm is dropped when so many warm-up iterations in a row take too long; one may compile."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Arms that are resident together, the baseline first, and what they told when loaded.

    A session has several residences, in each of which every arm has a process of its own.
    """

    number: int
    workers: Mapping[str, Worker]
    loaded: Mapping[str, Loaded]
    budget_s: float = 0.0
    residence: int = 0
    clock: Clock = time.perf_counter_ns
    meter: Meter = ticks
    journal: Journal = field(default_factory=Journal)

    @property
    def vocab(self) -> int:
        return min((loaded.vocab for loaded in self.loaded.values()), default=0)


@dataclass(kw_only=True)
class Blocks:
    """Runs blocks of one cell in one session."""

    session: Session
    cell: Cell
    config: BenchConfig
    found: Measured
    iterations: int = 1
    """In one turn of an arm."""
    past: deque[Entry] = field(default_factory=deque)
    """Timed blocks that earlier parts of the session left, until they are taken over."""
    warmed: int = 0
    """Blocks of warm-up that they left."""
    first: int = 0
    """Number of the first timed block, after those of earlier residences; even."""
    watch: Watch = field(init=False)
    load: Load | None = field(init=False)
    ids: dict[int, Ids] = field(default_factory=dict)
    """The prompts of this block and the last, by number."""
    slow: Counter[str] = field(default_factory=Counter)
    """Warm-up iterations in a row that took too long, by arm."""

    def __post_init__(self) -> None:
        self.watch = Watch(meter=self.session.meter)
        self.load = load_of(self.cell, self.found, self.session.vocab, self.config)
        ran = [s.block for s in self.found.samples if self.here(s)]
        self.first = 2 * math.ceil((max(ran, default=-1) + 1) / 2)

    def here(self, sample: Sample) -> bool:
        """Of this cell and session, whatever its residence."""
        return sample.cell == self.cell and sample.session == self.session.number

    def arms(self) -> list[str]:
        """The arms that are still in this cell."""
        return [
            name
            for name in self.session.workers
            if name not in self.found.dead and (name, self.cell) not in self.found.dropped
        ]

    def recall(self) -> bool:
        """Take over what earlier parts of the residence left of this cell; whether it was all."""
        for entry in self.session.journal.of(self.session.number):
            if (entry.cell, entry.residence) != (self.cell, self.session.residence):
                continue
            entry.restore(self.found)
            if entry.done:
                return True
            if entry.is_timed:
                self.past.append(entry)
            else:
                self.warmed += 1
                self.found.samples += entry.samples
        return False

    def timed(self, count: int, first_prompt: int) -> list[Sample]:
        """The next timed block after so many: one that was left, or a new one."""
        if not self.past:
            # two blocks share their prompts: an arm that remembers would be faster in the second;
            # each set of processes is asked the same, from the first on, which is audited
            prompt = first_prompt + count // 2 * self.iterations
            return self.keep(self.run(self.first + count, prompt, None))
        samples = [*self.past.popleft().samples]
        self.found.samples += samples
        return samples

    def keep(self, samples: list[Sample], done: bool = False) -> list[Sample]:
        """Add a block to what was found, on disk too; ``done``: it is none, but the cell ends."""
        self.found.samples += samples
        if samples or done:
            self.session.journal.add(self._entry(samples, done))
        return samples

    def _entry(self, samples: list[Sample], done: bool) -> Entry:
        cell, found = self.cell, self.found
        asked = found.prompts.get(cell, {})
        return Entry(
            session=self.session.number,
            residence=self.session.residence,
            cell=cell,
            samples=samples,
            iterations=self.iterations,
            done=done,
            rate_per_s=found.rates.get(cell),
            hurried=found.hurried.get(cell),
            stopped=found.stopped.get(cell),
            prompts={s.prompt: asked[s.prompt] for s in samples},
            dropped={arm: why for (arm, at), why in found.dropped.items() if at == cell},
            slow_starts={arm: why for (arm, at), why in found.slow_starts.items() if at == cell},
            dead=dict(found.dead),
        )

    def order(self, block: int) -> list[str]:
        """The arms in random order, and in the block after it in the reverse: what comes of being
        second falls on all arms alike, exactly, not only on average.

        It follows from seed, cell and block alone, whatever was run before.
        """
        names, arms = [*self.session.workers], self.arms()
        seed = fingerprint(self.config.seed, self.session.number, self.cell, block // 2)
        shuffled = np.random.default_rng(int(seed, 16)).permutation(len(names))
        order = [name for index in shuffled if (name := names[index]) in arms]
        return order[::-1] if block % 2 else order

    def run(self, block: int, prompt: int, reason: str | None) -> list[Sample]:
        """A turn of every arm; a tainted turn taints the whole block."""
        self.ids = {number: ids for number, ids in self.ids.items() if number >= prompt}
        samples: list[Sample] = []
        for position, name in enumerate(self.order(block)):
            time.sleep(SETTLE_S)
            samples += self._turn(name, (block, position), prompt, reason)
        if reason is None and any(sample.note for sample in samples):
            samples = [replace(sample, reason="tainted") for sample in samples]
        return samples

    def _turn(
        self, name: str, place: tuple[int, int], prompt: int, reason: str | None
    ) -> list[Sample]:
        """Some iterations of one arm, each on the next prompts."""
        before = self.session.meter()
        rewarm = Rewarm(ids_BS=self._prompts(prompt))
        if len(self.session.workers) > 1 and self.ask(name, rewarm) is None:
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
        return [replace(sample, note=note) for sample in samples] if note else samples

    def _iteration(self, name: str, prompt: int, reason: str | None) -> Sample | None:
        """One iteration of one arm; None if it does not come back, which ends its process."""
        command, limit_s = self._command(prompt, reason), self.config.iteration_limit_s
        limit_s += command.longest_s if isinstance(command, Serve) else 0.0
        answer = self.ask(name, command)
        if answer is None or answer[1] is None:
            return None
        submit_ns, got, done_ns = answer
        taken_s = (done_ns - submit_ns) / 1e9
        if reason is not None:
            tokens = f"{len(got.trace.token_ns)} of {self.cell.new_tokens} tokens"
            self._strike(name, taken_s, limit_s, tokens)
        return Sample(
            arm=name,
            cell=self.cell,
            session=self.session.number,
            residence=self.session.residence,
            block=0,
            part=self.session.journal.part,
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

    def _strike(self, name: str, taken_s: float, limit_s: float, tokens: str) -> None:
        """Drop an arm that is too slow; one that was so once, as if it compiled, is only noted."""
        self.slow[name] = self.slow[name] + 1 if taken_s > limit_s else 0
        if not self.slow[name]:
            return
        why = (
            f"a warm-up iteration took {taken_s:.1f} s for {tokens}, more than "
            f"bench.iteration_limit_s={limit_s:g}"
        )
        self.found.slow_starts[name, self.cell] = f"{why}; the one after it did not"
        if self.slow[name] >= STRIKES:
            self.found.dropped[name, self.cell] = why

    def _command(self, prompt: int, reason: str | None) -> Iterate | Serve:
        """What is asked of every arm on these prompts."""
        limit_ns = int(self.config.iteration_limit_s * 1e9) if reason else None
        ids_BS = self._prompts(prompt)
        if self.load is None:
            return Iterate(ids_BS=ids_BS, new_tokens=self.cell.new_tokens, limit_ns=limit_ns)
        command = self.load.command(prompt, self.found.rates[self.cell])
        self.found.prompts[self.cell][prompt] = command.ids_hash
        return command

    def ask(self, name: str, command: Command) -> tuple[int, Iteration | Served, int] | None:
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
