"""Calibration data: what text a method looks at, and what it keeps of a layer's inputs.

Shapes: S samples, T tokens of each, N rows of inputs, C inputs of a linear layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optpipe.artifact import Stats, fingerprint
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import Block
from optpipe.model import layers
from optpipe.text import has_tokenizer, leading, no_tokenizer, tokenize

log = logging.getLogger(__name__)
BUNDLED = Path(__file__).parent / "demo" / "calibration.txt"
SOURCES = ("text", "random")
FEWEST = 8
"""Tokens for each input that second-order methods want at least; 16 are better. With fewer they may
be worse than methods that solve for nothing."""
MOST_TOKENS = 100_000_000
"""A hundred times what any method asks for; more is a slip of the hand that fills the memory."""


@dataclass(kw_only=True)  # not frozen: OmegaConf cannot merge into a frozen nested dataclass
class Calib:
    """Seeded windows of a text, or random tokens for models whose weights are random anyway.

    Each window begins as the tokenizer begins a text: a Gemma without its begin-of-text token has
    activations of another kind.
    """

    source: str = "text"
    """'text' or 'random'."""
    path: str | None = None
    """A .txt file, or .jsonl with a 'text' in each line; null: the bundled calibration text."""
    mixture: dict[str, float] | None = None
    """Instead of a path, several such files with their shares of the samples."""
    samples: int = 64
    tokens: int = 512
    """Length of each sample, tokens. 64 x 512 are 43 tokens for each input of the demo's widest
    layer; second-order methods want at least 8, better 16."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {SOURCES}, got '{self.source}'")
        if self.mixture is not None and not self._mixes():
            raise ValueError(
                "mixture must be files, each once, with shares above 0, without a path and with "
                f"source=text, got {self.mixture}"
            )
        if self.samples < 1 or self.tokens < 2:
            raise ValueError(
                f"at least 1 sample of 2 tokens is needed, got {self.samples} x {self.tokens}"
            )
        if self.samples * self.tokens > MOST_TOKENS:
            raise ValueError(f"at most {MOST_TOKENS:,} tokens, got {self.samples} x {self.tokens}")

    def inputs(self, checkpoint: Checkpoint) -> str:
        """A hash of the tokens, for the key of an artifact. Raises InputError as ``ids`` does."""
        return fingerprint(self.ids(checkpoint).tolist())

    def ids(self, checkpoint: Checkpoint) -> Tensor:
        """Token ids, (S, T). Raises InputError if the text is too short or cannot be read."""
        context = checkpoint.decoder.context
        if self.tokens > context:
            raise InputError(f"calib.tokens={self.tokens} exceeds the context of {context} tokens")
        generator = torch.Generator().manual_seed(self.seed)
        if self.source == "random":
            shape = (self.samples, self.tokens)
            return torch.randint(checkpoint.decoder.vocab, shape, generator=generator)
        if not has_tokenizer(checkpoint.path):
            raise InputError(f"{no_tokenizer(checkpoint.path)}; use calib=random")
        parts = self._parts()
        windows = [self._windows(checkpoint, *part, generator) for part in parts.items()]
        return torch.cat(windows)

    def _mixes(self) -> bool:
        shares = (self.mixture or {}).values()
        fitting = self.path is None and self.source == "text"
        once = len({Path(file) for file in self.mixture or {}}) == len(shares)
        return fitting and once and bool(shares) and all(0 < s < float("inf") for s in shares)

    def _parts(self) -> dict[Path, int]:
        """Every text and how many samples come from it, by the largest remainders.

        Raises InputError if it is none.
        """
        if self.mixture is None:
            return {Path(self.path) if self.path else BUNDLED: self.samples}
        whole = sum(self.mixture.values())
        exact = {file: self.samples * share / whole for file, share in self.mixture.items()}
        counts = {file: int(count) for file, count in exact.items()}
        missing = self.samples - sum(counts.values())
        for file in sorted(exact, key=lambda f: counts[f] - exact[f])[:missing]:
            counts[file] += 1
        if none := [file for file, count in counts.items() if count == 0]:
            raise InputError(
                f"calib.mixture gives '{none[0]}' none of calib.samples={self.samples}; raise "
                "these or its share"
            )
        return {Path(file): count for file, count in counts.items()}

    def _windows(
        self, checkpoint: Checkpoint, file: Path, samples: int, generator: torch.Generator
    ) -> Tensor:
        """Windows of one text that do not overlap, (samples, T)."""
        bos, ids = leading(checkpoint.path), tokenize(checkpoint.path, _read(file))
        if max(ids, default=0) >= checkpoint.decoder.vocab:
            raise InputError(
                f"the tokenizer in '{checkpoint.path}' makes token {max(ids)}, but the model's "
                f"vocabulary ends at {checkpoint.decoder.vocab - 1}"
            )
        body = self.tokens - len(bos)
        windows = len(ids) // body
        if windows < samples:
            raise InputError(
                f"calib.samples={samples} windows of calib.tokens={self.tokens} need "
                f"{samples * body} tokens, but the text has {len(ids)}"
            )
        chosen = torch.randperm(windows, generator=generator)[:samples].sort().values
        starts = (chosen * body).tolist()
        return torch.tensor([[*bos, *ids[start : start + body]] for start in starts])

    def observe(
        self, checkpoint: Checkpoint, wanted: frozenset[str], statistic: Callable[[int], Statistic]
    ) -> Observation:
        """Ask for a statistic of the inputs of the layers ``wanted`` on these tokens.

        Warns where a Gram matrix would have fewer than FEWEST tokens for each input.
        """
        facts = self.facts()
        if isinstance(statistic, type) and issubclass(statistic, Gram):
            forms = layers(checkpoint)
            widest = max((forms[name].cols for name in wanted), default=1)
            facts["calib_tokens_per_input"] = per_input = self.samples * self.tokens / widest
            if per_input < FEWEST:
                log.warning(
                    "calibration: %.1f tokens for each of %d inputs; below %d, weights that are "
                    "solved for fit the text rather than the layer: raise calib.samples to %d",
                    *(per_input, widest, FEWEST, -(-FEWEST * widest // self.tokens)),
                )
        return Observation(
            ids_ST=self.ids(checkpoint), wanted=wanted, statistic=statistic, facts=facts
        )

    def facts(self) -> dict[str, object]:
        """What a report says about the calibration."""
        text = self.mixture or self.path or BUNDLED.name if self.source == "text" else None
        return {"calib_text": text, "calib_tokens": self.samples * self.tokens, "seed": self.seed}


def _read(file: Path) -> str:
    """A text. Raises InputError if it cannot be read."""
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return "\n\n".join(_texts(content))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read calib.path '{file}': {error}") from error
    return content


def _texts(jsonl: str) -> Iterator[str]:
    """The 'text' of every line. Raises ValueError with the number of a bad one."""
    for number, line in enumerate(jsonl.split("\n"), 1):  # splitlines also cuts inside strings
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {type(error).__name__}: {error}") from error


class Squares:
    """Sum of the squares of each input."""

    def __init__(self, inputs: int) -> None:
        self.sum_C = torch.zeros(inputs, dtype=torch.float64)

    def add(self, x_NC: Tensor) -> None:
        self.sum_C = self.sum_C.to(x_NC.device) + x_NC.double().square().sum(0)

    @property
    def norm_C(self) -> Tensor:
        return self.sum_C.sqrt()


class Peak:
    """The largest absolute value of each input."""

    def __init__(self, inputs: int) -> None:
        self.max_C = torch.zeros(inputs)

    def add(self, x_NC: Tensor) -> None:
        self.max_C = torch.maximum(self.max_C.to(x_NC.device), x_NC.float().abs().amax(0))


class Gram:
    """X^T X / N and the mean absolute value of a layer's inputs, in float64."""

    def __init__(self, inputs: int) -> None:
        self._sum_CC = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._abs_C = torch.zeros(inputs, dtype=torch.float64)
        self.count = 0

    def add(self, x_NC: Tensor) -> None:
        # products in float32 are exact enough within one sample; adding them up is not
        self._sum_CC = self._sum_CC.to(x_NC.device)  # where the model computes
        self._sum_CC += (x_NC.T @ x_NC).double()
        self._abs_C = self._abs_C.to(x_NC.device) + x_NC.abs().sum(0, dtype=torch.float64)
        self.count += len(x_NC)

    @property
    def mean_CC(self) -> Tensor:
        return self._sum_CC / self.count

    @property
    def norm_C(self) -> Tensor:
        return self._sum_CC.diagonal().sqrt()

    @property
    def mean_abs_C(self) -> Tensor:
        return self._abs_C / self.count

    def divide(self, factor_C: Tensor) -> None:
        """Become what the inputs give once each is divided by its factor."""
        factor_C = factor_C.double()
        self._sum_CC /= factor_C[:, None] * factor_C
        self._abs_C /= factor_C


class Cross(Gram):
    """A Gram matrix, and that of the same inputs in the model before this stage, X0^T X / N."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self._cross_CC = torch.zeros(inputs, inputs, dtype=torch.float64)

    def pair(self, x_NC: Tensor, before_NC: Tensor) -> None:
        self.add(x_NC)
        self._cross_CC = self._cross_CC.to(x_NC.device) + (before_NC.T @ x_NC).double()

    @property
    def cross_CC(self) -> Tensor:
        return self._cross_CC / self.count


class Statistic(Protocol):
    """What is kept of the inputs of a layer."""

    def add(self, x_NC: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What to look at before layers change."""

    ids_ST: Tensor
    wanted: frozenset[str]
    """Names of the layers whose inputs are needed."""
    statistic: Callable[[int], Statistic]
    """Makes an empty statistic for a number of inputs."""
    facts: Stats = field(default_factory=dict)
    """What a report says about the data."""
    react: Callable[[PreTrainedModel, Block, dict[str, Any]], None] | None = None
    """Changes a block (norms and all) by the statistics of its layers, before layers change one
    by one; statistics that are no longer true must change with it."""
