"""An artifact behind the OpenAI endpoint of a server of its own, which is sent token ids.

What is timed is what a client sees: HTTP, the server's own queue and its scheduler, one connection
for each request. The server is a child that listens on this machine alone.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

from optpipe.artifact import Artifact
from optpipe.bench.backend import Logits
from optpipe.bench.paged import Paged
from optpipe.errors import StageError

HOST, NAME = "127.0.0.1", "optpipe"
START_S, POLL_S = 600.0, 0.1
"""Longest wait until the server answers, and between two questions whether it does."""
ONE_S = 60.0
"""Longest wait for a single token."""
GRACE_S = 10.0
"""How long the server may take to end by itself."""
GUARD = """
read -r _
kill -s TERM -- "-$0"
for _ in $(seq "$1"); do kill -s 0 -- "-$0" || exit 0; sleep 0.1; done
kill -s KILL -- "-$0"
"""
"""Ends the group of processes $0, in at most $1 tenths of a second, when its standard input closes:
that is when we end, however we do."""
TAIL = 2000
"""Characters of the log that an error quotes."""
JSON = {"Content-Type": "application/json"}
EVENT, END = b"data: ", b"data: [DONE]"


class Endpoint(Paged):
    """Starts the server; a subclass says how. What it writes is kept beside the artifact."""

    ask: ClassVar[Mapping[str, object]]
    """What makes this server answer with token ids."""

    @abstractmethod
    def command(self, artifact: Artifact, port: int) -> Sequence[str]:
        """What starts the server as a model called NAME."""

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        self._open(artifact)
        self.port = _free_port()
        self.log = artifact.path.with_name(f"{artifact.path.name}-endpoint.log")
        with self.log.open("wb") as log:
            self._server = subprocess.Popen(
                self.command(artifact, self.port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own, to be ended as one
            )
        guard = ["sh", "-c", GUARD, str(self._server.pid), str(round(10 * GRACE_S))]
        self._guard = subprocess.Popen(
            guard,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # there may be nothing left to end
            start_new_session=True,
        )
        try:
            self._await()
        except BaseException:
            self.close()
            raise

    def stream(
        self, ids: Sequence[int], new_tokens: int, limit_s: float
    ) -> Iterator[Sequence[int]]:
        """The tokens of an answer as they come; see serving/serve.py.

        Raises TimeoutError after ``limit_s``, ConnectionError with what the server said.
        """
        end_s = time.perf_counter() + limit_s
        asked = {
            "model": NAME,
            "prompt": [*ids],
            "max_tokens": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            **self.ask,
        }
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=limit_s)) as connection:
            try:
                connection.request("POST", "/v1/completions", json.dumps(asked).encode(), JSON)
                answer = connection.getresponse()
                if answer.status != http.client.OK:
                    raise ConnectionError(f"HTTP {answer.status}: {answer.read(TAIL).decode()}")
                for line in answer:
                    if line.rstrip() == END:
                        return
                    if tokens := _tokens(line):
                        yield tokens
                    left_s = end_s - time.perf_counter()
                    if left_s <= 0:
                        raise TimeoutError(f"no whole answer in {limit_s:.0f} s")
                    if connection.sock is not None:
                        connection.sock.settimeout(left_s)
                raise ConnectionError("the connection was closed within the answer")
            except http.client.HTTPException as error:
                raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def cpu_ns(self) -> int:
        """Those of the server are counted, too."""
        return super().cpu_ns() + _group_cpu_ns(self._server.pid)

    def reset_peak(self) -> None:
        raise OSError("the server's memory is that of other processes")

    def close(self) -> None:
        """End the server and whatever it started."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._server.wait(2 * GRACE_S)
        self._guard.wait(2 * GRACE_S)

    def _begin(self, rows: list[list[int]]) -> list[int]:
        return [next(self.stream(row, 1, ONE_S))[0] for row in rows]

    def _next(self) -> list[int]:
        # a stream would run on when nobody asks any more, beside the arm that is timed next
        return self._begin(self._rows)

    def _log_probs(self, row: list[int]) -> Logits:
        raise StageError("an endpoint tells tokens, no logits")

    def _await(self) -> None:
        """Until the server is healthy."""
        end_s = time.perf_counter() + START_S
        while not _healthy(self.port):
            if (code := self._server.poll()) is not None:
                raise StageError(f"the server ended with code {code}; {self._last_words()}")
            if time.perf_counter() > end_s:
                raise StageError(
                    f"the server did not answer in {START_S:.0f} s; {self._last_words()}"
                )
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        told = self.log.read_text(errors="replace")[-TAIL:]
        return f"the end of {self.log}: {' '.join(told.split())}"


def _tokens(line: bytes) -> Sequence[int]:
    """Of one line of a stream of events. Raises ConnectionError for an error that it tells."""
    if not line.startswith(EVENT):
        return ()
    event: Any = json.loads(line.removeprefix(EVENT))
    if "choices" not in event:
        raise ConnectionError(f"the stream broke off: {line.decode()[:TAIL]}")
    found: list[int] = [token for choice in event["choices"] for token in choice["token_ids"]]
    return found


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    return False


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def _group_cpu_ns(group: int) -> int:
    """CPU time of the processes of a group that are alive, from /proc; see proc(5)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # after the name, which may hold anything: state, parent, group ... user, system
            values = stat.read_text().rpartition(")")[2].split()
            ticks += int(values[11]) + int(values[12]) if int(values[2]) == group else 0
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
