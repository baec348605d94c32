"""What the timed part of a benchmark leaves behind, raw."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from optpipe.bench.scenario import Cell, Objective, Scenario, Texts
from optpipe.bench.serving.request import Request
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
    residence: int = 0
    """Which processes of the arms made it: each set of them has one residence of its session."""
    part: int = 0
    """How often the run had been killed, and gone on, when it was made."""
    position: int
    """Place of the arm within its block."""
    reason: str | None
    """Why it is not part of any result: 'warmup', 'tainted', 'unpaired'; None: it is."""
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


def resumed(samples: Iterable[Sample], part: int = 0, begun_ns: int = 0) -> list[dict[str, Any]]:
    """After how many blocks of all cells a run that was killed went on, and how long it paused.

    The last ``part`` began at ``begun_ns``, and may have found nothing left to time.
    """
    parts: dict[int, list[Sample]] = {}
    for sample in samples:
        parts.setdefault(sample.part, []).append(sample)
    if part:
        parts.setdefault(part, [])
    found, blocks = [], set[tuple[int, Cell, int]]()
    last_ns = 0
    for part, own in sorted(parts.items()) if len(parts) > 1 else ():
        if part:
            pause_s = (min((s.submit_ns for s in own), default=begun_ns) - last_ns) / 1e9
            found.append({"after_blocks": len(blocks), "pause_s": pause_s})
        last_ns = max((s.done_ns or s.submit_ns for s in own), default=last_ns)
        blocks |= {(s.session, s.cell, s.block) for s in own if s.block >= 0}
    return found


def encode(samples: Iterable[Sample]) -> Iterator[str]:
    """Each as a line of JSON. Raises ValueError for a number that is not finite."""
    to_json = json.JSONEncoder(allow_nan=False, default=_plain).encode
    names = [field.name for field in fields(Sample)]
    cells: dict[Cell, dict[str, Any]] = {}
    for sample in samples:  # fields by name, not copied: `asdict` takes ten times as long
        record = {name: getattr(sample, name) for name in names}
        record["cell"] = cells.setdefault(sample.cell, sample.cell._asdict())
        yield to_json(record)


def decode(record: Mapping[str, Any]) -> Sample:
    """The sample of a parsed line."""
    served = record["served"]
    return Sample(
        **{
            **_tupled(record, "token_ns", "device_s"),
            "cell": Cell(**record["cell"]),
            "served": None if served is None else _served(served),
        }
    )


def _served(record: Mapping[str, Any]) -> Served:
    requests = [{**r, "chunks": tuple(map(tuple, r["chunks"]))} for r in record["requests"]]
    return Served(
        **{
            **_tupled(record, "tokens", "device_s"),
            "requests": tuple(Request(**request) for request in requests),
            "events": tuple(map(tuple, record["events"])),
            "objective": Objective(**record["objective"]),
        }
    )


def _tupled(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {**record, **{key: tuple(record[key]) for key in keys if record[key] is not None}}


def _plain(value: Any) -> Any:
    """What JSON does not know: the requests of a server."""
    assert is_dataclass(value) and not isinstance(value, type)
    return asdict(value)


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
