"""What an artifact lost: held-out perplexity, KL divergence and top-1 agreement with the baseline.

Everything is computed in float64 over the whole vocabulary from float32 logits, on windows that are
the same for all arms. Reference logits go from the baseline's worker to the others through one
memory-mapped file, a window at a time.

Shapes: N predicted positions of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpipe.bench.backend import Backend, Ids, Logits
from optpipe.bench.scenario import hash_ids
from optpipe.bench.worker import Worker
from optpipe.errors import InputError, StageError
from optpipe.stage import Progress

BUNDLED = Path(__file__).resolve().parent.parent / "demo" / "heldout.txt"
WINDOW = 1024
ROWS = 64
"""Positions turned to float64 at a time: a window of 128 k logits would take gigabytes."""
METRICS = ("perplexity", "kl_mean", "top1_agreement")
NOT_FINITE = "its logits are not all finite"
NO_TEXT = "the model has no tokenizer, so there is no text it could predict"
LEAST_CHARACTERS = 64
ANSWER_S = 600.0
"""An arm that takes longer than this for one window has no quality."""


@dataclass(kw_only=True)
class QualityConfig:
    """On what text, and how much of it."""

    text: str | None = None
    """A UTF-8 file of held-out text; null: the one bundled with the demo model."""
    windows: int = 16
    """Windows of min(context, 1024) tokens, spread evenly over the text, not overlapping."""
    budget_s: float = 60.0
    """No further window is begun after this time; every arm always sees the same windows."""
    max_perplexity_increase: float | None = None
    """Largest accepted rise over the baseline, 0.1 for 10 %; more makes the exit code 3."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"bench.quality.windows={self.windows}: at least 1 is needed")
        if self.text is not None:
            _check_text(Path(self.text))
        limit = self.max_perplexity_increase
        if limit is not None and limit < 0:
            raise InputError(f"bench.quality.max_perplexity_increase={limit}: at least 0 is needed")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The token ids all arms are judged on, (windows, tokens), and where they come from."""

    ids_WS: Ids
    source: Mapping[str, Any]
    is_text: bool
    """False: random ids, of which perplexity would mean nothing."""


@dataclass(kw_only=True)
class Sums:
    """Totals over predicted positions."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, other: Sums) -> None:
        self.nll += other.nll
        self.kl += other.kl
        self.agreed += other.agreed
        self.positions += other.positions


@dataclass(kw_only=True)
class Judged:
    """The outcome for every arm."""

    sums: dict[str, Sums] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Arms without quality, and why."""
    windows: int = 0
    """Windows every arm has seen."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Ask the baseline for a window: its logits stay in ``file`` for the others."""

    ids_S: Ids
    file: Path

    def __call__(self, backend: Backend) -> Sums:
        logits_SV = backend.score(self.ids_S[None])[0]
        np.save(self.file, logits_SV[:-1])
        return divergence(logits_SV[:-1], logits_SV[:-1], self.ids_S[1:])


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Ask an arm for a window; ``file`` None: there is no baseline to compare with."""

    ids_S: Ids
    file: Path | None

    def __call__(self, backend: Backend) -> Sums:
        logits_NV = backend.score(self.ids_S[None])[0, :-1]
        reference_NV = logits_NV if self.file is None else np.load(self.file, mmap_mode="r")
        return divergence(reference_NV, logits_NV, self.ids_S[1:])


def divergence(reference_NV: Logits, logits_NV: Logits, targets_N: Ids) -> Sums:
    """NLL of the targets, KL(reference || arm) and equal arg-maxima, summed over the positions."""
    found = Sums(positions=len(targets_N))
    for start in range(0, len(targets_N), ROWS):
        part = slice(start, start + ROWS)
        log_p, log_q = _log_softmax(reference_NV[part]), _log_softmax(logits_NV[part])
        targets = targets_N[part]
        found.nll -= float(log_q[np.arange(len(targets)), targets].sum())
        found.kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        found.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return found


def windows(folder: Path, config: QualityConfig, capacity: int, vocab: int, seed: int) -> Windows:
    """Windows of held-out text in the model's own tokens; random ids if it has no tokenizer."""
    from optpipe.text import has_tokenizer, leading, tokenize  # imports transformers

    size = min(WINDOW, capacity)
    about: dict[str, Any] = {"window": size, "stride": size, "dtype": "float64"}
    if not has_tokenizer(folder):
        ids_WS = np.random.default_rng([seed, size]).integers(0, vocab, (config.windows, size))
        reasons = dict.fromkeys(("text", "bos"), NO_TEXT)
        nothing = {"text": None, "bos": None, "reasons": reasons}
        source = {**about, "ids_hash": hash_ids(ids_WS), **nothing}
        return Windows(ids_WS=ids_WS, source=source, is_text=False)
    text_file = Path(config.text) if config.text else BUNDLED
    content = text_file.read_bytes()
    bos = leading(folder)
    ids_WS = cut(tokenize(folder, content.decode()), bos, size, config.windows)
    if ids_WS.max() >= vocab:
        raise InputError(
            f"the tokenizer in '{folder}' makes token {ids_WS.max()}, but the model's vocabulary "
            f"ends at {vocab - 1}"
        )
    source = {
        **about,
        "text": text_file.name,
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "ids_hash": hash_ids(ids_WS),
        "bos": bos[0] if bos else None,
        "reasons": {} if bos else {"bos": "its tokenizer puts no token before a text"},
    }
    return Windows(ids_WS=ids_WS, source=source, is_text=True)


def cut(ids: list[int], bos: list[int], size: int, most: int) -> Ids:
    """Up to ``most`` windows of ``size`` tokens, spread evenly, each beginning with ``bos``."""
    body = min(size - len(bos), len(ids))
    if body < 2:
        raise InputError(f"the held-out text has {len(ids)} tokens: nothing to predict")
    whole = len(ids) // body
    count = min(most, whole)
    starts = [index * whole // count * body for index in range(count)]
    return np.array([[*bos, *ids[start : start + body]] for start in starts], dtype=np.int64)


def judge(
    workers: Mapping[str, Worker],
    baseline: str | None,
    given: Windows,
    budget_s: float,
    progress: Progress,
) -> Judged:
    """Every arm on every window, window by window; ``baseline`` None: no arm to compare with."""
    found = Judged(sums={name: Sums() for name in workers})
    started_s, total = time.perf_counter(), len(given.ids_WS)
    with tempfile.TemporaryDirectory(prefix="optpipe-") as folder:
        file = Path(folder) / "reference.npy"
        for number, ids_S in enumerate(given.ids_WS):
            if number and time.perf_counter() - started_s > budget_s:
                break
            progress("benchmark: quality", number, total)
            _window(workers, baseline, ids_S, file, found)
            found.windows += 1
    progress("benchmark: quality", total, total)
    return found


def result(total: Sums, is_text: bool, unpaired: str | None) -> dict[str, Any]:
    """The quality of one arm as the report has it: null with a reason where undefined.

    ``unpaired``: why there is no baseline to compare with, if there is none.
    """
    values = {
        "perplexity": _perplexity(total),
        "kl_mean": max(total.kl / total.positions, 0.0),  # rounding may leave -1e-17
        "top1_agreement": total.agreed / total.positions,
    }
    reasons = {k: NOT_FINITE for k, value in values.items() if not math.isfinite(value)}
    if not is_text:
        reasons["perplexity"] = NO_TEXT
    if unpaired:
        reasons |= {"kl_mean": unpaired, "top1_agreement": unpaired}
    kept = {key: None if key in reasons else value for key, value in values.items()}
    return {**kept, "positions": total.positions, "reasons": reasons}


def without(reason: str) -> dict[str, Any]:
    """The quality of an arm that was not judged."""
    nothing = dict.fromkeys((*METRICS, "positions"))
    return {**nothing, "reasons": dict.fromkeys(nothing, reason)}


def _window(
    workers: Mapping[str, Worker], baseline: str | None, ids_S: Ids, file: Path, found: Judged
) -> None:
    """Ask the baseline first, then the others."""
    for name in sorted(workers, key=lambda name: name != baseline):
        if name in found.missing:
            continue
        command = (
            Reference(ids_S=ids_S, file=file)
            if name == baseline
            else Compare(ids_S=ids_S, file=file if baseline else None)
        )
        try:
            found.sums[name].add(workers[name].ask(command, "quality", ANSWER_S))
        except (TimeoutError, StageError) as error:
            workers[name].kill()
            lost = list(workers) if name == baseline else [name]  # no reference, no comparison
            found.missing |= dict.fromkeys(lost, f"'{name}' was ended as it scored text: {error}")


def _check_text(file: Path) -> None:
    try:
        if len(file.read_text(encoding="utf-8")) < LEAST_CHARACTERS:
            raise InputError(f"bench.quality.text='{file}' is too short to predict anything")
    except UnicodeDecodeError as error:
        raise InputError(f"bench.quality.text='{file}' is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"bench.quality.text='{file}': {error.strerror}") from error


def _perplexity(total: Sums) -> float:
    try:
        return math.exp(total.nll / total.positions)
    except OverflowError:
        return math.inf


def _log_softmax(logits_NV: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits_NV.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
