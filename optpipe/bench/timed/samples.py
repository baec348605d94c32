"""What the timed part of a benchmark leaves behind, raw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optpipe.bench.scenario import Cell, Scenario, Texts
from optpipe.bench.serving.serve import Served
from optpipe.bench.timed.clock import metrics

AGAIN = "baseline-again"
"""A second, identical worker of the baseline: what the two differ by is what a run can resolve."""


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
    """Why it is not part of any result: 'warmup', 'tainted'; None: it is."""
    submit_ns: int
    start_ns: int
    token_ns: tuple[int, ...]
    cpu_s: float
    peak_bytes: int | None
    tokens_hash: str
    iteration: int = 0
    """Place of the iteration within the turn of its arm in a block."""
    prompt: int = 0
    """Number of the prompts it was given: equal numbers, equal token ids."""
    rows: int | None = None
    """Rows that every step answered."""
    done_ns: int | None = None
    """When the parent, not the arm, saw the end of it."""
    device_s: tuple[float, ...] | None = None
    """Work of the device in each step, between events of its own; None on a CPU."""
    probe_s: float | None = None
    """A fixed piece of work timed around it, where arms could not be resident together."""
    note: str | None = None
    """What happened to the machine in a tainted turn."""
    served: Served | None = None
    """All requests of the turn, where the cell has a server."""

    @property
    def metrics(self) -> dict[str, float | None]:
        if self.served is not None:
            return self.served.metrics
        return metrics(self.submit_ns, self.start_ns, self.token_ns, self.cell.batch)


@dataclass(kw_only=True)
class Measured:
    """Everything the timed part of a benchmark leaves behind."""

    scenarios: Mapping[str, Scenario] = field(default_factory=dict)
    """What the cells are points of, by name."""
    texts: Mapping[str, Texts] = field(default_factory=dict)
    """The prompts of scenarios that have their own."""
    rates: dict[Cell, float | None] = field(default_factory=dict)
    """Requests a second of cells that have a server; None: they have no rate of their own."""
    hurried: dict[Cell, str] = field(default_factory=dict)
    """Cells whose rate might be higher if the search for it had had more time, and why."""
    samples: list[Sample] = field(default_factory=list)
    dropped: dict[tuple[str, Cell], str] = field(default_factory=dict)
    """(arm, cell) -> why it has no numbers."""
    slow_starts: dict[tuple[str, Cell], str] = field(default_factory=dict)
    """(arm, cell) -> a warm-up iteration that took too long, where only one did."""
    dead: dict[str, str] = field(default_factory=dict)
    """Arms that had to be ended or broke, and why."""
    stopped: dict[Cell, str] = field(default_factory=dict)
    """Cells that ended before they had enough blocks, and why."""
    prompts: dict[Cell, dict[int, str]] = field(default_factory=dict)
    """Number of the prompts -> hash of their token ids, of each cell."""
    energy: dict[tuple[str, Cell], Mapping[str, Any] | str] = field(default_factory=dict)
    """(arm, cell) -> what `energy.measure_energy` found, or why it found nothing."""
