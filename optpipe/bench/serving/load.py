"""What is sent to a server: the requests of every block, and the rate that it can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from optpipe.bench.evidence.statistics import median
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell, Serving, Texts, prompt_seed, prompts
from optpipe.bench.serving import arrivals, goodput, request
from optpipe.bench.serving.feeds import Ask
from optpipe.bench.serving.serve import Serve, Served
from optpipe.bench.timed.samples import Measured, Sample

SEARCH_STEPS = 20
"""More than a search from any sane guess takes; the time budget ends others, and says so."""
CLOSE = 1.1
"""The search for a rate ends when it is known within this factor."""
Answer = tuple[int, Any, int]
"""Submitted, what a worker served, done."""
Asking = Callable[[str, Serve], Answer | None]
"""Asks an arm; None: it is gone, or the time is over."""
ALONE = 4
NO_RATE = "requests come as the trace or the clients have it"
SERVED = ("goodput_per_s", "good_share", "ttft_sched_s", "itl_s", "icl_max_s", "total_tokens_per_s",
          "requests_per_s", "steady_tokens_per_s", "prefill_tokens_per_s", "user_tokens_per_s",
          "user_e2e_tokens_per_s", "dispatch_lag_s", "failed")  # fmt: skip
"""Medians over the blocks of what only a server has."""
PROBES = 1_000_000
"""Blocks of the search are numbered from here: no timed block has their prompts."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Makes the commands of a server cell: the same for all arms, other prompts in every block."""

    cell: Cell
    serving: Serving
    vocab: int
    seed: int
    limit_s: float
    texts: Texts | None = None

    def command(self, block: int, rate_per_s: float | None) -> Serve:
        """The requests of one block; only a trace and a closed loop need no rate."""
        serving = self.serving
        asks = self._trace(block) if serving.arrivals == "trace" else self._asks(block, rate_per_s)
        return Serve(
            asks=tuple(asks),
            max_batch=self.cell.batch,
            limit_s=self.limit_s,
            objective=serving.objective,
            clients=serving.clients if serving.arrivals == "closed" else None,
        )

    def alone(self) -> Serve:
        """A few of the longest requests, one after the other."""
        rows = prompts(self.cell._replace(batch=ALONE), self.vocab, self.seed, self.texts)
        return Serve(
            asks=tuple(Ask(0, row, self.cell.new_tokens) for row in rows),
            max_batch=1,
            limit_s=self.limit_s,
            objective=self.serving.objective,
            clients=1,
        )

    @property
    def needs_rate(self) -> bool:
        return self.serving.arrivals in ("poisson", "burst")

    def rate(self, ask: Callable[[Serve], Answer | None]) -> float | None:
        """Requests a second: given or found by asking; None: it takes none, or none will do."""
        if not self.needs_rate or self.serving.rate_per_s is not None:
            return self.serving.rate_per_s if self.needs_rate else None

        def run(command: Serve) -> Served | None:
            answer = ask(command)
            return None if answer is None else answer[1]

        return search(self, run)

    def _asks(self, block: int, rate_per_s: float | None) -> list[Ask]:
        serving, cell, count = self.serving, self.cell, self.serving.requests
        rng = np.random.default_rng([self.seed, block])
        at_s = np.zeros(count)
        if serving.arrivals != "closed":
            assert rate_per_s is not None
            shape = serving.shape if serving.arrivals == "burst" else 1.0
            at_s = arrivals.times_s(rate_per_s, shape, count, rng)
        given = arrivals.lengths(cell.prompt_tokens, serving.sigma, count, rng)
        wanted = arrivals.lengths(cell.new_tokens, serving.sigma, count, rng)
        seed = prompt_seed(self.seed, block)
        rows = prompts(cell._replace(batch=count), self.vocab, seed, self.texts)
        every = zip(at_s, rows, given, wanted, strict=True)
        return [Ask(int(at * 1e9), row[:size], int(new)) for at, row, size, new in every]

    def _trace(self, block: int) -> list[Ask]:
        serving, seed = self.serving, [self.seed, block]
        rows = arrivals.read_trace(serving.trace_file, serving.scale)[: serving.requests]
        return [
            Ask(
                int((row.time_s - rows[0].time_s) * 1e9),
                arrivals.prompt_ids(row, serving.scale, self.vocab, seed),
                row.new_tokens,
            )
            for row in rows
        ]


def load_of(cell: Cell, found: Measured, vocab: int, config: BenchConfig) -> Load | None:
    """What is sent in a cell, if its scenario has a server."""
    scenario = found.scenarios.get(cell.scenario)
    if scenario is None or scenario.serving is None:
        return None
    return Load(
        cell=cell,
        serving=scenario.serving,
        vocab=vocab,
        seed=config.seed,
        limit_s=config.iteration_limit_s,
        texts=found.texts.get(cell.scenario),
    )


def find_rate(load: Load, arms: Sequence[str], ask: Asking, found: Measured) -> None:
    """Of a cell, once: given, or the highest that the first arm, the baseline, can bear."""
    if load.cell in found.rates or not arms:
        return
    rate = found.rates[load.cell] = load.rate(lambda command: ask(arms[0], command))
    if rate is None and load.needs_rate:
        why = f"'{arms[0]}' keeps the objective at no rate that was tried"
        why += f"; {found.hurried[load.cell]}" if load.cell in found.hurried else ""
        found.dropped |= {(name, load.cell): why for name in arms}


def entry(
    samples: Sequence[Sample], cell: Cell, found: Measured
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the report's cell of a server holds beside the rest, and the reason of every null."""
    scenario = found.scenarios.get(cell.scenario)
    if scenario is None or scenario.serving is None:
        return {}, {}
    objective, rate = asdict(scenario.serving.objective), found.rates.get(cell)
    values: dict[str, Any] = {"arrivals": scenario.serving.arrivals, "rate_per_s": rate}
    blocks = [sample.metrics for sample in samples if sample.served is not None]
    medians: dict[str, float | None] = {}
    for name in (*SERVED, *(request.LATENCIES if blocks else ())):
        there = [value for of in blocks if (value := of[name]) is not None]
        medians[name] = median(there) if there else None
    values |= {name: medians[name] for name in SERVED}
    why = request.reasons(medians)
    if rate is None:
        why["rate_per_s"] = "it was not found" if cell not in found.rates else NO_RATE
    if cell in found.hurried:
        why["rate_per_s"] = found.hurried[cell]
    return {**values, "slo": objective, "slo_kept": goodput.kept(samples)}, why


def search(load: Load, run: Callable[[Serve], Served | None]) -> float | None:
    """The highest rate at which ``run`` keeps the objective and up with the requests.

    The second matters where a block is too short for a growing queue to break the first: from the
    first arrival to the last answer it may take a tenth longer than the arrivals, and the time of
    one request alone. None: it does not even at the lowest rate tried, or does not answer.
    """
    alone = run(load.alone())
    alone_s = None if alone is None else alone.metrics["e2e_s"]
    if alone_s is None:
        return None
    number = PROBES

    def share(rate_per_s: float) -> float | None:
        nonlocal number
        number += 1
        if (found := run(load.command(number, rate_per_s))) is None:
            return None
        sched_ns = [one.sched_ns for one in found.requests]
        taken_ns = max(one.end_ns for one in found.requests) - min(sched_ns)
        kept_up = taken_ns <= 1.1 * (max(sched_ns) - min(sched_ns)) + alone_s * 1e9
        return (found.metrics["good_share"] or 0.0) if kept_up else 0.0

    return highest_rate(share, 1 / alone_s, load.serving.objective.share)


def highest_rate(
    share: Callable[[float], float | None],
    start_per_s: float,
    wanted: float,
    steps: int = SEARCH_STEPS,
) -> float | None:
    """The highest rate with a good share of at least ``wanted``, by bisection of its logarithm.

    ``share`` serves requests at a rate and tells how many were good; None ends the search.
    ``start_per_s`` is a guess: it is halved while it is too high and doubled while it is not; then
    the gap found is bisected.
    At most ``steps`` rates are tried. The answer is one that was tried and was good enough; None:
    not even the lowest was.
    """
    low, high, rate = None, None, start_per_s
    for _ in range(steps):
        if (good := share(rate)) is None:
            break
        if good >= wanted:
            low = rate
        else:
            high = rate
        if low is None or high is None:
            rate = rate * 2 if high is None else rate / 2
        elif high / low < CLOSE:
            break
        else:
            rate = (low * high) ** 0.5
    return low
