"""Finished blocks on disk as they end: a benchmark that was killed goes on after the last of them.

The file is the raw samples as JSON lines, each block closed by a line of its own; whatever follows
the last such line is dropped. Its first line holds all that must be equal for blocks of two
processes to belong to one session, the boot of the machine among it: stamps count from there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from optpipe.artifact import fingerprint
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.samples import Measured, Sample, decode, encode
from optpipe.errors import one_line

log = logging.getLogger(__name__)
Facts = Mapping[str, Any]
UNNAMED = "the system does not name its boot"
ELSEWHERE = "another process is at the same benchmark"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished block of one cell in one residence of a session, or the end of the cell there."""

    session: int
    residence: int
    cell: Cell
    samples: Sequence[Sample]
    iterations: int
    """In one turn of an arm."""
    done: bool
    """Whether it is the end of the cell."""
    rate_per_s: float | None
    hurried: str | None
    stopped: str | None
    prompts: Mapping[int, str]
    dropped: Mapping[str, str]
    slow_starts: Mapping[str, str]
    dead: Mapping[str, str]
    """As in `Measured`, of this cell."""

    @property
    def is_timed(self) -> bool:
        return not self.done and self.samples[0].block >= 0

    def restore(self, found: Measured) -> None:
        """Everything it knows but its samples."""
        if found.scenarios and found.scenarios[self.cell.scenario].serving is not None:
            found.rates[self.cell] = self.rate_per_s
        for why, of in ((self.hurried, found.hurried), (self.stopped, found.stopped)):
            if why is not None:
                of[self.cell] = why
        found.prompts.setdefault(self.cell, {}).update(self.prompts)
        found.dropped |= {(arm, self.cell): why for arm, why in self.dropped.items()}
        found.slow_starts |= {(arm, self.cell): why for arm, why in self.slow_starts.items()}
        found.dead |= self.dead


@dataclass(kw_only=True)
class Journal:
    """Of one benchmark; without a stream it keeps nothing."""

    stream: BinaryIO | None = None
    file: Path | None = None
    entries: Sequence[Entry] = ()
    """Of the processes before this one."""
    begun_ns: int = field(default_factory=time.perf_counter_ns)

    @cached_property
    def part(self) -> int:
        """How many processes left samples before this one."""
        return 1 + max((s.part for e in self.entries for s in e.samples), default=-1)

    def of(self, session: int) -> list[Entry]:
        return [entry for entry in self.entries if entry.session == session]

    def began(self, session: int, residence: int) -> bool:
        """Whether anything of a residence is left."""
        return any(entry.residence == residence for entry in self.of(session))

    def finished(self, session: int, residence: int, cells: Sequence[Cell]) -> bool:
        """Whether nothing is left to be timed of these cells in a residence."""
        ends = {e.cell for e in self.of(session) if e.done and e.residence == residence}
        return bool(ends) and ends.issuperset(cells)

    def spent_s(self, session: int) -> float:
        """What earlier processes of a session took, from their first request to the last answer."""
        stamps: dict[tuple[int, int], list[int]] = {}
        for sample in (s for entry in self.of(session) for s in entry.samples):
            ends = (sample.submit_ns, sample.done_ns or sample.submit_ns)
            stamps.setdefault((sample.residence, sample.part), []).extend(ends)
        return sum(max(of) - min(of) for of in stamps.values()) / 1e9

    def add(self, entry: Entry) -> None:
        """Write it down before anything else is measured."""
        if self.stream is None:
            return
        mark = {**vars(entry), "samples": len(entry.samples)}
        lines = [*encode(entry.samples), json.dumps(mark)]
        try:
            _append(self.stream, "".join(f"{line}\n" for line in lines).encode("ascii"))
        except OSError as error:  # the disk is full: what is measured is not lost by it
            log.warning("benchmark: no longer kept in case it is killed: %s", error.strerror)
            self.stream = None

    def remove(self) -> None:
        """The report is written: nobody has to go on from here, nor may who has just opened it."""
        if self.stream is not None:
            self.stream.truncate(0)
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@contextmanager
def opened(folder: str | None, tell: Callable[[], Facts]) -> Iterator[Journal]:
    """The journal of the benchmark that ``tell`` tells the facts of, begun or gone on with.

    To be left once the report is written: a second process would copy its blocks until then.
    None: it is not kept, nor is it where the system does not name its boot or another process
    keeps it. Removes what another boot of this machine left.
    """
    if folder is None:
        yield Journal()
        return
    if (facts := tell())["boot"] is None:
        log.warning("benchmark: not kept in case it is killed: %s", UNNAMED)
        yield Journal()
        return
    file = Path(folder) / f"{fingerprint(facts)}.jsonl"
    if (why := _refused(file)) is not None:
        log.warning("benchmark: not kept in case it is killed: %s", why)
        yield Journal()
        return
    with file.open("a+b") as stream:
        if (why := _lock(stream)) is not None:
            log.warning("benchmark: not kept in case it is killed: %s", why)
            yield Journal()
            return
        entries = _begun(stream, facts)
        if blocks := sum(entry.is_timed for entry in entries):
            log.info("benchmark: going on after %d blocks, from %s", blocks, file)
        else:
            _others(file, facts)
        yield Journal(stream=stream, file=file, entries=entries)


def _refused(file: Path) -> str | None:
    """Why it cannot be written, if so."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a+b").close()
    except OSError as error:
        return one_line(error)
    return None


def _lock(stream: BinaryIO) -> str | None:
    """Why it is not ours now, if so; the lock ends with this process, however it ends."""
    import fcntl  # not on Windows, where no boot has a name

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ELSEWHERE
    except OSError as error:  # some file systems of clusters lock nothing
        return f"'{stream.name}' cannot be locked: {error.strerror}"
    return None


def _begun(stream: BinaryIO, facts: Facts) -> list[Entry]:
    """The whole entries of a file, which ends after them from now on; one that is new begins."""
    stream.seek(0)
    samples: list[Sample] = []
    found: list[Entry] = []
    whole = read = len(head) if _parsed(head := stream.readline()) else 0
    for line in stream if whole else ():
        read += len(line)
        if (record := _parsed(line)) is None:
            break
        if "arm" in record:
            samples.append(decode(record))
            continue
        found.append(_entry(record, samples))
        samples, whole = [], read
    stream.truncate(whole)
    if not whole:
        _append(stream, json.dumps(facts).encode("ascii") + b"\n")
    return found


def _append(stream: BinaryIO, data: bytes) -> None:
    """Past the buffer, which would try again when it is closed what the disk had no room for."""
    while data:
        data = data[os.write(stream.fileno(), data) :]


def _entry(record: dict[str, Any], samples: list[Sample]) -> Entry:
    assert record["samples"] == len(samples), record
    prompts = {int(number): ids_hash for number, ids_hash in record["prompts"].items()}
    own = {"cell": Cell(*record["cell"]), "samples": samples, "prompts": prompts}
    return Entry(**{**record, **own})


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None of a line that was cut short."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith(b"\n") else None


def _others(file: Path, facts: Facts) -> None:
    """Say why this benchmark starts afresh beside unfinished ones of arms of the same names."""
    own = json.loads(json.dumps(facts))
    for other in (path for path in file.parent.glob("*.jsonl") if path != file):
        with other.open("rb") as stream:
            if _lock(stream) is not None or (head := _parsed(stream.readline())) is None:
                continue  # somebody is at it, or it has not begun
        if head["artifacts"].keys() == own["artifacts"].keys():
            differ = ", ".join(_differ(head, own))
            log.info(
                "benchmark: starting afresh: %s is unfinished, but of another %s", other, differ
            )
        if head["node"] == own["node"] and head["boot"] != own["boot"]:
            other.unlink(missing_ok=True)  # nobody can go on from it


def _differ(old: Any, new: Any, path: str = "") -> list[str]:
    """The keys of what is not equal, such as bench.blocks."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [path[1:]]
    keys = sorted({*old, *new})
    return [name for k in keys for name in _differ(old.get(k), new.get(k), f"{path}.{k}")]
