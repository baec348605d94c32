"""One arm of the benchmark in a process of its own, resident for the whole session.

The parent blocks on a pipe and never spins; a worker that raises, dies or does not answer becomes
an error that names the arm and what it was doing.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from optpipe import libc
from optpipe.artifact import Artifact
from optpipe.bench import machine
from optpipe.bench.backend import NOT_DRIVEN, Backend, Ids, backend_class
from optpipe.bench.kv import KvCache
from optpipe.bench.timed.clock import Trace, generate
from optpipe.bench.timed.usage import Usage, used
from optpipe.errors import StageError

START_S = 300.0
"""Longest wait for a worker to import its runtime."""
CLOSE_S = 10.0
KILLED = -9
CPU = "cpu"
REWARM_TOKENS = 64
"""Of all rows together, with which an arm gets ready for its turn; one of each at least. What is
not ready costs it some milliseconds, which is nothing beside more tokens."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An artifact, and how to run it."""

    name: str
    artifact: Artifact
    dtype: str
    threads: int
    find: Callable[[str], type[Backend]] = backend_class
    """Format -> backend; a module-level function, since the worker looks it up by name."""
    endpoint: bool = False
    """It is sent requests alone: it runs in cells of a server, and tells no logits."""

    def memory_bytes(self) -> int:
        """Upper estimate of what its weights take once loaded."""
        return self.find(self.artifact.format).memory_bytes(self.artifact, self.dtype)

    def missing(self) -> str | None:
        """Why this machine cannot run it; None: it can."""
        if (why := NOT_DRIVEN.get(self.artifact.format)) is not None:
            return why
        return self.find(self.artifact.format).missing(self.artifact)


class Command(Protocol):
    """A picklable question to a worker: called there with the open backend, answered by pipe."""

    def __call__(self, backend: Backend) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What opening the artifact told."""

    load_s: float
    """Time from the files to a backend that can run; the import of the runtime is not in it."""
    capacity: int
    max_batch: int | None = None
    vocab: int
    weight_bytes: int
    dtype: str
    device: str
    decoding: str = Backend.decoding
    gpu: str | None = None
    """UUID of the GPU; None: it runs on the CPU."""
    kv: KvCache | None = None
    """How it stores keys and values; None: it does not tell."""
    import_s: float = 0.0
    """Importing the runtime, which is not in ``load_s``."""
    host_bytes: int | None = None
    """Resident memory of the process once it is loaded."""
    device_bytes: int | None = None
    """What loading took of the GPU, as its driver counts; None: on a CPU, or it does not tell."""

    def refuses(self, batch: int, tokens: int) -> str | None:
        """Why so many rows of so many tokens are too much for it; None: they are not."""
        if tokens > self.capacity:
            return f"{tokens} tokens do not fit in its KV cache of {self.capacity}"
        if self.max_batch is not None and batch > self.max_batch:
            return f"{batch} rows at once are more than the {self.max_batch} it was built for"
        return None


@dataclass(frozen=True, kw_only=True)
class Iteration(Usage):
    """The answer to :class:`Iterate`."""

    trace: Trace


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """Run one iteration: prompts in, ``new_tokens`` greedy tokens out."""

    ids_BS: Ids
    new_tokens: int
    limit_ns: int | None = None

    def __call__(self, backend: Backend) -> Iteration:
        asked = (self.ids_BS, self.new_tokens, self.limit_ns, time.perf_counter_ns)
        trace, usage = used(backend, lambda: generate(backend, *asked))
        return Iteration(trace=trace, **vars(usage))


@dataclass(frozen=True, kw_only=True)
class Rewarm:
    """A part of the prompts in and two steps, untimed: they read every weight.

    The arm that was just timed has pushed them out of the caches, where an arm that has the machine
    for itself, as in use, would find them; threads wake, there are buffers of such shapes. After
    one token alone the first prefill took 4 to 25 % longer than the next. The prompts are turned
    round, so that no arm has seen what it is asked next.
    """

    ids_BS: Ids

    def __call__(self, backend: Backend) -> None:
        rows, length = self.ids_BS.shape
        most = min(max(REWARM_TOKENS // rows, 1), max(length - 2, 1))
        ids_BS = self.ids_BS[:, ::-1][:, :most].copy()  # torch takes no stride below 0
        tokens_B = backend.first_tokens(ids_BS, np.full(rows, most, dtype=np.int64))
        for _ in range(min(2, most)):
            tokens_B = backend.next_tokens(tokens_B)
        backend.device_s()


class Worker:
    """The parent's end of an arm. A context manager: leaving it ends the process."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        context = multiprocessing.get_context("spawn")  # a fork would copy the parent's threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, arm), daemon=True)
        self._process.start()
        theirs.close()

    def imported(self) -> None:
        """Wait until the worker has imported its runtime."""
        self._receive("starting", START_S)

    def load(self, timeout_s: float) -> Loaded:
        """Open the artifact; after :meth:`imported`."""
        self._send("load", "loading")
        loaded: Loaded = self._receive("loading", timeout_s)
        return loaded

    def submit(self, command: Command, doing: str) -> int:
        """Send a command; the time just before it went, nanoseconds."""
        now = time.perf_counter_ns()
        self._send(command, doing)
        return now

    def result(self, doing: str, timeout_s: float | None = None) -> Any:
        """The answer. Raises TimeoutError after ``timeout_s``, StageError if the worker failed."""
        return self._receive(doing, timeout_s)

    def answered(self, timeout_s: float) -> bool:
        """Whether there is an answer, or the worker is gone; waits so long for either."""
        return bool(wait([self._pipe, self._process.sentinel], timeout_s))

    def ask(self, command: Command, doing: str, timeout_s: float | None = None) -> Any:
        self.submit(command, doing)
        return self.result(doing, timeout_s)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        with suppress(OSError):  # the worker may be gone
            self._pipe.send(None)
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self.kill()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill() if error else self.close()

    def _send(self, message: object, doing: str) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._died(doing) from error

    def _receive(self, doing: str, timeout_s: float | None) -> Any:
        if not wait([self._pipe, self._process.sentinel], timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        try:
            answer = self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, OSError) as error:
            raise self._died(doing) from error
        if answer is None:
            raise self._died(doing)
        kind, content = answer
        if kind == "error":
            log.error("arm '%s', %s:\n%s", self.arm.name, doing, content)
            last = content.strip().splitlines()[-1]
            raise StageError(f"benchmark arm '{self.arm.name}', {doing}: {last}")
        return content

    def _died(self, doing: str) -> StageError:
        self._process.join(CLOSE_S)
        code = self._process.exitcode
        hint = " (killed; out of memory?)" if code == KILLED else ""
        return StageError(
            f"benchmark arm '{self.arm.name}', {doing}: its process ended with code {code}{hint}"
        )


def _serve(pipe: Connection, arm: Arm) -> None:
    """The whole life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        _answer(pipe, arm)
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except BaseException:  # noqa: BLE001  the boundary: whatever it was, the parent must hear it
        pipe.send(("error", traceback.format_exc()))


def _answer(pipe: Connection, arm: Arm) -> None:
    start_s = time.perf_counter()
    opener = arm.find(arm.artifact.format)
    import_s = time.perf_counter() - start_s
    pipe.send(("imported", True))
    if pipe.recv() is None:
        return
    before, start_s = machine.device_used_bytes(), time.perf_counter()
    with opener(arm.artifact, arm.threads, arm.dtype) as backend:
        times_s = {"load_s": time.perf_counter() - start_s, "import_s": import_s}
        pipe.send(("loaded", _loaded(backend, times_s, before)))
        libc.keep_freed()
        gc.freeze()  # the modules of the runtime are no garbage: do not walk them while timing
        while (command := pipe.recv()) is not None:
            answer = command(backend)
            backend.drop()
            pipe.send(("done", answer))


def _loaded(backend: Backend, times_s: Mapping[str, float], before: int | None) -> Loaded:
    """``before``: what was taken of the GPU before it was loaded."""
    is_on_gpu, now = backend.device != CPU, machine.device_used_bytes()
    taken = None if before is None or now is None or not is_on_gpu else max(now - before, 0)
    return Loaded(
        **times_s,
        kv=backend.kv,
        host_bytes=machine.resident_bytes(),
        device_bytes=taken,
        capacity=backend.capacity,
        max_batch=backend.max_batch,
        vocab=backend.vocab,
        weight_bytes=backend.weight_bytes,
        dtype=backend.dtype,
        device=backend.device,
        decoding=backend.decoding,
        gpu=_uuid() if is_on_gpu else None,
    )


def _uuid() -> str:
    from optpipe.bench.cuda import uuid  # the parent of a benchmark imports no torch

    return uuid()
