"""The demo model on its real torch backend, each step padded to a planted duration."""

import time

from optpipe.bench.torch import Torch


class Planted(Torch):
    """``stats['step_s']`` of its artifact is how long prefill and each further token take."""

    def __init__(self, artifact, threads, dtype):
        super().__init__(artifact, threads, dtype)
        self._step_s = artifact.stats["step_s"]

    def prefill(self, ids_BS, lengths_B):
        return self._padded(super().prefill, ids_BS, lengths_B)

    def decode(self, tokens_B):
        return self._padded(super().decode, tokens_B)

    def _padded(self, step, *given):
        due_s = time.perf_counter() + self._step_s
        logits = step(*given)
        time.sleep(max(due_s - time.perf_counter(), 0.0))
        return logits


def find(format):
    return Planted
