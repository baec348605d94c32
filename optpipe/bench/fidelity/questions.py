"""What the quality gate asks of an arm, each question one picklable command to its worker.

Shapes: S tokens of a window, N = S - 1 predicted positions, B rows, V vocabulary.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optpipe.bench.backend import Backend, Ids
from optpipe.bench.fidelity.divergence import Positions, compare, concatenate
from optpipe.bench.timed.clock import generate


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """The arm against itself."""

    repeats: bool
    """Whether the same input gave the same logits, bit for bit."""
    floor: Positions
    """Alone against in a batch of all rows; both are the same function."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Ask the baseline for a window: its logits stay in ``file`` for the others.

    Logits that are there already, from an earlier run, are not computed again.
    """

    ids_S: Ids
    file: Path

    def __call__(self, backend: Backend) -> Positions:
        if not self.file.is_file():
            begun = self.file.with_suffix(f".{os.getpid()}.npy")
            np.save(begun, backend.score(self.ids_S[None])[0, :-1])
            begun.replace(self.file)  # whole or not at all
        logits_NV = np.load(self.file, mmap_mode="r")
        return compare(logits_NV, logits_NV, self.ids_S[1:])


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Ask an arm for a window; ``file`` None: there is no baseline to compare with."""

    ids_S: Ids
    file: Path | None

    def __call__(self, backend: Backend) -> Positions:
        logits_NV = backend.score(self.ids_S[None])[0, :-1]
        reference_NV = logits_NV if self.file is None else np.load(self.file, mmap_mode="r")
        return compare(reference_NV, logits_NV, self.ids_S[1:])


@dataclass(frozen=True, kw_only=True)
class Steady:
    """Ask an arm for the same rows in a batch, each alone, and the first once more."""

    ids_BS: Ids

    def __call__(self, backend: Backend) -> Steadiness:
        together_BSV = backend.score(self.ids_BS).copy()
        alone = [backend.score(row_S[None])[0].copy() for row_S in self.ids_BS]
        again_SV = backend.score(self.ids_BS[:1])[0]
        pairs = zip(alone, together_BSV, self.ids_BS, strict=True)
        floor = concatenate([compare(a[:-1], t[:-1], ids[1:]) for a, t, ids in pairs])
        return Steadiness(repeats=np.array_equal(alone[0], again_SV, equal_nan=True), floor=floor)


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Ask an arm to continue prompts; (steps, rows), fewer steps if ``limit_s`` runs out.

    All rows at once, or as many as the arm takes.
    """

    ids_BS: Ids
    new_tokens: int
    limit_s: float

    def __call__(self, backend: Backend) -> Ids:
        rows, most = len(self.ids_BS), backend.max_batch or len(self.ids_BS)
        parts = [self.ids_BS[start : start + most] for start in range(0, rows, most)]
        limit_ns, clock = int(self.limit_s * 1e9 / len(parts)), time.perf_counter_ns
        made = [generate(backend, p, self.new_tokens, limit_ns, clock).tokens_NB for p in parts]
        steps = min(len(tokens_NB) for tokens_NB in made)
        return np.concatenate([tokens_NB[:steps] for tokens_NB in made], axis=1)


@dataclass(frozen=True, kw_only=True)
class Write:
    """Ask the baseline for text: each row goes on from its ids by sampling at temperature 1."""

    ids_BS: Ids
    tokens: int
    """Of a row in the end."""
    seed: int

    def __call__(self, backend: Backend) -> Ids:
        rng = np.random.default_rng(self.seed)
        lengths_B = np.full(len(self.ids_BS), self.ids_BS.shape[1], dtype=np.int64)
        logits_BV, columns = backend.prefill(self.ids_BS, lengths_B), [self.ids_BS]
        while (made := sum(c.shape[1] for c in columns)) < self.tokens:
            # the Gumbel trick: the arg-max of logits plus Gumbel noise is a sample
            tokens_B = (logits_BV + rng.gumbel(size=logits_BV.shape)).argmax(-1)
            columns.append(tokens_B[:, None])
            if made + 1 < self.tokens:
                logits_BV = backend.decode(tokens_B)
        return np.concatenate(columns, axis=1)
