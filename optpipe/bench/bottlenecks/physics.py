"""What the machine can do and what each artifact asks of it, found in a process of its own.

The parent of a benchmark imports no torch, and a probe of a ceiling leaves no threads behind.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from optpipe.bench.bottlenecks.bottleneck import Costs, HostTimes
from optpipe.bench.bottlenecks.ceilings import Ceilings, measure
from optpipe.bench.bottlenecks.cost import PhaseCosts
from optpipe.bench.bottlenecks.realised import TIMES
from optpipe.bench.bottlenecks.roofline import floor_s
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What :func:`optpipe.bench.bottlenecks.bottleneck.attach` needs beside a report."""

    costs: Costs
    ceilings: Ceilings
    host_s: HostTimes

    @property
    def floors(self) -> dict[tuple[str, Cell], dict[str, float]]:
        """(arm, cell) -> the least seconds that the ceilings allow each of its times."""
        return {
            key: {
                metric: floor_s(phase, self.ceilings)
                for metric, phase in (("prefill_s", cost.prefill), ("tpot_s", cost.decode))
                if phase is not None
            }
            for key, cost in self.costs.items()
        }


def survey(arms: Sequence[Arm], cells: Sequence[Cell], threads: int) -> Physics:
    """Costs and host times of every arm in every cell, and ceilings at their working sets.

    Opens the artifacts one by one. Nothing else should run meanwhile: call it before the workers
    of a session start or after they ended.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as child:
        return child.submit(_survey, list(arms), list(cells), threads).result()


def _survey(arms: Sequence[Arm], cells: Sequence[Cell], threads: int) -> Physics:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler would write to the screen
    import torch

    from optpipe.bench.bottlenecks import executed, profile  # here: they import torch, too

    costs = {
        (arm.name, cell): cost
        for arm in arms
        for cell, cost in executed.costs(arm.artifact, arm.dtype, cells).items()
    }
    host_s: dict[tuple[str, Cell], dict[str, float]] = {}
    if not torch.cuda.is_available():  # where kernels run beside the host, CUDA events must tell
        for arm in arms:
            spent = profile.host_s(arm)
            host_s |= {(arm.name, cell): dict.fromkeys(TIMES, spent) for cell in cells}
    sizes = {size for cost in costs.values() for size in _sizes(cost)}
    return Physics(costs=costs, ceilings=measure(threads, sizes), host_s=host_s)


def _sizes(cost: PhaseCosts) -> set[float]:
    """The working sets of its weights, to one digit: few sizes, near enough for a curve."""
    phases = (phase for phase in (cost.prefill, cost.decode) if phase)
    return {float(f"{phase.traffic['weights'].working_set:.0e}") for phase in phases}
