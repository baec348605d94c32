"""The paired, interleaved design: in every block every arm runs once, in random order, on the same
token ids, so that whatever drifts on the machine drifts for all arms alike.

Two identical arms timed one after the other instead "differ" in 38 to 66 % of trials.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.bench.clock import metrics
from optpipe.bench.load import Load, search
from optpipe.bench.machine import usable_cores
from optpipe.bench.quality import QualityConfig
from optpipe.bench.scenario import Cell, Scenario, Texts, hash_ids, prompts
from optpipe.bench.serve import Serve, Served
from optpipe.bench.worker import Iterate, Iteration, Loaded, Worker
from optpipe.errors import InputError
from optpipe.stage import Progress

DTYPES = ("float32", "float16", "bfloat16")
SETTLE_S = 0.02
"""Pause between two arms: threads of the last one that still spin go to sleep."""
PATIENCE = 3.0
"""A worker is ended when it has not answered for this many times the limit of an iteration."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How long and how often to measure."""

    blocks: int = 10
    """Paired repeats of every cell; six is the fewest that give an interval at 95 %."""
    warmup: int = 2
    """Untimed iterations of every arm before each cell, at least 2."""
    budget_s: float = 120.0
    """Time for all timed cells together; a cell stops early after a whole block, at least one."""
    iteration_limit_s: float = 20.0
    """An arm whose warm-up iteration takes longer is dropped from that cell, with that reason."""
    threads: int | None = None
    """Threads of every arm; null: the cores this process may use."""
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    """What the baseline computes in, once for each; the first is that of all torch arms."""
    seed: int = 0
    """Of the token ids and of the order of the arms."""
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        least = {"blocks": 1, "warmup": 2, "budget_s": 0, "iteration_limit_s": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"bench.{name}={getattr(self, name)}: at least {low} is needed")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"bench.threads={self.threads}: at least 1, or null for all cores")
        if not self.dtypes or len(set(self.dtypes)) < len(self.dtypes):
            raise InputError(f"bench.dtypes={list(self.dtypes)}: one or more, each once")
        if unknown := sorted(set(self.dtypes) - set(DTYPES)):
            raise InputError(f"bench.dtypes: '{unknown[0]}' is not one of {', '.join(DTYPES)}")

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One iteration of one arm, raw. ``block`` counts within its session, from 0."""

    arm: str
    cell: Cell
    session: int
    block: int
    position: int
    """Place of the arm within its block."""
    reason: str | None
    """Why it is not part of any result: 'warmup', 'dropped'; None: it is."""
    submit_ns: int
    start_ns: int
    token_ns: tuple[int, ...]
    cpu_s: float
    peak_bytes: int | None
    tokens_hash: str
    served: Served | None = None
    """The requests, where the cell has a server."""

    @property
    def metrics(self) -> dict[str, float | None]:
        if self.served is not None:
            return self.served.metrics
        return metrics(self.submit_ns, self.start_ns, self.token_ns, self.cell.batch)


@dataclass(kw_only=True)
class Measured:
    """Everything the timed part of a benchmark leaves behind."""

    samples: list[Sample] = field(default_factory=list)
    dropped: dict[tuple[str, Cell], str] = field(default_factory=dict)
    """(arm, cell) -> why it has no numbers."""
    rates: dict[Cell, float | None] = field(default_factory=dict)
    """Requests a second of cells that have a server; None: they have no rate of their own."""
    dead: dict[str, str] = field(default_factory=dict)
    """Arms that had to be ended, and why."""
    stopped: dict[Cell, str] = field(default_factory=dict)
    """Cells that ended before ``blocks`` blocks, and why."""
    prompts: dict[Cell, str] = field(default_factory=dict)
    """Hash of the token ids of each cell."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """Arms that are resident together, and what they told when they were loaded."""

    number: int
    workers: Mapping[str, Worker]
    loaded: Mapping[str, Loaded]
    budget_s: float
    scenarios: Mapping[str, Scenario] = field(default_factory=dict)
    texts: Mapping[str, Texts] = field(default_factory=dict)

    @property
    def vocab(self) -> int:
        return min(loaded.vocab for loaded in self.loaded.values())


def measure(
    session: Session,
    cells: Sequence[Cell],
    config: BenchConfig,
    found: Measured,
    progress: Progress,
) -> None:
    """Time every cell with every arm of the session; results are added to ``found``."""
    end = time.perf_counter() + session.budget_s
    rng = np.random.default_rng([config.seed, session.number])
    # short cells first: an allocator that keeps its peak would pass it on to the cells after it
    order = sorted(cells, key=lambda cell: cell.batch * cell.tokens)
    rounds = config.warmup + config.blocks
    for index, cell in enumerate(order):
        timer = _Timer(session=session, cell=cell, config=config, found=found, rng=rng)
        share_s = max(end - time.perf_counter(), 0.0) / (len(order) - index)
        for done in timer.rounds(share_s):
            progress(f"benchmark: {cell}", index * rounds + done, len(order) * rounds)
    progress("benchmark: timed", len(order) * rounds, len(order) * rounds)


@dataclass(kw_only=True)
class _Timer:
    """One cell in one session."""

    session: Session
    cell: Cell
    config: BenchConfig
    found: Measured
    rng: np.random.Generator

    def rounds(self, budget_s: float) -> Iterator[int]:
        """Warm up, then run blocks until there are enough or the time is over; yields a count."""
        end = time.perf_counter() + budget_s
        texts = self.session.texts.get(self.cell.scenario)
        ids_BS = prompts(self.cell, self.session.vocab, self.config.seed, 0, texts)
        self.found.prompts[self.cell] = hash_ids(ids_BS)
        self._drop_what_does_not_fit()
        self._find_rate()
        for number in range(self.config.warmup):
            self._block(ids_BS, number - self.config.warmup, "warmup")
            yield number + 1
        for block in range(self.config.blocks):
            if not self._arms():
                return
            if block and time.perf_counter() > end:
                self.found.stopped[self.cell] = (
                    f"the time budget (bench.budget_s={self.config.budget_s:g}) ended it "
                    f"after {block} of {self.config.blocks} blocks"
                )
                return
            self._block(ids_BS, block, None)
            yield self.config.warmup + block + 1

    def _load(self) -> Load | None:
        """What is sent, where the cell has a server."""
        scenario = self.session.scenarios.get(self.cell.scenario)
        if scenario is None or scenario.serving is None:
            return None
        return Load(
            cell=self.cell,
            serving=scenario.serving,
            vocab=self.session.vocab,
            seed=self.config.seed,
            limit_s=self.config.iteration_limit_s,
            texts=self.session.texts.get(self.cell.scenario),
        )

    def _find_rate(self) -> None:
        """Given, or the highest that the first arm, the baseline, can bear; once for all arms."""
        load, arms = self._load(), self._arms()
        if load is None or not arms or self.cell in self.found.rates:
            return
        rate, worker = load.serving.rate_per_s, self.session.workers[arms[0]]
        if load.needs_rate and rate is None:
            rate = search(load, lambda c: worker.ask(c, str(self.cell), PATIENCE * c.longest_s))
            if rate is None:
                why = f"'{arms[0]}' keeps the objective at no rate that was tried"
                self.found.dropped |= {(name, self.cell): why for name in arms}
        self.found.rates[self.cell] = rate if load.needs_rate else None

    def _command(self, ids_BS: Ids, block: int, limit_ns: int | None) -> Iterate | Serve:
        load = self._load()
        if load is None:
            return Iterate(ids_BS=ids_BS, new_tokens=self.cell.new_tokens, limit_ns=limit_ns)
        return load.command(block, self.found.rates[self.cell])

    def _arms(self) -> list[str]:
        """The arms that are still in this cell."""
        return [
            name
            for name in self.session.workers
            if name not in self.found.dead and (name, self.cell) not in self.found.dropped
        ]

    def _drop_what_does_not_fit(self) -> None:
        for name, loaded in self.session.loaded.items():
            if self.cell.tokens > loaded.capacity:
                self.found.dropped[name, self.cell] = (
                    f"{self.cell.tokens} tokens do not fit in its KV cache of {loaded.capacity}"
                )

    def _block(self, ids_BS: Ids, block: int, reason: str | None) -> None:
        """Run every arm once, in random order."""
        arms = self._arms()
        for position, index in enumerate(self.rng.permutation(len(arms))):
            time.sleep(SETTLE_S)
            sample = self._run(arms[index], ids_BS, (block, position), reason)
            if sample is not None:
                self.found.samples.append(sample)

    def _run(
        self, name: str, ids_BS: Ids, place: tuple[int, int], reason: str | None
    ) -> Sample | None:
        """One iteration of one arm; None if it does not come back, which ends its process."""
        limit_s = self.config.iteration_limit_s
        limit_ns = int(limit_s * 1e9) if reason else None
        worker, doing = self.session.workers[name], str(self.cell)
        command = self._command(ids_BS, place[0], limit_ns)
        if isinstance(command, Serve):
            limit_s += command.longest_s
        submit_ns = worker.submit(command, doing)
        try:
            answer: Iteration | Served = worker.result(doing, timeout_s=PATIENCE * limit_s)
        except TimeoutError as error:
            worker.kill()
            self.found.dead[name] = f"its process was ended in '{doing}': {error}"
            self.found.dropped[name, self.cell] = self.found.dead[name]
            return None
        taken_s = (answer.trace.token_ns[-1] - submit_ns) / 1e9
        if reason and taken_s > limit_s:
            self.found.dropped[name, self.cell] = (
                f"a warm-up iteration took {taken_s:.1f} s for {len(answer.trace.token_ns)} of "
                f"{self.cell.new_tokens} tokens, more than bench.iteration_limit_s={limit_s:g}"
            )
        return self._sample(name, place, reason, submit_ns, answer)

    def _sample(
        self,
        name: str,
        place: tuple[int, int],
        reason: str | None,
        submit_ns: int,
        got: Iteration | Served,
    ) -> Sample:
        return Sample(
            arm=name,
            cell=self.cell,
            session=self.session.number,
            block=place[0],
            position=place[1],
            reason=reason,
            submit_ns=submit_ns,
            start_ns=got.trace.start_ns,
            token_ns=got.trace.token_ns,
            cpu_s=got.cpu_s,
            peak_bytes=got.peak_bytes,
            tokens_hash=hash_ids(got.trace.tokens_NB),
            served=got if isinstance(got, Served) else None,
        )
