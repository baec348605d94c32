"""A machine that only exists in numbers: its clock moves when an arm works, its noise is known."""

import math
from contextlib import contextmanager

import numpy as np

from optpipe.bench import report
from optpipe.bench.outcome import Outcome
from optpipe.bench.scenario import Cell, Scenario
from optpipe.bench.timed.clock import Trace
from optpipe.bench.timed.measure import BenchConfig, Measured, Session
from optpipe.bench.timed.residences import Residences
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.worker import Iterate, Iteration, Loaded

SCENARIOS = {
    "single": Scenario(),
    "long_text": Scenario(primary=["ttft_s"]),
    "batch": Scenario(primary=["tokens_per_s"]),
}
CELLS = [Cell("single", 1, 8, 4), Cell("long_text", 1, 16, 2), Cell("batch", 4, 8, 4)]
MS = 1_000_000
VOCAB = 97
TOLD = Loaded(load_s=1.0, capacity=1024, vocab=VOCAB, weight_bytes=9, dtype="float32", device="cpu")
FACTS = {
    "command": ["optpipe"],
    "started": "2026-01-01",
    "duration_s": 1.0,
    "seed": 0,
    "threads": 1,
    "machine": {"cpu": "abacus", "cores_usable": 1, "load": [0.0, 0.0, 0.0]},
}


class Machine:
    """Noise as on a shared machine: AR(1) with 0.75, a slow drift, bursts of three times."""

    def __init__(self, seed, sd=0.05, rho=0.75, drift=0.3, bursts=0.02, processes=0.0):
        self.now_ns = 1
        self.rng = np.random.default_rng(seed)
        self.sd, self.rho, self.bursts, self.processes = sd, rho, bursts, processes
        self.state = 0.0
        self.phase, self.drift = self.rng.uniform(0, 2 * math.pi), drift
        self.last = None

    def clock(self):
        return self.now_ns

    def slowness(self):
        """By how much the next piece of work takes longer than on a quiet machine."""
        step = self.rng.normal(0, self.sd * math.sqrt(1 - self.rho**2))
        self.state = self.rho * self.state + step
        slow = self.drift * math.sin(self.phase + self.now_ns / 60e9)
        burst = 3.0 if self.rng.random() < self.bursts else 1.0
        return math.exp(self.state + slow) * burst


class SimWorker:
    """An arm that takes ``scale`` times 50 ms for the first token and 5 ms for each further one.

    ``spoil(iteration, ids, worker)`` may return another answer: that is where cheats come in.
    """

    def __init__(self, machine, name, scale=1.0, spoil=None, when_second=1.0):
        self.machine, self.name, self.scale = machine, name, scale
        self.spoil, self.when_second = spoil, when_second
        self.asked, self.loaded, self.killed, self.total, self.starts = None, TOLD, False, 0, 0
        self.start()

    def start(self):
        """A new process, which may be a little slower or quicker, larger or smaller than others."""
        draw = (
            self.machine.rng.normal(0, self.machine.processes, 2)
            if self.machine.processes
            else (0, 0)
        )
        self.luck, self.size = np.exp(draw)
        self.starts += 1
        self.iterations = 0

    def submit(self, command, doing):
        self.asked = command
        return self.machine.now_ns

    def result(self, doing, timeout_s=None):
        if not isinstance(self.asked, Iterate):
            self.machine.now_ns += 10 * MS
            return None
        self.iterations += 1
        self.total += 1
        ids, new = self.asked.ids_BS, self.asked.new_tokens
        second = self.machine.last not in (None, self.name)
        slow = self.machine.slowness() * self.scale * (self.when_second if second else 1.0)
        slow *= self.luck
        self.machine.last = self.name if self.machine.last is None else None
        start = self.machine.now_ns + MS // 10
        gaps = np.array([50 * MS, *[5 * MS] * (new - 1)]) * slow
        stamps = tuple(int(t) for t in start + np.cumsum(gaps))
        tokens = (ids.sum(-1)[None] + np.arange(new)[:, None]) % VOCAB  # (N, B)
        trace = Trace(start_ns=start, token_ns=stamps, tokens_NB=tokens)
        cpu_s = 2 * (stamps[-1] - start) / 1e9
        answer = Iteration(trace=trace, cpu_s=cpu_s, peak_bytes=int(1_000_000 * self.size))
        if self.spoil is not None:
            answer = self.spoil(answer, ids, self)
        last = answer.trace.token_ns[-1] if answer and answer.trace.token_ns else stamps[-1]
        self.machine.now_ns = max(last, start) + MS // 10
        return answer

    def kill(self):
        self.killed = True


def session(machine, arms, workers, config=None, cells=CELLS, **fields):
    """A whole benchmark on a simulated machine: the outcome, the baseline timed twice."""
    config = config or BenchConfig(warmup_s=0.0, budget_s=1e9)
    workers = {worker.name: worker for worker in workers}
    names = [name for name in workers if name != AGAIN]
    outcome = Outcome(
        arms=arms,
        cells=list(cells),
        sessions=fields.pop("sessions", [names]),
        left_out={},
        bench=config,
        measured=Measured(scenarios=SCENARIOS),
        loaded=dict.fromkeys(names, TOLD),
        **fields,
    )

    @contextmanager
    def start():
        alive = {name: w for name, w in workers.items() if outcome.absent(name) is None}
        for worker in alive.values():
            worker.start()
        yield Session(
            number=0,
            workers=alive,
            loaded=dict.fromkeys(alive, TOLD),
            clock=machine.clock,
            meter=lambda: None,
            journal=outcome.journal,
        )

    progress, clock = (lambda *what: None), machine.clock
    Residences(outcome=outcome, number=0, start=start, progress=progress, clock=clock).run()
    return outcome


def built(outcome):
    return report.build(outcome, FACTS)


def speedups(found, name):
    """(scenario, metric) -> entry, of those with a place in the family of verdicts."""
    artifact = next(a for a in found["artifacts"] if a["name"] == name)
    return {
        (cell["scenario"], metric): entry
        for cell in artifact["cells"]
        for metric, entry in cell["speedup"].items()
        if "p_holm" in entry
    }
