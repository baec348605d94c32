"""Everything a benchmark found out, before it becomes a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from optpipe.bench.measure import Measured
from optpipe.bench.quality import Judged, Windows, shortened
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm, Loaded


@dataclass(kw_only=True)
class Outcome:
    """Raw results of all arms; the first arm is the baseline."""

    arms: list[Arm]
    cells: list[Cell]
    sessions: list[list[str]]
    """Which arms were resident together."""
    left_out: dict[str, str]
    """Arms that were never loaded, and why."""
    loaded: dict[str, Loaded] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    windows: Windows | None = None
    judged: Judged = field(default_factory=Judged)
    invalid: list[str] = field(default_factory=list)
    """Why none of the timings counts."""

    @property
    def baseline(self) -> str:
        return self.arms[0].name

    def add(self, judged: Judged) -> None:
        """Take over the quality of one session; the baseline keeps that of its first."""
        if not self.judged.windows and self.windows is not None:
            self.windows = shortened(self.windows, judged.windows)
        self.judged.add(judged)

    def absent(self, name: str) -> str | None:
        """Why an arm was not there at all, if it was not."""
        return self.left_out.get(name) or self.measured.dead.get(name)

    def unpaired(self, name: str) -> str | None:
        """Why an arm cannot be compared with the baseline, if it cannot."""
        dead = self.measured.dead.get(self.baseline)
        return f"no baseline to compare with: {dead}" if dead else self.apart(name)

    def apart(self, name: str) -> str | None:
        """Why an arm and the baseline were never loaded together, if they were not."""
        if (why := self.left_out.get(self.baseline)) is not None:
            return f"no baseline to compare with: {why}"
        together = any({name, self.baseline} <= set(session) for session in self.sessions)
        return None if together else "it does not fit in memory beside the baseline"
