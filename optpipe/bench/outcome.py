"""Everything a benchmark found out, before it becomes a report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from optpipe.artifact import code
from optpipe.bench import machine
from optpipe.bench.fidelity.quality import Judged, Windows, shortened
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell, hash_ids
from optpipe.bench.timed.checks import Floors
from optpipe.bench.timed.journal import Journal
from optpipe.bench.timed.samples import Measured
from optpipe.bench.worker import Arm, Loaded
from optpipe.evaluate import EvalConfig


class Start(NamedTuple):
    """A cold start of an arm, seconds."""

    import_s: float
    load_s: float
    first_s: float | None = None
    """Of the first request, from its submission to its last token."""


@dataclass(kw_only=True)
class Outcome:
    """Raw results of all arms; the first arm is the baseline."""

    arms: list[Arm]
    cells: list[Cell]
    sessions: list[list[str]]
    """Which arms were resident together."""
    left_out: dict[str, str]
    """Arms that were never loaded, and why."""
    broken: dict[str, str] = field(default_factory=dict)
    """Arms that broke while they were loaded, and how."""
    anchored: set[str] = field(default_factory=set)
    """Arms that took turns with the baseline, each loaded anew, around a fixed piece of work."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    windows: Windows | None = None
    judged: Judged = field(default_factory=Judged)
    instrument: Mapping[str, float | bool] | None = None
    """What `selftest.selftest` found; None: it was not run."""
    content: dict[str, str] = field(default_factory=dict)
    """Arm -> hash of the bytes of its files as they were loaded."""
    changed: dict[str, str] = field(default_factory=dict)
    """Arms whose files were not the same when all was timed and judged, and how."""
    tasks: EvalConfig | None = None
    """Of lm-evaluation-harness, to be run on every arm."""
    evaluated: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm -> task -> what was found."""
    unlike: dict[str, str] = field(default_factory=dict)
    """Arms that answered otherwise when they were timed than when they were judged, and where."""
    floors: Floors = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    starts: dict[str, list[Start]] = field(default_factory=dict)
    """Cold starts of every arm."""
    free_bytes: int = 0
    device_free_bytes: int = 0
    """Of main memory and of the GPU what arms could take, before any was loaded."""

    @property
    def baseline(self) -> str:
        return self.arms[0].name

    def free(self, name: str) -> int:
        """Of the memory of the device that an arm runs on."""
        told = self.loaded.get(name)
        return self.free_bytes if told is None or told.gpu is None else self.device_free_bytes

    def facts(self) -> dict[str, Any]:
        """All that must be equal for another process to go on with the timed blocks."""
        bench = asdict(self.bench)
        for setting, name in ((bench, "journal"), (bench["quality"], "cache")):  # only folders
            del setting[name]
        return {
            "artifacts": self.content,
            "sessions": self.sessions,
            "bench": bench,
            "scenarios": {name: asdict(of) for name, of in self.measured.scenarios.items()},
            "prompts": {name: hash_ids(of.ids) for name, of in self.measured.texts.items()},
            "machine": machine.lasting(machine.describe()),
            "versions": machine.versions(),
            "node": platform.node(),
            "boot": machine.boot(),
            "code": code("bench"),
        }

    def add(self, judged: Judged) -> None:
        """Take over the quality of one session; the baseline keeps that of its first."""
        if not self.judged.windows and self.windows is not None:
            self.windows = shortened(self.windows, judged.windows)
        self.judged.add(judged)

    def absent(self, name: str) -> str | None:
        """Why an arm was not there at all, if it was not."""
        return self.left_out.get(name) or self.broken.get(name) or self.measured.dead.get(name)

    def unpaired(self, name: str) -> str | None:
        """Why the times of an arm cannot be compared with the baseline's, if they cannot."""
        if (why := self.absent(self.baseline)) is not None:
            return f"no baseline to compare with: {why}"
        return self.apart(name)

    def apart(self, name: str) -> str | None:
        """Why an arm and the baseline were never loaded together, if they were not."""
        why = self.left_out.get(self.baseline) or self.broken.get(self.baseline)
        if why is not None:
            return f"no baseline to compare with: {why}"
        together = any({name, self.baseline} <= set(session) for session in self.sessions)
        return None if together else "it does not fit in memory beside the baseline"
