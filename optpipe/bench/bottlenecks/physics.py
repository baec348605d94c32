"""What the machine can do and what each artifact asks of it, found in a process of its own.

The parent of a benchmark imports no torch, and a probe of a ceiling leaves no threads behind.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from optpipe.bench.bottlenecks.bottleneck import Costs, HostTimes
from optpipe.bench.bottlenecks.ceilings import Ceilings, measure_cpu, measure_gpu
from optpipe.bench.bottlenecks.cost import PhaseCosts
from optpipe.bench.bottlenecks.realised import TIMES
from optpipe.bench.bottlenecks.roofline import floor_s
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Arm

CPU = "cpu"
COUNTED = ("hf", "onnx", "ort", "tensorrt")
"""Formats whose products can be read from their files."""


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What :func:`optpipe.bench.bottlenecks.bottleneck.attach` needs beside a report."""

    costs: Costs
    ceilings: Mapping[str, Ceilings]
    """Of each device that an arm ran on."""
    host_s: HostTimes
    """Of arms on a CPU."""
    devices: Mapping[str, str]
    """Arm -> device."""
    busy_s: HostTimes = field(default_factory=dict)
    """Seconds the GPU works in a step, of arms on one that can be held back."""

    @property
    def floors(self) -> dict[tuple[str, Cell], dict[str, float]]:
        """(arm, cell) -> the least seconds that the ceilings allow each of its times."""
        return {
            key: {
                metric: floor_s(phase, self.ceilings[self.devices[key[0]]])
                for metric, phase in (("prefill_s", cost.prefill), ("tpot_s", cost.decode))
                if phase is not None
            }
            for key, cost in self.costs.items()
        }


def survey(
    arms: Sequence[Arm], cells: Sequence[Cell], threads: int, devices: Mapping[str, str]
) -> Physics:
    """Costs and times of every arm in every cell, and ceilings of the devices they ran on.

    ``devices``: arm -> 'cpu' or the name of a GPU, as its worker told. Opens the artifacts one by
    one. Nothing else should run meanwhile: call it before the workers of a session start or after
    they ended. What an engine with kernels of its own executes is not known: it has no costs.
    """
    known = [arm for arm in arms if arm.artifact.format in COUNTED]
    places = {arm.name: devices[arm.name] for arm in known}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as child:
        return child.submit(_survey, known, list(cells), threads, places).result()


def _survey(
    arms: Sequence[Arm], cells: Sequence[Cell], threads: int, devices: Mapping[str, str]
) -> Physics:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler would write to the screen
    from optpipe.bench.bottlenecks import executed, profile  # here: they import torch

    costs = {
        (arm.name, cell): cost
        for arm in arms
        for cell, cost in executed.costs(
            arm.artifact, arm.dtype, cells, devices[arm.name] != CPU
        ).items()
    }
    host_s: dict[tuple[str, Cell], dict[str, float]] = {}
    busy_s: dict[tuple[str, Cell], dict[str, float]] = {}
    for arm in arms:
        if devices[arm.name] == CPU:
            spent = profile.host_s(arm)
            host_s |= {(arm.name, cell): dict.fromkeys(TIMES, spent) for cell in cells}
        else:
            busy_s |= {(arm.name, c): of for c, of in profile.busy_s(arm, cells).items()}
    sizes: dict[str, set[float]] = {device: set() for device in devices.values()}
    for (name, _), cost in costs.items():
        sizes[devices[name]] |= _sizes(cost)
    ceilings = {
        device: measure_cpu(threads, of) if device == CPU else measure_gpu(of)
        for device, of in sorted(sizes.items(), key=lambda one: one[0] == CPU)
    }
    return Physics(costs=costs, ceilings=ceilings, host_s=host_s, devices=devices, busy_s=busy_s)


def _sizes(cost: PhaseCosts) -> set[float]:
    """The working sets of its weights, to one digit: few sizes, near enough for a curve."""
    phases = (phase for phase in (cost.prefill, cost.decode) if phase)
    return {float(f"{phase.traffic['weights'].working_set:.0e}") for phase in phases}
