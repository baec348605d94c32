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
from optpipe.bench import gate, machine, quality, report, tables
from optpipe.bench.measure import BenchConfig, Session, measure
from optpipe.bench.outcome import Outcome
from optpipe.bench.scenario import Cell, Scenario, cells
from optpipe.bench.worker import Arm, Loaded, Worker
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

    ``context`` is what the report says about how the run was started. After the report is written,
    raises GateError if an artifact is not as good as bench.quality asks, or not what was timed.
    """
    started, start_s, host = datetime.now(UTC), time.perf_counter(), machine.describe()
    with shown("bench") as progress:
        outcome = measure_arms(arms(artifacts, bench), bench, cells(scenarios), progress)
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
    report.write(found, outcome.measured.samples, out)
    tables.show(found)
    gate.check(found, bench.quality)
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
        here = [arm for arm in given if arm.name in names]
        hashes = {arm.artifact.path: gate.content_hash(arm.artifact.path) for arm in here}
        with _resident(here, progress) as (workers, loaded):
            outcome.loaded |= loaded
            _judge(outcome, workers, hashes, bench, progress)
        with _resident(here, progress) as (workers, loaded):
            session = Session(
                number=number,
                workers=workers,
                loaded=loaded,
                budget_s=bench.budget_s / len(groups),
            )
            measure(session, wanted, bench, outcome.measured, progress)
    outcome.invalid += _invalid(outcome)
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
    outcome: Outcome,
    workers: Mapping[str, Worker],
    hashes: Mapping[Path, str],
    bench: BenchConfig,
    progress: Progress,
) -> None:
    """What is known of every arm before it is timed, in processes of its own.

    Scoring in the workers that are timed raised every later peak of memory, by 12 % in torch and by
    31 to 66 % in onnxruntime; with the heap trimmed it was still 4 and 28 %.
    """
    loaded = {name: outcome.loaded[name] for name in workers}
    budget_s = bench.quality.budget_s
    if outcome.windows is None:
        folder = outcome.arms[0].artifact.path
        outcome.windows = quality.prepare(workers, loaded, folder, bench.quality, bench.seed)
    else:
        budget_s = float("inf")  # as many windows as the first group had
    size = outcome.windows.ids_WS.shape[1]
    fitting = {name: w for name, w in workers.items() if loaded[name].capacity >= size}
    baseline = outcome.baseline if outcome.baseline in fitting else None
    judged = quality.judge(fitting, baseline, outcome.windows, budget_s, progress)
    vocab = min(told.vocab for told in loaded.values())
    for cell in sorted(outcome.cells, key=lambda cell: cell.batch * cell.tokens)[:1]:
        able = {name: w for name, w in fitting.items() if loaded[name].capacity >= cell.tokens}
        quality.expect(able, cell, vocab, bench.seed, judged)
    for name, worker in fitting.items():
        folder = worker.arm.artifact.path
        judged.hashes[name] = hashes[folder]
        judged.stops[name] = gate.stop_tokens(folder)
        judged.faults[name] = gate.file_faults(folder, outcome.arms[0].artifact.path)
    outcome.add(judged)


def _invalid(outcome: Outcome) -> list[str]:
    """Whether what was timed is what was judged."""
    folders = {arm.name: arm.artifact.path for arm in outcome.arms}
    counted = [sample for sample in outcome.measured.samples if sample.reason is None]
    emitted = {(s.arm, s.cell, s.block): s.tokens_hash for s in counted}
    judged = outcome.judged
    return [*gate.changed(judged.hashes, folders), *gate.audit(emitted, judged.expected)]
