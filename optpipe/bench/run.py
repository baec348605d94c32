"""The benchmark as one call: load every artifact, time it, judge it, write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optpipe.artifact import Artifact
from optpipe.bench import bottleneck, machine, quality, report, tables
from optpipe.bench.measure import BenchConfig, Session, measure
from optpipe.bench.outcome import Outcome
from optpipe.bench.physics import survey
from optpipe.bench.scenario import Cell, Scenario, cells
from optpipe.bench.worker import Arm, Loaded, Worker
from optpipe.errors import GateError
from optpipe.progress import shown
from optpipe.stage import Progress

__all__ = ["BenchConfig", "run"]
PROCESS_BYTES = 500_000_000
"""What a worker takes before any weights, and for activations."""
SHARE_OF_MEMORY = 0.9
LOAD_S = 1800.0


def run(
    artifacts: Sequence[Artifact],
    bench: BenchConfig,
    scenarios: Mapping[str, Scenario],
    out: Path,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the artifacts of a run, the baseline first; writes report.json, .md and the samples.

    ``context`` is what the report says about how the run was started. Raises GateError, after the
    report is written, if an artifact lost more than bench.quality.max_perplexity_increase.
    """
    started, start_s, host = datetime.now(UTC), time.perf_counter(), machine.describe()
    with shown("bench") as progress:
        outcome = measure_arms(arms(artifacts, bench), bench, cells(scenarios), progress)
        progress("bottlenecks", 0, 1)
        alive = [arm for arm in outcome.arms if arm.name in outcome.loaded]
        physics = survey(alive, outcome.cells, bench.thread_count)
    facts = {
        **context,
        "started": started.isoformat(timespec="seconds"),
        "duration_s": time.perf_counter() - start_s,
        "seed": bench.seed,
        "threads": bench.thread_count,
        "versions": machine.versions(),
        "machine": host,
        "bench": asdict(bench),
        "scenarios": {name: asdict(scenario) for name, scenario in scenarios.items()},
    }
    found = report.build(outcome, facts)
    bottleneck.attach(found, physics.costs, physics.ceilings, physics.host_s)
    report.write(found, outcome.measured.samples, out)
    tables.show(found)
    _gate(found, bench.quality.max_perplexity_increase)
    return found


def arms(artifacts: Sequence[Artifact], bench: BenchConfig) -> list[Arm]:
    """The baseline in each of its dtypes, then every other artifact, in pipeline order."""
    dtype, *others = bench.dtypes
    first, *rest = [
        Arm(name=artifact.name, artifact=artifact, dtype=dtype, threads=bench.thread_count)
        for artifact in artifacts
    ]
    return [first, *(replace(first, name=f"{first.name}-{d}", dtype=d) for d in others), *rest]


def measure_arms(
    given: Sequence[Arm], bench: BenchConfig, wanted: Sequence[Cell], progress: Progress
) -> Outcome:
    """Every arm in every cell; the first arm is the baseline."""
    sizes = {arm.name: PROCESS_BYTES + arm.memory_bytes() for arm in given}
    groups, left_out = plan(sizes, int(machine.available_bytes() * SHARE_OF_MEMORY))
    outcome = Outcome(arms=list(given), cells=list(wanted), sessions=groups, left_out=left_out)
    for number, names in enumerate(groups):
        with _resident([arm for arm in given if arm.name in names], progress) as (workers, loaded):
            outcome.loaded |= loaded
            session = Session(
                number=number,
                workers=workers,
                loaded=loaded,
                budget_s=bench.budget_s / len(groups),
            )
            measure(session, wanted, bench, outcome.measured, progress)
            _judge(outcome, workers, bench, progress)
    return outcome


def plan(sizes: Mapping[str, int], free: int) -> tuple[list[list[str]], dict[str, str]]:
    """Which arms are resident together, so that each group fits in ``free`` bytes of memory.

    The first arm is the baseline: it is in every group it fits in, since a ratio is only worth
    something between arms that were timed side by side. Also returns the arms that fit in none.
    """
    baseline, *others = sizes
    left_out = {
        name: f"needs about {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        for name, size in sizes.items()
        if size > free
    }
    groups: list[list[str]] = [] if baseline in left_out else [[baseline]]
    for name in (name for name in others if name not in left_out):
        paired = sizes[baseline] + sizes[name] <= free
        for group in groups:
            if (baseline in group) == paired and sum(sizes[n] for n in (*group, name)) <= free:
                group.append(name)
                break
        else:
            groups.append([baseline, name] if paired else [name])
    return groups, left_out


@contextmanager
def _resident(
    given: Sequence[Arm], progress: Progress
) -> Iterator[tuple[dict[str, Worker], dict[str, Loaded]]]:
    """Workers of these arms, loaded; all are ended on the way out."""
    with ExitStack() as stack:
        workers = {arm.name: stack.enter_context(Worker(arm)) for arm in given}
        for index, worker in enumerate(workers.values()):  # all, before the first load is timed
            progress("starting workers", index, len(workers))
            worker.imported()
        loaded = {}
        for index, (name, worker) in enumerate(workers.items()):
            progress(f"loading {name}", index, len(workers))
            loaded[name] = worker.load(LOAD_S)
        yield workers, loaded


def _judge(
    outcome: Outcome, workers: Mapping[str, Worker], bench: BenchConfig, progress: Progress
) -> None:
    """Quality comes after timing, so that whole windows of logits are in no peak of memory."""
    dead = outcome.measured.dead
    alive = {name: worker for name, worker in workers.items() if name not in dead}
    capacities = {name: outcome.loaded[name].capacity for name in alive}
    budget_s = bench.quality.budget_s
    if not alive:
        return
    if outcome.windows is None:
        vocab = min(outcome.loaded[name].vocab for name in alive)
        folder = outcome.arms[0].artifact.path
        outcome.windows = quality.windows(
            folder, bench.quality, min(capacities.values()), vocab, bench.seed
        )
    else:
        budget_s = float("inf")  # as many windows as the first group had
    size = outcome.windows.ids_WS.shape[1]
    fitting = {name: worker for name, worker in alive.items() if capacities[name] >= size}
    baseline = outcome.baseline if outcome.baseline in fitting else None
    judged = quality.judge(fitting, baseline, outcome.windows, budget_s, progress)
    outcome.add(judged)


def _gate(found: Mapping[str, Any], limit: float | None) -> None:
    """Raise GateError if an artifact's perplexity rose by more than ``limit``."""
    if limit is None:
        return
    base, *others = found["artifacts"]
    before = base["quality"]["perplexity"]
    for artifact in (entry for entry in others if entry["lineage"]):
        after = artifact["quality"]["perplexity"]
        if before is None or after is None:
            raise GateError(f"'{artifact['name']}' has no perplexity to hold against the limit")
        if after > before * (1 + limit):
            raise GateError(
                f"'{artifact['name']}' has perplexity {after:.3f}, {after / before - 1:.1%} over "
                f"the baseline's {before:.3f}; bench.quality.max_perplexity_increase={limit:g}"
            )
