"""ASVD: truncated SVD with inputs scaled by their size (arXiv:2312.05821, eq. 7 and 8).

W diag(s) is truncated and diag(s)^-1 brought back, with s = (mean |x|)^alpha for each input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.lowrank.factorize import Factorize, truncated

TINY = 1e-6
"""Of the largest input: one that is never there would divide by zero."""


@dataclass(frozen=True, kw_only=True)
class Asvd(Factorize):
    """Knows how large inputs are, not how they hang together."""

    alpha: float = 0.5
    """Power of the mean absolute input, above 0 and at most 1."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {self.alpha}")

    def factors(self, weight_RC: Tensor, rank: int, statistic: Gram) -> tuple[Tensor, Tensor]:
        scale_C = statistic.mean_abs_C.clamp(min=TINY * float(statistic.mean_abs_C.max()))
        scale_C = scale_C**self.alpha
        left, right = truncated(weight_RC * scale_C, rank)
        return left, right / scale_C

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
