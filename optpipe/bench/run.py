"""The benchmark as one call: load every artifact, time it, judge it, write the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from optpipe.artifact import Artifact
from optpipe.bench import cold, machine, preflight, report
from optpipe.bench.bottlenecks import bottleneck, host
from optpipe.bench.bottlenecks.physics import Physics, survey
from optpipe.bench.energy import measure_energy
from optpipe.bench.evidence.verdict import INVALID
from optpipe.bench.fidelity import gate, quality
from optpipe.bench.fidelity.reference import keep_in
from optpipe.bench.outcome import Outcome
from optpipe.bench.pages import tables
from optpipe.bench.resident import Residents, endpoints, plan_twice, reside
from optpipe.bench.scenario import Cell, Scenario, cells, prompt_seed, read_texts
from optpipe.bench.timed import journal
from optpipe.bench.timed.anchored import Alternation
from optpipe.bench.timed.contention import meter_of
from optpipe.bench.timed.measure import BenchConfig, Session
from optpipe.bench.timed.residences import Residences
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.timed.selftest import SHORT_RUNS, selftest
from optpipe.bench.timed.timing import WARM
from optpipe.bench.worker import Arm, Worker
from optpipe.errors import StageError, TimingError
from optpipe.evaluate import EvalConfig, Evaluate
from optpipe.progress import shown
from optpipe.stage import Progress

__all__ = ["BenchConfig", "run"]
log = logging.getLogger(__name__)
PROCESS_BYTES = 500_000_000
"""What a worker takes before any weights, and for activations."""
SHARE_OF_MEMORY = 0.9
ONLY_REQUESTS = "an endpoint is sent requests that come by themselves, and nothing else"


def run(
    artifacts: Sequence[Artifact],
    bench: BenchConfig,
    scenarios: Mapping[str, Scenario],
    out: Path,
    context: Mapping[str, Any],
    tasks: EvalConfig | None = None,
) -> dict[str, Any]:
    """Measure the artifacts of a run, the baseline first; writes report.json, .md and the samples.

    ``context`` is what the report says about how the run was started. After the report is written,
    raises GateError if an artifact is not as good as bench.quality asks, or not what was timed;
    StageError if an arm broke, which costs that arm only; TimingError if a verdict is INVALID.
    """
    started, start_s, about = datetime.now(UTC), time.perf_counter(), machine.describe()
    with ExitStack() as held:
        with shown("bench") as progress:
            outcome = measure_arms(arms(artifacts, bench), bench, scenarios, progress, tasks, held)
            physics = _physics(outcome, progress)
        facts = {
            **context,
            "started": started.isoformat(timespec="seconds"),
            "duration_s": time.perf_counter() - start_s,
            "seed": bench.seed,
            "threads": bench.thread_count,
            "versions": machine.versions(),
            "machine": about,
            "preflight": preflight.checks(about, outcome),
            "bench": asdict(bench),
            "scenarios": {name: asdict(scenario) for name, scenario in scenarios.items()},
        }
        found = report.build(outcome, facts)
        bottleneck.attach(found, physics.costs, physics.ceilings, physics.host_s)
        report.write(found, outcome.measured.samples, out)
        outcome.journal.remove()
    tables.show(found)
    _whole(outcome)
    gate.check(found, bench.quality, [*outcome.changed.values(), *outcome.unlike.values()])
    _valid(found)
    return found


def _physics(outcome: Outcome, progress: Progress) -> Physics:
    """Ceilings, costs and host times of all arms that are alive; the outcome gets its floors."""
    progress("bottlenecks", 0, 1)
    alive = [a for a in outcome.arms if outcome.absent(a.name) is None and not a.endpoint]
    devices = {arm.name: outcome.loaded[arm.name].device for arm in alive}
    found = survey(alive, outcome.cells, outcome.bench.thread_count, devices)
    timed_s = host.from_events(outcome.measured.samples, found.busy_s)
    outcome.floors = found.floors
    return replace(found, host_s={**found.host_s, **timed_s})


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
    held: ExitStack | None = None,
) -> Outcome:
    """Every arm in every cell; the first arm is the baseline. ``held`` keeps the journal open."""
    given = [*given, *endpoints(given, scenarios)]
    baseline = given[0]
    idle = {arm.name: f"not benchmarked: {why}" for arm in given if (why := arm.missing())}
    for name, why in idle.items():
        log.warning("'%s' is %s", name, why)
    sizes = {arm.name: PROCESS_BYTES + arm.memory_bytes() for arm in given if arm.name not in idle}
    free = int(machine.free_bytes() * SHARE_OF_MEMORY)
    groups, left_out = plan_twice(sizes, free, AGAIN)
    outcome = Outcome(
        arms=list(given),
        cells=cells(scenarios),
        sessions=groups,
        left_out={**left_out, **idle},
        bench=bench,
        free_bytes=int(machine.available_bytes() * SHARE_OF_MEMORY),
        device_free_bytes=int((machine.device_free_bytes() or 0) * SHARE_OF_MEMORY),
    )
    outcome.measured.scenarios, outcome.tasks = scenarios, tasks
    outcome.measured.dropped = _not_for_endpoints(outcome)
    outcome.measured.texts = read_texts(scenarios, baseline.artifact.path)
    outcome.content = gate.content_hashes(given)
    outcome.instrument = selftest(SHORT_RUNS)
    named = {arm.name: arm for arm in given} | {AGAIN: replace(baseline, name=AGAIN)}
    with ExitStack() if held is None else nullcontext(held) as keeps:
        outcome.journal = keeps.enter_context(journal.opened(bench.journal, outcome.facts))
        for number, names in enumerate(groups):
            _group(outcome, number, [named[name] for name in names], progress)
        cold.again(outcome, reside, progress)
    outcome.changed = gate.changed(outcome.content, gate.content_hashes(given))
    outcome.unlike = gate.audit(_emitted(outcome), outcome.judged.expected)
    return outcome


def _not_for_endpoints(outcome: Outcome) -> dict[tuple[str, Cell], str]:
    """Why they are not in cells without a server."""
    scenarios = outcome.measured.scenarios
    plain = [cell for cell in outcome.cells if scenarios[cell.scenario].serving is None]
    served = (arm.name for arm in outcome.arms if arm.endpoint)
    return {(name, cell): ONLY_REQUESTS for name in served for cell in plain}


def _group(outcome: Outcome, number: int, given: Sequence[Arm], progress: Progress) -> None:
    """Beside the baseline, if it is among them; without one that fits in memory at all, too."""
    if outcome.baseline in {arm.name for arm in given} or outcome.baseline in outcome.left_out:
        _side_by_side(outcome, number, given, progress)
    else:
        for arm in given:
            _taking_turns(outcome, arm.name, progress)


def _side_by_side(outcome: Outcome, number: int, given: Sequence[Arm], progress: Progress) -> None:
    """One group of arms that are resident together: judged, then timed in processes of their own.

    Scoring in the workers that are timed raised every later peak of memory, by 12 % in torch and by
    31 to 66 % in onnxruntime; with the heap trimmed it was still 4 and 28 %.
    """
    bench = outcome.bench
    judged = [arm for arm in given if arm.name != AGAIN and not arm.endpoint]
    with reside(judged, progress) as residents:
        outcome.broken |= residents.broken
        outcome.loaded |= residents.loaded
        outcome.broken |= cold.note(outcome, residents)
        _judge(outcome, residents, progress)
    start = partial(_session, outcome, number, given, progress)
    Residences(outcome=outcome, number=number, start=start, progress=progress).run()
    if bench.energy_s:
        with start() as session:
            measure_energy(session, outcome.cells, bench, outcome.measured, progress)


@contextmanager
def _session(
    outcome: Outcome, number: int, given: Sequence[Arm], progress: Progress
) -> Iterator[Session]:
    """New processes of these arms, which have answered one request."""
    with reside([arm for arm in given if outcome.absent(arm.name) is None], progress) as residents:
        served = (name for name, worker in residents.workers.items() if worker.arm.endpoint)
        outcome.loaded |= {name: residents.loaded[name] for name in served}
        # what earlier processes of an arm took counts, though this one failed
        timed = {sample.arm for sample in outcome.measured.samples}
        for name, why in {**residents.broken, **cold.note(outcome, residents)}.items():
            (outcome.measured.dead if name in timed else outcome.broken)[name] = why
        yield Session(
            number=number,
            workers=residents.workers,
            loaded=residents.loaded,
            journal=outcome.journal,
            meter=meter_of({told.gpu for told in residents.loaded.values() if told.gpu}),
        )


def _taking_turns(outcome: Outcome, name: str, progress: Progress) -> None:
    """An arm that does not fit in memory beside the baseline."""
    outcome.anchored.add(name)
    Alternation(
        outcome=outcome,
        name=name,
        number=len(outcome.sessions) + len(outcome.anchored),
        reside=reside,
        judge=lambda residents: _judge(outcome, residents, progress),
        progress=progress,
    ).run()


def _judge(outcome: Outcome, residents: Residents, progress: Progress) -> None:
    """What is known of every arm apart from its speed."""
    workers = {name: w for name, w in residents.workers.items() if not w.arm.endpoint}
    loaded, bench = residents.loaded, outcome.bench
    budget_s, folder = bench.quality.budget_s, outcome.arms[0].artifact.path
    if not workers:
        return
    if outcome.windows is None:
        outcome.windows = quality.prepare(workers, loaded, folder, bench.quality, bench.seed)
    else:
        budget_s = float("inf")  # as many windows as the first group had
    size = outcome.windows.ids_WS.shape[1]
    fitting = {name: w for name, w in workers.items() if loaded[name].capacity >= size}
    baseline = outcome.baseline if outcome.baseline in fitting else None
    kept = None
    if baseline is not None:
        arm, told, ids_WS = workers[baseline].arm, loaded[baseline], outcome.windows.ids_WS
        kept = keep_in(bench.quality.cache, arm, outcome.content[baseline], told, ids_WS)
    judged = quality.judge(fitting, baseline, outcome.windows, budget_s, progress, kept)
    if (cell := _audited(outcome)) is not None:
        vocab = min(told.vocab for told in loaded.values())
        able = {n: w for n, w in fitting.items() if not loaded[n].refuses(cell.batch, cell.tokens)}
        quality.expect(able, cell, vocab, prompt_seed(bench.seed, WARM), judged)
    for name, worker in fitting.items():
        judged.stops[name] = gate.stop_tokens(worker.arm.artifact.path)
        judged.faults[name] = gate.file_faults(worker.arm.artifact.path, folder)
    outcome.add(judged)
    _evaluate(outcome, workers, progress)


def _audited(outcome: Outcome) -> Cell | None:
    """The cheapest cell of seeded prompts that come one batch at a time."""
    scenarios, texts = outcome.measured.scenarios, outcome.measured.texts
    plain = [cell for cell in outcome.cells if cell.scenario not in texts
             and scenarios[cell.scenario].serving is None]  # fmt: skip
    return min(plain, key=lambda cell: cell.batch * cell.tokens, default=None)


def _emitted(outcome: Outcome) -> set[tuple[str, Cell, str]]:
    """What each arm answered to the first prompts of the timed blocks, each of its processes."""
    # disturbed blocks and late starts too: how long an answer took does not change it
    first = (s for s in outcome.measured.samples if s.prompt == WARM and s.block >= 0)
    return {(s.arm, s.cell, s.tokens_hash) for s in first}


def _evaluate(outcome: Outcome, workers: Mapping[str, Worker], progress: Progress) -> None:
    """The user's tasks, on every arm that is there; the baseline only in its first session."""
    if outcome.tasks is None:
        return
    command = Evaluate(config=outcome.tasks, tokenizer=outcome.arms[0].artifact.path.resolve())
    for index, (name, worker) in enumerate(workers.items()):
        progress(f"evaluating {name}", index, len(workers))
        if outcome.absent(name) is None and name not in outcome.evaluated:
            try:
                outcome.evaluated[name] = worker.ask(command, "evaluation")
            except StageError as error:  # it costs this arm its evaluation, and the run its success
                worker.kill()
                outcome.broken[name] = str(error)


def _whole(outcome: Outcome) -> None:
    """Raise StageError if an arm broke: the report has all the others, but this is no success."""
    broken = {**outcome.broken, **outcome.measured.dead}
    for name in (arm.name for arm in outcome.arms if arm.name in broken):
        raise StageError(f"'{name}' broke in the benchmark: {broken[name]}")


def _valid(found: Mapping[str, Any]) -> None:
    """Raise TimingError if a verdict is INVALID: the report says so, and the exit code, too."""
    for artifact, cell in ((a, cell) for a in found["artifacts"] for cell in a["cells"]):
        where = f"'{artifact['name']}', {cell['scenario']}"
        for metric, entry in cell["speedup"].items():
            if entry.get("verdict") == INVALID:
                raise TimingError(f"{where}, {metric}: INVALID: {entry['reason']}")
