"""T13: a benchmark that is killed goes on where it was, and loses the block in progress at most."""

import errno
import fcntl
import json
import logging
import os
import platform
from contextlib import suppress
from dataclasses import replace

import pytest
from simulated import CELLS, SCENARIOS, Machine, SimWorker, built, session, speedups
from test_raw import PLAIN, SERVED

from optpipe.bench import machine
from optpipe.bench.outcome import Outcome
from optpipe.bench.timed.journal import Entry, Journal, opened
from optpipe.bench.timed.measure import BenchConfig, Measured
from optpipe.bench.timed.samples import AGAIN, resumed

FACTS = {"artifacts": {"a": "f1"}, "bench": {"blocks": 12, "seed": 0}, "node": "n", "boot": "b1"}
SCALES = {"baseline": 1.0, AGAIN: 1.0, "copy": 0.9}
CONFIG = BenchConfig(blocks=12, processes=1, max_processes=1, warmup=3, warmup_s=0.0, budget_s=1e9)
TWICE = replace(CONFIG, blocks=6, processes=2, max_processes=2)


def test_a_journal_that_cannot_be_written_costs_nothing_but_itself(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with opened(str(tmp_path / "file"), lambda: FACTS) as kept:
        assert kept.stream is None and kept.file is None
    assert "not kept in case it is killed" in caplog.text and str(tmp_path / "file") in caplog.text


pytestmark = pytest.mark.usefixtures("no_pause")


def workers(machine, scales=SCALES, killed_at=None):
    """Processes; the first of them ends everything in the midst of its iteration of this number."""

    def kill(answer, ids, worker):
        if worker.total == killed_at:
            raise KeyboardInterrupt
        return answer

    spoils = {"baseline": kill}
    return [SimWorker(machine, n, scale, spoils.get(n)) for n, scale in scales.items()]


def quiet():
    return Machine(0, sd=0, drift=0, bursts=0)


def turns(outcome):
    """(cell, block) -> the arms in their order, of blocks that are no warm-up."""
    found = {}
    for sample in outcome.measured.samples:
        if sample.block >= 0:
            found.setdefault((sample.cell, sample.block), []).append(sample.arm)
    return found


def told(found):
    """What a report says of its arms; one that was killed has had more processes."""
    for artifact in found["artifacts"]:
        for cell in artifact["cells"]:
            for entry in cell["speedup"].values():
                entry.pop("processes", None)
    return found["artifacts"]


def interrupted(pair, folder, machine, killed_at, config=CONFIG, then=SCALES):
    """A session that was killed, and went on: its outcome and the iterations of both parts."""
    first, second = workers(machine, killed_at=killed_at), workers(machine, then)
    with opened(folder, lambda: FACTS) as kept, pytest.raises(KeyboardInterrupt):
        session(machine, pair, first, config, journal=kept)
    with opened(folder, lambda: FACTS) as kept:
        outcome = session(machine, pair, second, config, journal=kept)
    return outcome, sum(worker.total for worker in (*first, *second))


# three cells of 3 + 6 iterations by the first process of an arm, and of 2 + 6 by the second: it is
# killed in warm-up, in the first, the last and some other timed block of a cell
@pytest.mark.parametrize("killed_at", [2, 4, 9, 11, 16, 27, 29, 30, 40, 51])
def test_order_and_result_are_those_of_a_session_that_was_not_killed(pair, tmp_path, killed_at):
    straight = session(machine := quiet(), pair, asked := workers(machine), TWICE)
    outcome, iterations = interrupted(pair, str(tmp_path), quiet(), killed_at, TWICE)
    assert turns(outcome) == turns(straight) and len(turns(straight)) == 3 * 12
    second = killed_at > 27
    number, at = divmod(killed_at - 28, 8) if second else divmod(killed_at - 1, 9)
    number, warm = (number + 3, 2) if second else (number, 3)
    more = iterations - sum(worker.total for worker in asked)
    assert 0 < more - 3 * min(at, warm) <= 3, "warm-up done again, and the block in progress"
    wanted, found = built(straight), built(outcome)
    assert told(found) == told(wanted)
    assert found["run"]["design"]["prompts"] == wanted["run"]["design"]["prompts"]
    [pause] = found["run"]["design"]["resumed"]
    assert pause["after_blocks"] == 6 * number + max(at - warm, 0) and pause["pause_s"] > 0
    assert wanted["run"]["design"]["resumed"] == []


def test_a_set_of_processes_that_is_finished_is_not_started_again_but_counts(pair, tmp_path):
    """Also where the time of the whole session was over when it was killed."""
    for budget_s in (1e9, 1.5):
        folder, config = str(tmp_path / str(budget_s)), replace(TWICE, budget_s=budget_s)
        with opened(folder, lambda: FACTS) as kept:
            first = workers(machine := quiet())
            straight = session(machine, pair, first, config, CELLS[:1], journal=kept)
        again = workers(machine := quiet())
        with opened(folder, lambda: FACTS) as kept:
            outcome = session(machine, pair, again, config, CELLS[:1], journal=kept)
        assert {worker.starts for worker in again} == {1}, "by their constructors alone"
        assert outcome.measured.samples == straight.measured.samples
        assert {s.residence for s in outcome.measured.samples} == {0, 1}


def test_looks_count_the_blocks_of_both_parts_and_the_budget_is_one(pair, tmp_path):
    loud, config = Machine(0, sd=0.3, bursts=0), replace(TWICE, max_processes=4)
    outcome, _ = interrupted(pair, str(tmp_path), loud, 2 * 27 + 3 + 2, config)
    cell = built(outcome)["artifacts"][1]["cells"][0]
    assert cell["blocks"] == 24, "12 are too few at the first look, and it is not taken twice"
    assert {s.residence for s in outcome.measured.samples} == {0, 1, 2, 3}
    config = BenchConfig(warmup_s=0.0, budget_s=6, blocks=30, processes=1, max_processes=1)
    counts = {}
    for killed_at in (10, 99):
        folder = tmp_path / str(killed_at)
        with opened(str(folder), lambda: FACTS) as kept:
            first = workers(machine := quiet(), killed_at=killed_at)
            if killed_at == 10:
                with pytest.raises(KeyboardInterrupt):
                    session(machine, pair, first, config, CELLS[:1], journal=kept)
            else:
                session(machine, pair, first, config, CELLS[:1], journal=kept)
        with opened(str(folder), lambda: FACTS) as kept:
            outcome = session(machine, pair, workers(machine), config, CELLS[:1], journal=kept)
        counts[killed_at] = len(turns(outcome))
        assert "the time budget (bench.budget_s=6) ended it" in outcome.measured.stopped[CELLS[0]]
    assert 14 < counts[99] - 6 < counts[10] <= counts[99], "less the warm-up done again"


def test_another_process_of_an_arm_may_have_another_speed_and_is_no_warm_up(pair, tmp_path):
    """Were it taken for one series, everything before the break would look like a late start."""
    faster = {**SCALES, "copy": 0.6}
    outcome, _ = interrupted(pair, str(tmp_path), quiet(), 3 + 7, then=faster)
    timed = [s for s in outcome.measured.samples if s.block >= 0 and s.cell == CELLS[0]]
    assert {s.reason for s in timed} == {None} and {s.part for s in timed} == {0, 1}
    entry = speedups(built(outcome), "copy")["single", "tpot_s"]
    assert entry["ci"][0] < 1.2 and entry["ci"][1] > 1.5, "and widens the interval"


class Starting(SimWorker):
    """1.3 times slower in its first 15 iterations."""

    @property
    def scale(self):
        return 1.3 if self.iterations <= 15 else 1.0

    @scale.setter
    def scale(self, _):
        pass


def test_a_start_that_no_part_alone_can_show_is_no_difference(pair, tmp_path):
    """Of 12 blocks it is seen. Of 10 and 2, or 6 and 6, after 4 iterations of warm-up each it was
    not: 12 of 20 such sessions called identical arms SLOWER."""
    config, found = BenchConfig(budget_s=1e9), []
    for seed in range(8):
        machine = Machine(seed, sd=0.02, bursts=0, drift=0.05)
        for killed_at in (14, None):
            first, again, _ = workers(machine, killed_at=killed_at)
            arms = [first, again, Starting(machine, "copy")]
            with (
                opened(str(tmp_path / str(seed)), lambda: FACTS) as kept,
                suppress(KeyboardInterrupt),
            ):
                outcome = session(machine, pair, arms, config, CELLS[:1], journal=kept)
        assert {s.part for s in outcome.measured.samples} == {0, 1}
        found.append(speedups(built(outcome), "copy")["single", "tpot_s"]["verdict"])
    assert not {"SLOWER", "FASTER"} & {*found}, found


def test_a_late_start_of_the_second_part_is_cut_there(pair, tmp_path):
    def late(answer, ids, worker):
        """Twice as slow in 3 iterations of warm-up and 4 blocks."""
        trace = answer.trace
        times = 2 if worker.iterations <= 7 else 1
        stamps = tuple(trace.start_ns + times * (t - trace.start_ns) for t in trace.token_ns)
        return replace(answer, trace=replace(trace, token_ns=stamps))

    machine = Machine(0, sd=0.01, drift=0, bursts=0)
    with opened(str(tmp_path), lambda: FACTS) as kept, pytest.raises(KeyboardInterrupt):
        session(machine, pair, workers(machine, killed_at=3 + 3), CONFIG, CELLS[:1], journal=kept)
    first, again, _ = workers(machine)
    arms = [first, again, SimWorker(machine, "copy", spoil=late)]
    with opened(str(tmp_path), lambda: FACTS) as kept:
        outcome = session(machine, pair, arms, CONFIG, CELLS[:1], journal=kept)
    timed = [s for s in outcome.measured.samples if s.block >= 0]
    cut = {(s.part, s.block) for s in timed if s.reason == "warmup"}
    assert {(1, 2), (1, 3), (1, 4), (1, 5)} <= cut, "those of the first part are right"
    assert {part for part, _ in cut} == {1} and len(cut) <= 8


def test_turns_are_as_long_as_before_however_fast_the_arms_have_become(pair, tmp_path):
    config = replace(CONFIG, turn_s=0.3)
    half = {name: scale / 2 for name, scale in SCALES.items()}
    outcome, _ = interrupted(pair, str(tmp_path), quiet(), 40, config, half)
    counts = {
        (cell, block): len(arms)
        for (cell, block), arms in turns(outcome).items()
        if cell == CELLS[0]
    }
    assert len({*counts.values()}) == 1 and {s.part for s in outcome.measured.samples} == {0, 1}


def test_arms_that_were_dropped_or_died_stay_so(tmp_path):
    known = dict(session=0, residence=0, cell=CELLS[0], iterations=2, done=False,
                 rate_per_s=None, hurried="h", stopped=None, prompts={7: "ab"},
                 dropped={"a": "slow"}, slow_starts={"b": "once"}, dead={"c": "broke"})  # fmt: skip
    write(tmp_path, Entry(samples=[PLAIN], **known))
    found = Measured(scenarios=SCENARIOS)
    [entry] = read(tmp_path)
    entry.restore(found)
    assert found.dropped == {("a", CELLS[0]): "slow"} and found.dead == {"c": "broke"}
    assert found.slow_starts == {("b", CELLS[0]): "once"} and found.prompts == {CELLS[0]: {7: "ab"}}
    assert found.hurried == {CELLS[0]: "h"} and found.stopped == {} == found.rates


def entry(*samples, done=False):
    return Entry(session=0, residence=0, cell=CELLS[0], samples=samples, iterations=2, done=done,
                 dropped={}, rate_per_s=0.5, hurried=None, stopped=None, prompts={}, slow_starts={},
                 dead={})  # fmt: skip


def write(folder, *entries):
    with opened(str(folder), lambda: FACTS) as kept:
        for one in entries:
            kept.add(one)


def read(folder, facts=FACTS):
    with opened(str(folder), lambda: facts) as kept:
        return [*kept.entries]


def test_what_is_written_is_what_is_read_and_a_torn_line_is_dropped(tmp_path):
    first, second = entry(PLAIN, SERVED), entry(PLAIN, PLAIN)
    write(tmp_path, first, second, entry(done=True))
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    found = read(tmp_path)
    assert [[*one.samples] for one in found] == [[PLAIN, SERVED], [PLAIN, PLAIN], []]
    assert [one.done for one in found] == [False, False, True] and found[0].is_timed
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut, count in ((ends[-1] - 1, 2), (ends[-3] + 5, 1), (ends[3], 1), (ends[0] - 1, 0)):
        file.write_bytes(whole[:cut])
        assert len(read(tmp_path)) == count
        write(tmp_path, second)
        assert len(read(tmp_path)) == count + 1, "what follows is not spoilt by it"


def test_anything_that_differs_starts_afresh_and_is_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path, entry(PLAIN))
    other = {**FACTS, "bench": {"blocks": 24, "seed": 0}, "artifacts": {"a": "f2"}}
    assert read(tmp_path, other) == []
    assert "afresh" in caplog.text and caplog.text.strip().endswith("artifacts.a, bench.blocks")
    assert len(read(tmp_path)) == 1, "and leaves the other as it is"
    assert "going on after 1 blocks" in caplog.text
    caplog.clear()
    assert read(tmp_path, {**FACTS, "artifacts": {"z": "f"}}) == [] and not caplog.text
    assert read(tmp_path, {**FACTS, "boot": "b2"}) == [] and caplog.text.count("another boot") == 1
    left = [json.loads(f.read_text().splitlines()[0])["boot"] for f in tmp_path.iterdir()]
    assert left == ["b2"], "nobody can go on with the boot before"


def test_it_is_kept_by_one_process_where_a_boot_has_a_name_and_a_folder_is_given(tmp_path, caplog):
    with opened(str(tmp_path), lambda: FACTS) as kept:
        with opened(str(tmp_path), lambda: FACTS) as second:
            assert second.stream is None and "another process" in caplog.text
        kept.add(entry(PLAIN))
        with kept.file.open("rb") as late:
            kept.remove()
            assert late.read() == b"", "nor does who opened it just before copy its blocks"
    assert not [*tmp_path.iterdir()]
    assert not read(tmp_path, {**FACTS, "boot": None}) and "does not name its boot" in caplog.text
    with opened(None, None) as nothing:
        nothing.add(entry(PLAIN))
        nothing.remove()
    assert not [*tmp_path.iterdir()]


def test_a_file_system_without_locks_costs_the_journal_alone(tmp_path, monkeypatch, caplog):
    def flock(stream, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with opened(str(tmp_path), lambda: FACTS) as kept:
        assert kept.stream is None
        kept.add(entry(PLAIN))
    assert caplog.text.strip().endswith("cannot be locked: Function not implemented")


def test_the_facts_of_a_run_hold_its_settings_and_no_folder(arm):
    outcome = Outcome(
        arms=[arm("baseline")],
        cells=CELLS,
        sessions=[["baseline"]],
        left_out={},
        content={"baseline": "f"},
        measured=Measured(scenarios=SCENARIOS),
    )
    facts = outcome.facts()
    json.dumps(facts)
    assert facts["bench"]["seed"] == 0 and facts["bench"]["quality"]["windows"] > 0
    assert "journal" not in facts["bench"] and "cache" not in facts["bench"]["quality"]
    assert facts["artifacts"] == {"baseline": "f"} and facts["sessions"] == [["baseline"]]
    assert {"machine", "versions", "boot", "code", "scenarios"} <= {*facts}
    assert facts["boot"] == machine.boot() and facts["versions"] == machine.versions()
    assert facts["machine"]["memory_bytes"] and facts["node"] == platform.node()
    assert "load" not in facts["machine"] and facts == outcome.facts()


def test_a_part_is_told_by_its_blocks_and_its_pause():
    first = [replace(PLAIN, block=b, submit_ns=b * 10**9, done_ns=(b + 1) * 10**9, token_ns=())
             for b in (-1, 0, 1)]  # fmt: skip
    second = replace(PLAIN, part=1, block=2, submit_ns=5 * 10**9, done_ns=6 * 10**9)
    assert resumed([*first, second]) == [{"after_blocks": 2, "pause_s": 3.0}]
    assert resumed(first) == [] == resumed([])
    assert resumed(first, 1, 9 * 10**9) == [{"after_blocks": 2, "pause_s": 7.0}], "nothing was left"
    assert resumed([*first, second], 1, 0) == resumed([*first, second])
    assert Journal(entries=[entry(*first), entry(second)]).part == 2
    assert Journal(entries=[entry(*first), entry(second)]).spent_s(0) == 3 + 1
    third = replace(second, residence=1, submit_ns=9 * 10**9, done_ns=11 * 10**9)
    assert Journal(entries=[entry(*first, third)]).spent_s(0) == 3 + 2, "not the start between"


def test_a_full_disk_costs_the_journal_alone(tmp_path, monkeypatch, caplog):
    """The second block is written in part; what was whole is gone on with."""
    real, room = os.write, [10_000]

    def write(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    with opened(str(tmp_path), lambda: FACTS) as kept:
        kept.add(entry(PLAIN))
        room[0] = 10
        kept.add(entry(SERVED))
        assert kept.stream is None
    assert caplog.text.strip().endswith("No space left on device")
    monkeypatch.undo()
    assert [[*one.samples] for one in read(tmp_path)] == [[PLAIN]]


def test_the_journal_of_another_process_is_left_alone(tmp_path):
    """On a shared disk two machines may have the same name, and neither boot is the other's."""
    write(tmp_path, entry(PLAIN))
    [file] = tmp_path.iterdir()
    with file.open("rb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert read(tmp_path, {**FACTS, "boot": "b2"}) == [] and file.exists()
    write(tmp_path, entry(PLAIN))
    assert len(read(tmp_path)) == 2
