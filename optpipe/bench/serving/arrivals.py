"""When requests arrive and how long they are: open-loop processes, and traces of real services.

Gaps of an open loop are drawn and left as they are: gaps rescaled to hit the nominal rate are no
longer independent, so the arrivals no longer Poisson. Traces have the format of Mooncake
(arXiv 2407.00079, section 8): one JSON object a line with ``timestamp`` in milliseconds,
``input_length``, ``output_length`` and ``hash_ids``, one id for every 512 prompt tokens; equal ids
are equal tokens, and so stand for a shared prefix.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpipe.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK = 512
"""Prompt tokens that one hash id stands for."""
NUMBERS = ("timestamp", "input_length", "output_length")
MOST = 1e15
"""Of any of them: JSON writes infinity as 1e400."""


def times_s(rate_per_s: float, shape: float, count: int, rng: np.random.Generator) -> Floats:
    """Arrivals after time 0 with independent gamma gaps of mean 1 / rate.

    ``shape`` 1 is a Poisson process; below 1 requests come in bursts: the squared coefficient of
    variation of the gaps is 1 / shape.
    """
    return np.cumsum(rng.gamma(shape, 1 / (rate_per_s * shape), count))


def lengths(longest: int, sigma: float, count: int, rng: np.random.Generator) -> Ints:
    """Token counts in 1 .. longest: all the longest if sigma is 0, else lognormal around its half.

    The median of the lognormal is half of ``longest``, its log has standard deviation ``sigma``;
    what is above ``longest`` is cut to it.
    """
    if sigma == 0:
        return np.full(count, longest, dtype=np.int64)
    drawn = np.rint(longest / 2 * np.exp(sigma * rng.standard_normal(count)))
    return np.clip(drawn, 1, longest).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of a trace, after scaling."""

    line: int
    """Of the file, from 1."""
    time_s: float
    prompt_tokens: int
    new_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(kw_only=True)  # not frozen: OmegaConf would not merge into it
class Scale:
    """From a trace of a large service to one that this machine can serve."""

    time: float = 1.0
    """2: requests arrive half as fast."""
    length: float = 1.0
    """0.5: half as many tokens, and 256 instead of 512 of them for each hash id."""

    @property
    def block(self) -> int:
        """Tokens of one hash id."""
        return max(round(BLOCK * self.length), 1)


def read_trace(path: Path, scale: Scale) -> list[Row]:
    """The requests of a trace in order of arrival. Raises InputError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"trace '{path}' is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"trace '{path}': {error.strerror}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(number, json.loads(line), scale))
        except (ValueError, TypeError) as error:
            raise InputError(f"trace '{path}', line {number}: {error}") from error
        if len(rows) > 1 and rows[-1].time_s < rows[-2].time_s:
            raise InputError(f"trace '{path}', line {number}: its timestamp is before the last")
    if not rows:
        raise InputError(f"trace '{path}' holds no request")
    return rows


def _row(line: int, found: Any, scale: Scale) -> Row:
    """Raises ValueError for what is missing, of the wrong type or impossible."""
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    for name in NUMBERS:
        value: Any = found.get(name)
        least = 0 if name == "timestamp" else 1
        if type(value) not in (int, float) or not least <= value <= MOST:
            raise ValueError(f"'{name}' must be a number from {least} to {MOST:g}, got {value!r}")
    hashes, prompt = found.get("hash_ids"), int(found["input_length"])
    if not isinstance(hashes, list) or not all(type(h) is int and h >= 0 for h in hashes):
        raise ValueError(f"'hash_ids' must be a list of whole numbers from 0, got {hashes!r}")
    if len(hashes) != (needed := -(-prompt // BLOCK)):
        raise ValueError(
            f"{len(hashes)} hash_ids for an input_length of {prompt}: one for every {BLOCK} "
            f"tokens are {needed}"
        )
    return Row(
        line=line,
        time_s=found["timestamp"] / 1e3 * scale.time,
        # no longer than its hash ids reach, whatever the rounding
        prompt_tokens=min(max(round(prompt * scale.length), 1), len(hashes) * scale.block),
        new_tokens=max(round(found["output_length"] * scale.length), 1),
        hash_ids=tuple(hashes),
    )


def prompt_ids(row: Row, scale: Scale, vocab: int, seed: list[int]) -> Ints:
    """Random token ids (prompt_tokens): equal blocks for equal hash ids and an equal seed."""
    blocks = [
        np.random.default_rng([*seed, hash_id]).integers(0, vocab, scale.block)
        for hash_id in row.hash_ids
    ]
    return np.concatenate(blocks)[: row.prompt_tokens]
