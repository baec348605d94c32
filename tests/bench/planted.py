"""The engine of the demo model, every token held back until its planted time."""

import time

from optpipe.bench.ort import Ort


class Planted(Ort):
    """``stats['step_s']`` of its artifact is how long prefill and each further token take.

    The times are absolute, from the begin of prefill on: a sleep that ends late on a busy machine
    is made up for by the next token, where a sleep of its own for each would add all lateness to
    what was planted.
    """

    def __init__(self, artifact, threads, dtype):
        super().__init__(artifact, threads, dtype)
        self._step_s, self._due_s = artifact.stats["step_s"], 0.0

    def prefill(self, ids_BS, lengths_B):
        self._due_s = time.perf_counter()
        return self._in_time(super().prefill(ids_BS, lengths_B))

    def decode(self, tokens_B):
        return self._in_time(super().decode(tokens_B))

    def _in_time(self, logits):
        self._due_s += self._step_s
        time.sleep(max(self._due_s - time.perf_counter(), 0.0))
        return logits


def find(format):
    return Planted
