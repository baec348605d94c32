"""Wanda: drop weights by |weight| x norm of their input (Sun et al. 2023, arXiv:2306.11695).

With ``swaps`` the mask is then bettered pair by pair, with ``refit`` the weights that stay are
solved for, the light version of ADMM (ALPS, arXiv:2406.07831).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from optpipe.calibrate import Gram, Observation, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import check_damp
from optpipe.leastsquares import damped, refit
from optpipe.prune.allocated import Allocated
from optpipe.prune.mask import parse_pattern
from optpipe.prune.swaps import swapped


@dataclass(frozen=True, kw_only=True)
class Wanda(Allocated):
    """Compares the weights of one output with each other."""

    swaps: int = 0
    """Most exchanges in each row of a dropped weight for a kept one that lowers the error."""
    refit: bool = False
    """Solve for the kept weights by least squares; else they do not change."""
    damp: float = 0.01
    """Of swaps and a refit: added to the diagonal of H, in units of its mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        if self.swaps < 0:
            raise ValueError(f"swaps must be at least 0, got {self.swaps}")

    def pruned(self, weight_RC: Tensor, statistic: Squares | Gram) -> tuple[Tensor, Tensor]:
        weight, mask = self.without_lowest(weight_RC, self.score(weight_RC, statistic))
        if not isinstance(statistic, Gram):
            return weight, mask
        gram_CC = damped(statistic.mean_CC, self.damp)
        if self.swaps:
            size = (parse_pattern(self.pattern) or (0, weight_RC.shape[1]))[1]
            mask = swapped(weight_RC, mask, gram_CC, self.swaps, size)
            weight = weight_RC * mask
        if self.refit:
            weight = refit(mask, gram_CC, weight_RC.double() @ gram_CC).to(weight.dtype)
        return weight, mask

    def score(self, weight_RC: Tensor, statistic: Squares | Gram) -> Tensor:
        """Eq. 1 of the paper."""
        return weight_RC.abs() * statistic.norm_C.to(weight_RC.dtype)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        solves = self.refit or self.swaps
        return self.calib.observe(checkpoint, wanted, Gram if solves else Squares)
