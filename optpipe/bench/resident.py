"""Which arms are in memory together, and the workers that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from optpipe.bench.backend import ENDPOINTS, endpoint_class
from optpipe.bench.scenario import Scenario
from optpipe.bench.worker import Arm, Loaded, Worker
from optpipe.errors import StageError
from optpipe.stage import Progress

LOAD_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Residents:
    """Loaded workers, and the arms that broke while they were loaded."""

    workers: dict[str, Worker] = field(default_factory=dict)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


Reside = Callable[[Sequence[Arm], Progress], AbstractContextManager[Residents]]


def endpoints(given: Sequence[Arm], scenarios: Mapping[str, Scenario]) -> list[Arm]:
    """The servers of all arms that have one, where a scenario sends requests."""
    if all(scenario.serving is None for scenario in scenarios.values()):
        return []
    return [
        replace(arm, name=f"{arm.name}-endpoint", find=endpoint_class, endpoint=True)
        for arm in given
        if arm.artifact.format in ENDPOINTS
    ]


@contextmanager
def reside(given: Sequence[Arm], progress: Progress) -> Iterator[Residents]:
    """Workers of these arms, loaded, and ended on the way out; an arm that breaks is left out."""
    found = Residents()
    with ExitStack() as stack:
        started = {arm.name: stack.enter_context(Worker(arm)) for arm in given}
        for index, (name, worker) in enumerate(started.items()):  # all, before a load is timed
            progress("starting workers", index, len(started))
            with _costing(name, worker, found):
                worker.imported()
        for index, (name, worker) in enumerate(started.items()):
            progress(f"loading {name}", index, len(started))
            if name not in found.broken:
                with _costing(name, worker, found):
                    found.loaded[name] = worker.load(LOAD_S)
        found.workers.update({n: w for n, w in started.items() if n in found.loaded})
        yield found


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


def plan_twice(
    sizes: Mapping[str, int], free: int, again: str
) -> tuple[list[list[str]], dict[str, str]]:
    """`plan`, with the baseline resident twice, as ``again``, if that unpairs no other arm."""
    baseline = next(iter(sizes))
    once, twice = plan(sizes, free), plan({**sizes, baseline: 2 * sizes[baseline]}, free)

    def paired(groups: Sequence[Sequence[str]]) -> set[str]:
        return {name for group in groups if baseline in group for name in group}

    if paired(twice[0]) < paired(once[0]):
        return once
    groups = [[baseline, again, *g[1:]] if g[0] == baseline else g for g in twice[0]]
    return groups, twice[1]


@contextmanager
def _costing(name: str, worker: Worker, found: Residents) -> Iterator[None]:
    """What goes wrong inside costs this arm, and no other."""
    try:
        yield
    except (StageError, TimeoutError) as error:
        worker.kill()
        found.broken[name] = str(error)
