"""What recovery stages share: a budget of calibration tokens, and the loop that spends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from optpipe.artifact import Artifact, Stats
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Layers
from optpipe.recover.tune import check_tunable
from optpipe.stage import Progress, Stage

WARM_UP = 0.1


@dataclass(frozen=True, kw_only=True)
class Recover(Stage):
    """Changes no form: masks, codes and ranks stay."""

    rewrites: ClassVar[bool] = True

    tokens: int = 131_072
    """Calibration tokens to train on; the same text comes again and again."""
    rate: float = 0.01
    """Most that a step changes a weight, in units of its tensor's root mean square."""
    batch: int = 4
    """Samples of a step."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be above 0 and below 1, got {self.rate}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")

    def plan(self, layers: Layers) -> Layers:
        check_tunable(layers)
        return layers

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        return self.run_with(source, source, out, progress)

    def steps(self, tokens: int) -> int:
        """Steps that the budget pays for, of samples of ``tokens``."""
        return -(-self.tokens // (self.batch * tokens))

    def train(
        self,
        learn: Callable[[list[int], float], None],
        shape: tuple[int, int],
        report: Callable[[int, int], None],
    ) -> int:
        """Spend the budget; returns the tokens it was.

        ``learn`` takes a step on chosen samples at a rate; ``shape``: samples and their tokens.
        ``report`` is called with the step and all steps.
        """
        samples, tokens = shape
        steps = self.steps(tokens)
        for step, chosen in enumerate(batches(samples, self.batch, steps, self.calib.seed)):
            report(step, steps)
            learn(chosen, self.rate * rate_at(step, steps))
        return steps * self.batch * tokens


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate at a step: a short rise, then half a cosine down to zero."""
    rise = max(round(WARM_UP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def batches(samples: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Sample numbers of each step; all come equally often, in an order that is never the same."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch:
            waiting += torch.randperm(samples, generator=generator).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield chosen
