"""What is asked of every artifact: plain data, and token ids from a seed or from a user's file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.bench.serving.arrivals import Scale, read_trace
from optpipe.bench.timed.clock import COMPARED
from optpipe.errors import InputError
from optpipe.stage import Limits

ARRIVALS = ("poisson", "burst", "closed", "trace")
MOST_SCALE = 1e6
STRIDE = 1_000_003
"""Between the seeds of two prompts."""
BUNDLED_TRACE = Path(__file__).resolve().parent / "serving" / "trace.jsonl"


@dataclass(kw_only=True)  # not frozen: OmegaConf would not merge into it
class Objective:
    """What makes a request a good one; null: no such limit."""

    ttft_s: float | None = 0.5
    """From the scheduled arrival to the first token."""
    tpot_s: float | None = 0.05
    e2e_s: float | None = None
    share: float = 0.9
    """Of the requests that must be good at the highest rate, where that is searched."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"objective.{name}={value}: above 0, or null for no limit")
        if not 0 < self.share <= 1:
            raise InputError(f"objective.share={self.share}: above 0, at most 1")


@dataclass(kw_only=True)
class Serving:
    """Requests that come by themselves and wait in a queue; ``batch`` is the most served at once.

    ``prompt_tokens`` and ``new_tokens`` are the longest of a request.
    """

    arrivals: str = "poisson"
    """'poisson', 'burst', 'closed' (every client waits for its answer) or 'trace'."""
    rate_per_s: float | None = None
    """Requests a second of an open loop; null: the baseline's highest that keeps the objective."""
    shape: float = 0.25
    """Of the gamma distributed gaps of 'burst': 1 is Poisson, less is burstier."""
    clients: int = 4
    """Of 'closed'."""
    requests: int = 32
    """In a block, for every arm; of a trace, its first."""
    sigma: float = 0.0
    """Of lognormal lengths with median half of the longest; 0: all are the longest."""
    trace: str | None = None
    """Mooncake JSONL; null: the one bundled."""
    scale: Scale = field(default_factory=Scale)
    """Of the trace."""
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise InputError(f"arrivals={self.arrivals}: one of {', '.join(ARRIVALS)}")
        for name in ("shape", "clients", "requests"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: above 0 is needed")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < math.inf:
            raise InputError(f"rate_per_s={self.rate_per_s}: above 0, or null to search for it")
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"sigma={self.sigma}: at least 0 is needed")
        if not all(0 < factor <= MOST_SCALE for factor in (self.scale.time, self.scale.length)):
            raise InputError(f"scale={self.scale}: both above 0, at most {MOST_SCALE:g}")
        self._check_read()

    def _check_read(self) -> None:
        """Raise InputError for what these arrivals would not read."""
        if self.rate_per_s is not None and self.arrivals in ("closed", "trace"):
            raise InputError(f"rate_per_s={self.rate_per_s}: arrivals={self.arrivals} has its own")
        if self.trace is not None and self.arrivals != "trace":
            raise InputError(f"trace={self.trace}: read by arrivals=trace, not {self.arrivals}")

    @property
    def trace_file(self) -> Path:
        return Path(self.trace) if self.trace is not None else BUNDLED_TRACE


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of work, or every pair of a batch size and a prompt length if they are lists."""

    batch: list[int] = field(default_factory=lambda: [1])
    """Rows fed together, each at least 1."""
    prompt_tokens: list[int] = field(default_factory=lambda: [128])
    """Tokens of each prompt, each at least 1."""
    new_tokens: int = 32
    """Tokens generated greedily after the prompt, at least 1; end-of-text does not stop it."""
    prompts: str | None = None
    """A text file, every line a prompt, or JSONL with "prompt" or "text"; null: random ids."""
    serving: Serving | None = None
    """null: the next iteration begins when the one before it is done."""
    primary: list[str] = field(default_factory=lambda: ["tpot_s"])
    """Metrics that get a verdict, at the largest batch and the longest prompt; [] for none."""

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InputError(f"{name}={list(values)}: one or more numbers above 0 are needed")
            if len(set(values)) < len(values):
                raise InputError(f"{name}={list(values)}: each value once")
        if self.new_tokens < 1:
            raise InputError(f"new_tokens={self.new_tokens}: at least 1 is needed")
        if self.prompts and self.serving and self.serving.arrivals == "trace":
            raise InputError("prompts: those of a trace follow from its hash_ids")
        self._check_primary()

    def _check_primary(self) -> None:
        if unknown := [metric for metric in self.primary if metric not in COMPARED]:
            raise InputError(f"primary: '{unknown[0]}' is not one of {', '.join(COMPARED)}")
        if len(set(self.primary)) < len(self.primary):
            raise InputError(f"primary={list(self.primary)}: each metric once")
        if "tpot_s" in self.primary and self.new_tokens == 1:
            raise InputError("primary: one token has no tpot_s; 'primary=[ttft_s]' is its latency")


class Cell(NamedTuple):
    """One point of a scenario: what one iteration does."""

    scenario: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens a row of the KV cache must hold."""
        return self.prompt_tokens + self.new_tokens

    def __str__(self) -> str:
        return f"{self.scenario} {self.batch} x {self.prompt_tokens} + {self.new_tokens}"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A user's prompts as one sequence of token ids, and where each of them begins in it."""

    ids: Ids
    starts: Ids

    def rows(self, rows: int, tokens: int, rng: np.random.Generator) -> Ids:
        """(rows, tokens): each begins at another prompt and goes on into those after it.

        Where there are fewer prompts than rows, later rows begin one token further on.
        """
        order = rng.permutation(len(self.starts))
        number = np.arange(rows)
        begin = self.starts[order[number % len(order)]] + number // len(order)
        return np.take(self.ids, begin[:, None] + np.arange(tokens), mode="wrap")


def cells(scenarios: Mapping[str, Scenario]) -> list[Cell]:
    """Every point of every scenario, in the order given."""
    return [
        Cell(name, batch, prompt, scenario.new_tokens)
        for name, scenario in scenarios.items()
        for batch, prompt in product(scenario.batch, scenario.prompt_tokens)
    ]


def check(scenarios: Mapping[str, Scenario], limits: Limits) -> None:
    """Raise InputError unless every artifact can do all that is asked of it.

    ``limits``: those of the last artifact of the run, which no other falls short of.
    """
    for cell in cells(scenarios):
        if cell.tokens > limits.tokens:
            more = f"'{limits.tokens_key}={cell.tokens}' or " if limits.tokens_key else ""
            raise InputError(
                f"scenario '{cell.scenario}': {cell.prompt_tokens} prompt tokens and "
                f"{cell.new_tokens} new ones do not fit in {limits.tokens} tokens; "
                f"set {more}{_fewer(cell, limits.tokens)}"
            )
        if limits.rows is not None and cell.batch > limits.rows:
            key = f"scenario.{cell.scenario}.batch"
            raise InputError(
                f"scenario '{cell.scenario}': {cell.batch} rows at once, but {limits.rows_key} is "
                f"{limits.rows}; set '{key}=[{limits.rows}]' or '{limits.rows_key}={cell.batch}'"
            )
    for name, scenario in scenarios.items():
        if scenario.serving is not None and scenario.serving.arrivals == "trace":
            _check_trace(name, scenario, scenario.serving)


def _fewer(cell: Cell, most: int) -> str:
    """The change of a scenario that makes a row fit in so many tokens."""
    left, key = most - cell.new_tokens, f"scenario.{cell.scenario}"
    if left > 0:
        return f"'{key}.prompt_tokens=[{left}]' or fewer"
    if cell.prompt_tokens < most:
        return f"'{key}.new_tokens={max(most - cell.prompt_tokens, 1)}' or fewer"
    return f"'{key}.prompt_tokens=[{most // 2}]' and '{key}.new_tokens={most // 2}'"


def _check_trace(name: str, scenario: Scenario, serving: Serving) -> None:
    """Raise InputError unless its first requests are no longer than the scenario allows."""
    for row in read_trace(serving.trace_file, serving.scale)[: serving.requests]:
        longest = min(scenario.prompt_tokens), scenario.new_tokens
        if row.prompt_tokens > longest[0] or row.new_tokens > longest[1]:
            raise InputError(
                f"scenario '{name}': line {row.line} of '{serving.trace_file}' asks for "
                f"{row.prompt_tokens} + {row.new_tokens} tokens, more than prompt_tokens + "
                f"new_tokens = {longest[0]} + {longest[1]}; a smaller "
                f"'scenario.{name}.serving.scale.length' shortens all"
            )


def prompt_seed(seed: int, number: int) -> int:
    """What `prompts` takes for those of a number; timing.WARM is the first number that counts."""
    return seed + STRIDE * number


def prompts(cell: Cell, vocab: int, seed: int, texts: Texts | None = None) -> Ids:
    """Token ids (batch, prompt_tokens): the same for all arms, of every row and seed its own."""
    rng = np.random.default_rng([seed, cell.batch, cell.prompt_tokens])
    if texts is not None:
        return texts.rows(cell.batch, cell.prompt_tokens, rng)
    return rng.integers(0, vocab, (cell.batch, cell.prompt_tokens), dtype=np.int64)


def read_texts(scenarios: Mapping[str, Scenario], folder: Path) -> dict[str, Texts]:
    """The prompts of every scenario that names a file, in the tokens of the model in ``folder``.

    Raises InputError for a file that cannot be read, a line that holds no prompt (with its
    number), a model without tokenizer, or fewer tokens than the longest prompt.
    """
    from optpipe.text import tokenize  # imports transformers

    found = {}
    for name, scenario in scenarios.items():
        if scenario.prompts is None:
            continue
        parts = [tokenize(folder, text) for text in _texts(Path(scenario.prompts))]
        ids = np.array([token for part in parts for token in part], dtype=np.int64)
        longest = max(scenario.prompt_tokens)
        if len(ids) < longest:
            raise InputError(
                f"scenario.{name}.prompts='{scenario.prompts}' has {len(ids)} tokens, fewer than "
                f"the {longest} of the longest prompt"
            )
        starts = np.cumsum([0, *(len(part) for part in parts[:-1] if part)])
        found[name] = Texts(ids=ids, starts=starts)
    return found


def _texts(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"prompts file '{file}' is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"prompts file '{file}': {error.strerror}") from error
    lines = {n: line for n, line in enumerate(content.splitlines(keepends=True), 1) if line.strip()}
    if file.suffix != ".jsonl":
        return [*lines.values()]
    return [_prompt(line, f"prompts file '{file}', line {n}") for n, line in lines.items()]


def _prompt(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise InputError(f'{where}: no text under "prompt" or "text"')
    return text


def hash_ids(ids: Ids | Sequence[int]) -> str:
    """Sixteen hex digits that tell token ids apart."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
