"""Energy of an output token: a counter of the device, while nothing but one arm works.

Counters advance in steps of some 20 to 100 ms, longer than a turn of a block, so that energy has a
pass of its own after the timed blocks. What is reported is the mean power between the first and the
last step of the counter within the window, times the time that a token took in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from optpipe.bench import nvml
from optpipe.bench.backend import Backend, Ids
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell, prompt_seed, prompts
from optpipe.bench.timed.blocks import PATIENCE, Session
from optpipe.bench.timed.clock import Clock, generate
from optpipe.bench.timed.samples import AGAIN, Measured
from optpipe.bench.timed.timing import WARM
from optpipe.errors import StageError
from optpipe.stage import Progress

LEAST_S, LEAST_UPDATES = 10.0, 100
POLL_S = 0.01
POWERCAP = Path("/sys/class/powercap")
OFF = "bench.energy_s=0: energy was not asked for"
APART = "energy is counted of arms that lie loaded beside the baseline"
SERVED = "requests of a server come and go: there is no window of nothing but work"
Entry = dict[str, Any]


class Counter(Protocol):
    """Energy that a device has taken, J, from an arbitrary zero."""

    name: str

    def joules(self) -> float: ...


class Rapl:
    """The CPU packages of the machine, without its memory; needs the right to read the counters.

    Raises OSError where they are not there or must not be read.
    """

    name = "RAPL, all CPU packages"

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = [*folder.glob("intel-rapl:?"), *folder.glob("intel-rapl:??")]
        self._files = [zone / "energy_uj" for zone in sorted(zones) if _line(zone / "name")[:7]
                       == "package"]  # fmt: skip
        if not self._files:
            raise OSError(f"no CPU package counts energy in {folder}")
        self._ranges = [int(_line(f.with_name("max_energy_range_uj"))) for f in self._files]
        self._last = [int(_line(file)) for file in self._files]
        self._wraps = [0] * len(self._files)

    def joules(self) -> float:
        now = [int(_line(file)) for file in self._files]
        for i, value in enumerate(now):
            self._wraps[i] += value < self._last[i]
        self._last = now
        return sum(v + w * r for v, w, r in zip(now, self._wraps, self._ranges, strict=True)) / 1e6


@dataclass(frozen=True, kw_only=True)
class Worked:
    """The answer to :class:`Work`."""

    begin_ns: int
    end_ns: int
    iterations: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Repeat an iteration for so many seconds, at least once, after one that does not count."""

    ids_BS: Ids
    new_tokens: int
    seconds: float

    def __call__(self, backend: Backend) -> Worked:
        clock, iterations = time.perf_counter_ns, 0
        generate(backend, self.ids_BS, self.new_tokens, None, clock)  # the process is new
        backend.device_s()
        begin_ns = end_ns = clock()
        while end_ns - begin_ns < self.seconds * 1e9:
            generate(backend, self.ids_BS, self.new_tokens, None, clock)
            backend.device_s()  # forgets the events
            iterations, end_ns = iterations + 1, clock()
        return Worked(begin_ns=begin_ns, end_ns=end_ns, iterations=iterations)


Reading = tuple[int, float]
"""(nanoseconds, J)."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Mean power between the first and the last step of a counter in a window."""

    watts: float
    updates: int
    """Steps of the counter between them."""
    window_s: float


def power(readings: Sequence[Reading], begin_ns: int, end_ns: int) -> Power | str:
    """Of a window; why there is none where it is too short or the counter too slow."""
    steps = [
        now
        for before, now in pairwise(readings)
        if now[1] != before[1] and begin_ns <= now[0] <= end_ns
    ]
    window_s, updates = (end_ns - begin_ns) / 1e9, max(len(steps) - 1, 0)
    if window_s < LEAST_S or updates < LEAST_UPDATES:
        return (
            f"{updates} updates of the counter in {window_s:.1f} s; {LEAST_UPDATES} in "
            f"{LEAST_S:g} s are the fewest"
        )
    (first_ns, first), (last_ns, last) = steps[0], steps[-1]
    watts = (last - first) / ((last_ns - first_ns) / 1e9)
    return Power(watts=watts, updates=updates, window_s=window_s)


def counter_of(gpu: str | None) -> Counter:
    """That of a GPU by its UUID, or of the CPU. Raises OSError where there is none."""
    return Rapl() if gpu is None else nvml.Board(gpu)


def measure_energy(
    session: Session,
    cells: Sequence[Cell],
    config: BenchConfig,
    found: Measured,
    progress: Progress,
    find: Callable[[str | None], Counter] = counter_of,
) -> None:
    """Every arm in every cell after it was timed; adds to ``found.energy``."""
    counters: dict[str | None, Counter] = {}
    missing: dict[str | None, str] = {}
    for gpu in {loaded.gpu for loaded in session.loaded.values()}:
        try:
            counter = find(gpu)
            counter.joules()
        except OSError as error:
            missing[gpu] = f"no counter of energy: {error}"
        else:
            counters[gpu] = counter
    idle = {gpu: _idle(counter, session.clock) for gpu, counter in counters.items()}
    arms = [name for name in session.workers if name != AGAIN]
    for index, (cell, name) in enumerate((cell, name) for cell in cells for name in arms):
        progress(f"energy: {cell}", index, len(cells) * len(arms))
        gpu = session.loaded[name].gpu
        why = missing.get(gpu) or found.dead.get(name) or found.dropped.get((name, cell))
        if cell in found.rates:
            why = why or SERVED
        found.energy[name, cell] = why or _spent(
            session, name, cell, (config, found), (counters[gpu], idle[gpu])
        )


def _spent(
    session: Session,
    name: str,
    cell: Cell,
    run: tuple[BenchConfig, Measured],
    counted: tuple[Counter, Power | str],
) -> Entry | str:
    """What one arm took in one cell, or why that is not known."""
    (config, found), (counter, idle), worker = run, counted, session.workers[name]
    seed, texts = prompt_seed(config.seed, WARM), found.texts.get(cell.scenario)
    ids_BS = prompts(cell, session.vocab, seed, texts)
    work = Work(ids_BS=ids_BS, new_tokens=cell.new_tokens, seconds=config.energy_s)
    end_ns = session.clock() + 1e9 * (config.energy_s + PATIENCE * config.iteration_limit_s)
    readings: list[Reading] = []
    try:
        worker.submit(work, f"energy of {cell}")
        while not worker.answered(POLL_S) and session.clock() < end_ns:
            readings.append((session.clock(), counter.joules()))
        worked: Worked = worker.result(f"energy of {cell}", 0.0)
    except (TimeoutError, StageError) as error:
        worker.kill()
        found.dead[name] = f"its process was ended while its energy was counted: {error}"
        return found.dead[name]
    own = power(readings, worked.begin_ns, worked.end_ns)
    return own if isinstance(own, str) else _entry(own, idle, worked, cell, counter.name)


def _idle(counter: Counter, clock: Clock) -> Power | str:
    """The power of a device on which all arms lie loaded and none works."""
    begin_ns, readings = clock(), []
    while clock() - begin_ns <= 1.1 * LEAST_S * 1e9:
        readings.append((clock(), counter.joules()))
        time.sleep(POLL_S)
    return power(readings, begin_ns, clock())


def _entry(own: Power, idle: Power | str, worked: Worked, cell: Cell, source: str) -> Entry:
    """For report.json: J of a request, that is of a row, and of an output token of it."""
    request_s = own.window_s / worked.iterations / cell.batch
    rest, why = (None, idle) if isinstance(idle, str) else (own.watts - idle.watts, "")
    if rest is not None and rest <= 0:
        rest, why = None, f"{own.watts:.1f} W at work are not above those when idle"
    above = None if rest is None else rest * request_s
    values = {
        "idle_w": None if isinstance(idle, str) else idle.watts,
        "j_per_request_above_idle": above,
        "j_per_token_above_idle": None if above is None else above / cell.new_tokens,
    }
    return {
        "source": source,
        "window_s": own.window_s,
        "updates": own.updates,
        "power_w": own.watts,
        "j_per_request": own.watts * request_s,
        "j_per_token": own.watts * request_s / cell.new_tokens,
        **values,
        "reasons": {key: why for key, value in values.items() if value is None},
    }


def entry(
    measured: Measured, name: str, cell: Cell, config: BenchConfig, why: str
) -> tuple[Entry | None, dict[str, str]]:
    """``energy`` of a cell, or the reason why there is none; ``why`` it was not timed, if so."""
    told = measured.energy.get((name, cell))
    if told is None:
        told = (OFF if not config.energy_s else why) or measured.dead.get(name) or APART
    return (None, {"energy": told}) if isinstance(told, str) else ({**told}, {})


def _line(file: Path) -> str:
    return file.read_text().strip()
