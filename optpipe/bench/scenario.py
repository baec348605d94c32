"""What is asked of every artifact: plain data, and token ids made from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np

from optpipe.bench.backend import Ids
from optpipe.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of work, or every pair of a batch size and a prompt length if they are lists."""

    batch: list[int] = field(default_factory=lambda: [1])
    """Rows fed together, each at least 1."""
    prompt_tokens: list[int] = field(default_factory=lambda: [128])
    """Tokens of each prompt, each at least 1."""
    new_tokens: int = 32
    """Tokens generated greedily after the prompt, at least 1; end-of-text does not stop it."""

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InputError(f"{name}={list(values)}: one or more numbers above 0 are needed")
        if self.new_tokens < 1:
            raise InputError(f"new_tokens={self.new_tokens}: at least 1 is needed")


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


def cells(scenarios: Mapping[str, Scenario]) -> list[Cell]:
    """Every point of every scenario, in the order given."""
    return [
        Cell(name, batch, prompt, scenario.new_tokens)
        for name, scenario in scenarios.items()
        for batch, prompt in product(scenario.batch, scenario.prompt_tokens)
    ]


def check(scenarios: Mapping[str, Scenario], context: int) -> None:
    """Raise InputError unless every prompt and its new tokens fit in ``context`` tokens."""
    for cell in cells(scenarios):
        if cell.tokens > context:
            raise InputError(
                f"scenario '{cell.scenario}': {cell.prompt_tokens} prompt tokens and "
                f"{cell.new_tokens} new ones do not fit in {context} tokens; set "
                f"'scenario.{cell.scenario}.prompt_tokens=[{max(context - cell.new_tokens, 1)}]'"
                " or fewer"
            )


def prompts(cell: Cell, vocab: int, seed: int) -> Ids:
    """Token ids (batch, prompt_tokens): the same for all arms and blocks, of every row its own."""
    rng = np.random.default_rng([seed, cell.batch, cell.prompt_tokens])
    return rng.integers(0, vocab, (cell.batch, cell.prompt_tokens), dtype=np.int64)


def hash_ids(ids: Ids | Sequence[int]) -> str:
    """Sixteen hex digits that tell token ids apart."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]
