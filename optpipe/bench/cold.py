"""Cold starts: a new process, its first load and its first request; never mixed with warm numbers.

Arms are loaded once to be judged and once for every process that is timed, so that starts come for
free; where they are fewer than three, another is made if the time allows. Files may lie in the page
cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from optpipe.bench.evidence.statistics import median
from optpipe.bench.outcome import Outcome, Start
from optpipe.bench.resident import Reside, Residents
from optpipe.bench.scenario import Cell, prompts
from optpipe.bench.timed.blocks import PATIENCE
from optpipe.bench.timed.samples import AGAIN
from optpipe.bench.worker import Iterate, Iteration, Worker
from optpipe.errors import StageError
from optpipe.stage import Progress

log = logging.getLogger(__name__)

STARTS = 3
SHARE = 0.1
"""Of the time budget that third starts may take, the quickest first."""
PROCESS_S = 1.0
"""What a process needs before it can import anything."""
DOING = "first request"
NO_ANSWER = "no first request was answered in full within bench.iteration_limit_s"
Entry = dict[str, Any]


def shape(outcome: Outcome) -> Cell:
    """What a first request asks for: the cheapest cell, so that no other shape is ever seen.

    Where all cells have a server it is one row, as the first request there is.
    """
    scenarios = outcome.measured.scenarios
    served = {name for name, scenario in scenarios.items() if scenario.serving is not None}
    plain = [cell for cell in outcome.cells if cell.scenario not in served]
    one = [cell._replace(batch=1) for cell in outcome.cells]
    return min(plain or one, key=lambda cell: cell.batch * cell.tokens)


def note(outcome: Outcome, residents: Residents) -> dict[str, str]:
    """The start of workers that were just loaded, with the first request of each.

    Those that break at it are ended, and are residents no more; returns why.
    """
    broken = {}
    for name, worker in [*residents.workers.items()]:
        told = residents.loaded[name]
        asked, first_s = shape(outcome), None
        try:
            if not worker.arm.endpoint and told.refuses(asked.batch, asked.tokens) is None:
                first_s = _first_s(worker, asked, told.vocab, outcome)
        except (StageError, TimeoutError) as error:
            worker.kill()
            del residents.workers[name]
            broken[name] = str(error)
        start = Start(import_s=told.import_s, load_s=told.load_s, first_s=first_s)
        outcome.starts.setdefault(outcome.baseline if name == AGAIN else name, []).append(start)
    return broken


def again(outcome: Outcome, reside: Reside, progress: Progress) -> None:
    """One start more of every arm that had fewer than ``STARTS``, as far as the time goes."""
    end_s = time.monotonic() + SHARE * outcome.bench.budget_s
    had = {arm.name: outcome.starts.get(arm.name, []) for arm in outcome.arms}
    usual = {name: max(map(_whole_s, of)) for name, of in had.items() if 0 < len(of) < STARTS}
    named = {arm.name: arm for arm in outcome.arms}
    for name in sorted(usual, key=lambda name: usual[name]):
        if time.monotonic() + usual[name] > end_s:
            return
        if outcome.absent(name) is None:
            with reside([named[name]], progress) as residents:
                failed = {**note(outcome, residents), **residents.broken}
            for why in failed.values():  # it was judged and timed, so only this start is lost
                log.warning("benchmark: a further cold start failed: %s", why)


def entry(starts: Sequence[Start], asked: Cell, why: str) -> Entry:
    """Medians over all starts of an arm, and each of them; ``why`` there are none, if so.

    Of imports the least: those of arms that are loaded together were at work at once.
    """
    firsts = [start.first_s for start in starts if start.first_s is not None]
    found: Entry = {
        "starts": len(starts),
        "import_s": min((start.import_s for start in starts), default=None),
        "load_s": median([start.load_s for start in starts]) if starts else None,
        "first_request_s": median(firsts) if firsts else None,
    }
    return {
        **found,
        "each_load_s": [start.load_s for start in starts],
        "each_first_request_s": firsts,
        "request": asked._asdict(),
        "reasons": {key: why or NO_ANSWER for key, value in found.items() if value is None},
    }


def _first_s(worker: Worker, asked: Cell, vocab: int, outcome: Outcome) -> float | None:
    """From the submission to the last token; None if it was cut off."""
    limit_s = outcome.bench.iteration_limit_s
    ids_BS = prompts(asked, vocab, outcome.bench.seed)
    command = Iterate(ids_BS=ids_BS, new_tokens=asked.new_tokens, limit_ns=int(limit_s * 1e9))
    submit_ns = worker.submit(command, DOING)
    answer: Iteration = worker.result(DOING, PATIENCE * limit_s)
    token_ns = answer.trace.token_ns
    return (token_ns[-1] - submit_ns) / 1e9 if len(token_ns) == asked.new_tokens else None


def _whole_s(start: Start) -> float:
    return PROCESS_S + start.import_s + start.load_s + (start.first_s or 0.0)
