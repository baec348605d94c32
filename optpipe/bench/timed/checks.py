"""Is it a measurement at all? Whatever fails one of these checks is INVALID, by its name.

The audits are those of MLPerf inference (TEST01, TEST04: Reddi et al. 2020, arXiv:1911.02549), and
laws that any honest runner obeys whatever its speed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from optpipe.bench.evidence.statistics import median, ratio
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.clock import in_order
from optpipe.bench.timed.samples import Sample
from optpipe.bench.timed.series import Turns

Key = tuple[str, Cell]
Floors = Mapping[Key, Mapping[str, float]]
"""(arm, cell) -> metric -> the least seconds this machine's ceilings allow, as 'tpot_s': 0.004."""
IDENTITY = 0.01
PHYSICS = 0.95
SECOND_TIME = 0.9
"""An arm may be at most this much faster on prompts it has seen in the block before (TEST04)."""
SECOND_LEVEL = 0.98
HIDDEN_S, HIDDEN_SHARE = 0.02, 0.10
"""Work after the last token, or before it was submitted, that the stamps leave out."""
TAINTED, FEWEST_JUDGED = 0.20, 8
"""Share of disturbed turns that voids a cell of so many blocks; fewer decide nothing anyway."""
FEWEST_PROMPTS = 3


def failures(
    turns: Mapping[Key, Turns], floors: Floors, dead: Collection[str] = ()
) -> dict[Key, list[str]]:
    """What each arm did wrong in each cell, as 'name: details'; only those that did.

    Arms that are ``dead`` were ended, which says why they did not answer.
    """
    found: dict[Key, list[str]] = defaultdict(list)
    for (arm, cell), own in turns.items():
        if own.samples[0].served is not None:
            found[arm, cell] += _served(own.samples)
            continue
        checks = (
            _stamps(cell, own.samples),
            _identity(own),
            _witness(own.samples),
            _physics(own, floors.get((arm, cell), {})),
            _varying(own.samples),
        )
        found[arm, cell] = [why for check in checks for why in check]
    alive = {key: own for key, own in turns.items() if key[0] not in dead}
    for key, why in (*_lost(alive), *_constant(turns), *_second_time(turns)):
        found[key].append(why)
    return {key: reasons for key, reasons in found.items() if reasons}


def _served(samples: Sequence[Sample]) -> Iterator[str]:
    """What most blocks of a server say of themselves; its requests have identities of their own."""
    said: dict[str, list[str]] = defaultdict(list)
    for why in (why for s in samples if s.served for why in s.served.invalid):
        said[why.partition(":")[0]].append(why)
    yield from (whys[0] for whys in said.values() if 2 * len(whys) > len(samples))


def unstable(samples: Sequence[Sample]) -> dict[Cell, str]:
    """Cells in which the machine was disturbed too often for what is left to be trusted.

    One turn of another process in a cell that the budget ended early is no such sign.
    """
    turns: dict[Cell, dict[tuple[str, int, int], bool]] = defaultdict(dict)
    for sample in samples:
        if sample.reason in (None, "tainted"):
            turns[sample.cell][sample.arm, sample.session, sample.block] = bool(sample.note)
    shares = {cell: sum(of.values()) / len(of) for cell, of in turns.items()}
    return {
        cell: f"unstable: the machine was disturbed in {share:.0%} of all turns"
        for cell, share in shares.items()
        if share > TAINTED and _blocks(turns[cell]) >= FEWEST_JUDGED
    }


def _blocks(turns: Iterable[tuple[str, int, int]]) -> int:
    return len({(session, block) for _, session, block in turns})


def _stamps(cell: Cell, samples: Sequence[Sample]) -> Iterator[str]:
    """As many tokens as were asked for, for every row, one after the other."""
    counts = {len(sample.token_ns) for sample in samples}
    if 0 in counts:
        yield "no_tokens: it answered without a token"
    if wrong := sorted(counts - {0, cell.new_tokens}):
        yield f"token_count: {wrong[0]} tokens where {cell.new_tokens} were asked for"
    rows = {sample.rows for sample in samples} - {None, cell.batch}
    if rows:
        yield f"batch_split: {rows.pop()} rows at a time where {cell.batch} were given together"
    given = (s for s in samples if s.token_ns)
    if not all(in_order(s.submit_ns, s.start_ns, s.token_ns) for s in given):
        yield "clock_backwards: a time stamp lies before the one ahead of it"


def _identity(own: Turns) -> Iterator[str]:
    """The parts that are published, against the parent's clock around the whole request.

    Queue, prefill and TPOT for each further token cannot take longer than the request did. What
    they leave out is the matter of `hidden_work`.
    """
    for sample, of in zip(own.samples, own.metrics, strict=True):
        queue, prefill = of["queue_s"], of["prefill_s"]
        if queue is None or prefill is None or sample.done_ns is None:
            continue
        parts = queue + prefill + (of["tpot_s"] or 0.0) * (len(sample.token_ns) - 1)
        whole = (sample.done_ns - sample.submit_ns) / 1e9
        if parts > (1 + IDENTITY) * whole:
            yield (
                f"identity: its parts take {parts:.3g} s of a request that took {whole:.3g} s: "
                "something is counted twice"
            )
            return


def _witness(samples: Sequence[Sample]) -> Iterator[str]:
    """The parent's clock and the device's: no work may lie outside of the arm's stamps."""
    seen = [(s, s.done_ns) for s in samples if s.done_ns is not None and s.token_ns]
    if any(s.token_ns[-1] > done for s, done in seen):
        yield "clock_ahead: a token is stamped later than its answer arrived"
    after_s = [(done - s.token_ns[-1]) / 1e9 for s, done in seen]
    whole_s = [(done - s.submit_ns) / 1e9 for s, done in seen]
    if seen and median(after_s) > max(HIDDEN_S, HIDDEN_SHARE * median(whole_s)):
        yield f"hidden_work: {median(after_s):.3g} s pass after the last token before it answers"
    device = [(sum(s.device_s), w) for (s, _), w in zip(seen, whole_s, strict=True) if s.device_s]
    if any(device_s > (1 + IDENTITY) * wall_s for device_s, wall_s in device):
        yield "device_exceeds_wall: its device worked longer than the request took"


def _physics(own: Turns, floors: Mapping[str, float]) -> Iterator[str]:
    for metric, floor in floors.items():
        values = own.values(metric)
        if values and median(values) < PHYSICS * floor:
            yield (
                f"faster_than_physics: {metric} is {median(values):.3g}, this machine's ceilings "
                f"allow {floor:.3g}: it does not wait for its work, or the model of it is wrong"
            )


def _varying(samples: Sequence[Sample]) -> Iterator[str]:
    answers: dict[tuple[int, int, int], str] = {}
    asked = (((s.prompt, s.residence, s.part), s.tokens_hash) for s in samples)  # of a process
    if any(answers.setdefault(key, given) != given for key, given in asked):
        yield "varying_answers: equal prompts were answered by different greedy tokens"


def _lost(turns: Mapping[Key, Turns]) -> Iterator[tuple[Key, str]]:
    """Every request of a block is answered by all arms."""
    asked: dict[tuple[Cell, int, int], set[int]] = defaultdict(set)
    answered: dict[Key, int] = {}
    sessions: dict[Key, set[int]] = {}
    for (arm, cell), own in turns.items():
        for s in own.samples:
            asked[cell, s.session, s.block].add(s.iteration)
        answered[arm, cell] = len(own.samples)
        sessions[arm, cell] = {s.session for s in own.samples}
    for (arm, cell), count in answered.items():
        mine = (at for at in asked if at[0] == cell and at[1] in sessions[arm, cell])
        if count < (wanted := sum(len(asked[at]) for at in mine)):
            yield (arm, cell), f"requests_lost: {count} answers to {wanted} requests"


def _constant(turns: Mapping[Key, Turns]) -> Iterator[tuple[Key, str]]:
    """The same answer to every prompt, where another arm answers most prompts differently."""
    counts = {key: _distinct(own.samples) for key, own in turns.items()}
    for (arm, cell), (answers, prompts) in counts.items():
        if prompts < FEWEST_PROMPTS or answers > 1:
            continue
        others = (count for (name, c), count in counts.items() if c == cell and name != arm)
        if any(n >= FEWEST_PROMPTS and 2 * n > asked for n, asked in others):
            yield (arm, cell), "cached_response: it gives the same answer to every prompt"


def _distinct(samples: Sequence[Sample]) -> tuple[int, int]:
    """Different answers, and different prompts."""
    return len({s.tokens_hash for s in samples}), len({s.prompt for s in samples})


def _second_time(turns: Mapping[Key, Turns]) -> Iterator[tuple[Key, str]]:
    """Blocks 2k and 2k + 1 have the same prompts; pooled over cells, to see a tenth.

    Not those of two processes, of which the second cannot have seen them.
    """
    first: dict[str, list[float]] = defaultdict(list)
    second: dict[str, list[float]] = defaultdict(list)
    for (arm, _), own in turns.items():
        taken = own.by_block("e2e_s", anchored=True)
        part = {(s.session, s.block): s.part for s in own.samples}
        for session, block in taken:
            after = (session, block + 1)
            if block % 2 == 0 and after in taken and part[after] == part[session, block]:
                first[arm].append(taken[session, block])
                second[arm].append(taken[after])
    for arm, before in first.items():
        shift = ratio(second[arm], before, SECOND_LEVEL)
        if shift.ci is not None and shift.ci[1] < SECOND_TIME:
            why = f"faster_second_time: {1 - shift.estimate:.0%} faster on prompts it has seen"
            yield from (((arm, cell), why) for name, cell in turns if name == arm)
