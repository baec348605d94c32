"""How long and how often the benchmark measures, and what it calls a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from optpipe.bench.evidence.stopping import level, looks
from optpipe.bench.fidelity.quality import QualityConfig
from optpipe.bench.machine import usable_cores
from optpipe.errors import InputError

LEAST_ENERGY_S = 12.0
"""A counter that steps every 100 ms, as that of an H100, has to step 100 times."""
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The key ``bench`` of a run."""

    blocks: int = 16
    """Paired repeats of every cell by each process of an arm."""
    processes: int = 2
    """Of every arm, one after the other, before the first look at the results: what two processes
    of one arm differ by, blocks do not show. See `stopping.looks`."""
    max_processes: int = 2
    """A cell whose intervals are still too wide at the last look ends here."""
    half_width: float = 0.05
    """A cell ends at a look where every primary ratio is known to this share of itself."""
    delta: float = 0.02
    """Ratios whose interval lies within 1 +- delta are called EQUIVALENT."""
    warmup: int = 4
    """Fewest untimed iterations of every process before each cell, at least 2: with 4, 16
    blocks show the end of a start of 15, which otherwise is like an arm that is slower."""
    warmup_s: float = 8.0
    """Warm-up of a cell, all arms together, ends here even if an arm has not settled."""
    budget_s: float = 120.0
    """Time for all timed cells together, not for the start of their processes; a cell stops early
    after a whole block, at least one of each process that is started."""
    iteration_limit_s: float = 20.0
    """An arm whose warm-up iteration takes longer is dropped from that cell, with that reason."""
    threads: int | None = None
    """Threads of every arm; null: the cores this process may use."""
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    """What the baseline computes in, once for each; the first is that of all torch arms."""
    turn_s: float | None = None
    """Least time of the baseline's turn in a block; null: 0.05 s, with an arm on a GPU 0.5 s.
    Arms that are more than twice as quick repeat as often, in less; on a GPU none takes less."""
    energy_s: float = 0.0
    """How long every arm works in every cell while its energy is counted, at least 12; 0: not."""
    seed: int = 0
    """Of the token ids and of the order of the arms."""
    journal: str | None = None
    """Folder for finished blocks: the same run, if it was killed, goes on from them; null: none."""
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        least = {"blocks": 1, "processes": 1,
                 "max_processes": self.processes, "warmup": 2, "warmup_s": 0, "budget_s": 0,
                 "iteration_limit_s": 0, "seed": 0,
                 "energy_s": LEAST_ENERGY_S if self.energy_s else 0,
                 **({} if self.turn_s is None else {"turn_s": 0.001})}  # fmt: skip
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:  # NaN is neither
                raise InputError(f"bench.{name}={getattr(self, name)}: at least {low} is needed")
        for name in ("half_width", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"bench.{name}={getattr(self, name)}: between 0 and 1 is needed")
        if self.threads is not None and not 1 <= self.threads <= usable_cores():
            raise InputError(
                f"bench.threads={self.threads}: 1 to {usable_cores()}, the cores this process may "
                "use, or null for all"
            )
        if not self.dtypes or len(set(self.dtypes)) < len(self.dtypes):
            raise InputError(f"bench.dtypes={list(self.dtypes)}: one or more, each once")
        if unknown := sorted(set(self.dtypes) - set(DTYPES)):
            raise InputError(f"bench.dtypes: '{unknown[0]}' is not one of {', '.join(DTYPES)}")

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()

    @property
    def looks(self) -> tuple[int, ...]:
        """Counts of processes of an arm at which a cell may end."""
        return looks(self.processes, self.max_processes)

    @property
    def margin(self) -> float:
        """``delta`` as a difference of logs."""
        return math.log1p(self.delta)

    @property
    def level(self) -> float:
        """Level of every interval, such that all looks together keep 95 %."""
        return level(len(self.looks))
