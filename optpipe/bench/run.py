"""The benchmark as one call: load every artifact, time it, judge it, write the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optpipe.artifact import Artifact
from optpipe.bench import machine, quality, report, tables
from optpipe.bench.anchored import Turns
from optpipe.bench.measure import BenchConfig, Session, measure
from optpipe.bench.outcome import Outcome
from optpipe.bench.resident import Residents, content_hash, plan_twice, reside
from optpipe.bench.samples import AGAIN
from optpipe.bench.scenario import Scenario, cells, read_texts
from optpipe.bench.selftest import SHORT_RUNS, selftest
from optpipe.bench.worker import Arm, Worker
from optpipe.errors import GateError, StageError
from optpipe.evaluate import EvalConfig, Evaluate
from optpipe.progress import shown
from optpipe.stage import Progress

__all__ = ["BenchConfig", "run"]
PROCESS_BYTES = 500_000_000
"""What a worker takes before any weights, and for activations."""
SHARE_OF_MEMORY = 0.9


def run(
    artifacts: Sequence[Artifact],
    bench: BenchConfig,
    scenarios: Mapping[str, Scenario],
    out: Path,
    context: Mapping[str, Any],
    tasks: EvalConfig | None = None,
) -> dict[str, Any]:
    """Measure the artifacts of a run, the baseline first; writes report.json, .md and the samples.

    ``context`` is what the report says about how the run was started. Raises GateError, after the
    report is written, if an artifact lost more than bench.quality.max_perplexity_increase;
    StageError if an arm broke, which costs that arm only.
    """
    started, start_s, host = datetime.now(UTC), time.perf_counter(), machine.describe()
    with shown("bench") as progress:
        outcome = measure_arms(arms(artifacts, bench), bench, scenarios, progress, tasks)
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
    _whole(outcome)
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
    given: Sequence[Arm],
    bench: BenchConfig,
    scenarios: Mapping[str, Scenario],
    progress: Progress,
    tasks: EvalConfig | None = None,
) -> Outcome:
    """Every arm in every cell; the first arm is the baseline."""
    baseline = given[0]
    sizes = {arm.name: PROCESS_BYTES + arm.memory_bytes() for arm in given}
    free = int(machine.available_bytes() * SHARE_OF_MEMORY)
    groups, left_out = plan_twice(sizes, free, AGAIN)
    outcome = Outcome(
        arms=list(given), cells=cells(scenarios), sessions=groups, left_out=left_out, bench=bench
    )
    outcome.measured.scenarios, outcome.tasks = scenarios, tasks
    outcome.measured.texts = read_texts(scenarios, baseline.artifact.path)
    outcome.content = _hashes(given)
    outcome.instrument = selftest(SHORT_RUNS)
    named = {arm.name: arm for arm in given} | {AGAIN: replace(baseline, name=AGAIN)}
    for number, names in enumerate(groups):
        if baseline.name in names or baseline.name in left_out:
            _side_by_side(outcome, number, [named[name] for name in names], progress)
        else:
            for name in names:
                _taking_turns(outcome, name, progress)
    for name, now in _hashes(given).items():
        if now != (then := outcome.content[name]):
            outcome.changed[name] = f"artifact_changed: {then} was loaded, {now} is there now"
    return outcome


def _hashes(given: Sequence[Arm]) -> dict[str, str]:
    """Of the files of every arm; arms of the same files are hashed once."""
    found = {path: content_hash(path) for path in {arm.artifact.path for arm in given}}
    return {arm.name: found[arm.artifact.path] for arm in given}


def _side_by_side(outcome: Outcome, number: int, given: Sequence[Arm], progress: Progress) -> None:
    """One group of arms that are resident together."""
    bench = outcome.bench
    with reside(given, progress) as residents:
        outcome.broken |= residents.broken
        outcome.loaded |= {n: told for n, told in residents.loaded.items() if n != AGAIN}
        session = Session(
            number=number,
            workers=residents.workers,
            loaded=residents.loaded,
            budget_s=bench.budget_s / len(outcome.sessions),
        )
        if residents.workers:
            measure(session, outcome.cells, bench, outcome.measured, progress)
        _judge(outcome, residents, progress)


def _taking_turns(outcome: Outcome, name: str, progress: Progress) -> None:
    """An arm that does not fit in memory beside the baseline."""
    outcome.anchored.add(name)
    Turns(
        outcome=outcome,
        name=name,
        number=len(outcome.sessions) + len(outcome.anchored),
        reside=reside,
        judge=lambda residents: _judge(outcome, residents, progress),
        progress=progress,
    ).run()


def _judge(outcome: Outcome, residents: Residents, progress: Progress) -> None:
    """Quality comes after timing, so that whole windows of logits are in no peak of memory."""
    gone, config = {*outcome.measured.dead, AGAIN}, outcome.bench.quality
    alive = {name: worker for name, worker in residents.workers.items() if name not in gone}
    capacities = {name: residents.loaded[name].capacity for name in alive}
    budget_s = config.budget_s
    if not alive:
        return
    if outcome.windows is None:
        vocab = min(residents.loaded[name].vocab for name in alive)
        folder = outcome.arms[0].artifact.path
        outcome.windows = quality.windows(
            folder, config, min(capacities.values()), vocab, outcome.bench.seed
        )
    else:
        budget_s = float("inf")  # as many windows as the first group had
    size = outcome.windows.ids_WS.shape[1]
    fitting = {name: worker for name, worker in alive.items() if capacities[name] >= size}
    baseline = outcome.baseline if outcome.baseline in fitting else None
    judged = quality.judge(fitting, baseline, outcome.windows, budget_s, progress)
    outcome.add(judged)
    _evaluate(outcome, alive, progress)


def _evaluate(outcome: Outcome, workers: Mapping[str, Worker], progress: Progress) -> None:
    """The user's tasks, on every arm that is there; the baseline only in its first session."""
    if outcome.tasks is None:
        return
    command = Evaluate(config=outcome.tasks, tokenizer=outcome.arms[0].artifact.path.resolve())
    for index, (name, worker) in enumerate(workers.items()):
        progress(f"evaluating {name}", index, len(workers))
        if outcome.absent(name) is None and name not in outcome.evaluated:
            outcome.evaluated[name] = worker.ask(command, "evaluation")


def _whole(outcome: Outcome) -> None:
    """Raise StageError if an arm broke: the report has all the others, but this is no success."""
    broken = {**outcome.broken, **outcome.measured.dead}
    for name in (arm.name for arm in outcome.arms if arm.name in broken):
        raise StageError(f"'{name}' broke in the benchmark: {broken[name]}")


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
