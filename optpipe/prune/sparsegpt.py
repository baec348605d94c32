"""SparseGPT: drop weights by what that costs, and let the others make up for it (Frantar and
Alistarh 2023, arXiv:2301.00774).

The cost of dropping a weight is (w / U_jj)^2 with U the Cholesky factor of the inverse Hessian
(eq. 4 and algorithm 1); which ones go is decided for 128 columns at a time, or for the M columns of
an N:M group, on weights that have already moved. Unlike nvidia-modelopt's, the kept weights change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optpipe.calibrate import Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import BLOCK, check_damp, compensate, inverse_factor
from optpipe.prune.allocated import Allocated
from optpipe.prune.mask import LAYER, all_but_lowest, parse_pattern


class Dropping:
    """Keeps the dearest weights, the others become zero."""

    def __init__(self, weight_RC: Tensor, sparsity: float, pattern: str) -> None:
        self.sparsity, self.pattern = sparsity, pattern
        self.n_m = parse_pattern(pattern)
        self.keep_RC = torch.ones_like(weight_RC, dtype=torch.bool)

    @property
    def width(self) -> int:
        return self.n_m[1] if self.n_m else BLOCK

    def decide(self, weight_RW: Tensor, factor_W: Tensor, start: int) -> None:
        rows, width = weight_RW.shape
        cost_RW = (weight_RW / factor_W).square()
        if self.n_m:
            keep = all_but_lowest(cost_RW, self.n_m[1] - self.n_m[0])
        elif self.pattern == LAYER:
            drop = self._until(rows * (start + width)) - self._until(rows * start)
            keep = all_but_lowest(cost_RW.reshape(1, -1), drop).reshape(rows, width)
        else:
            keep = all_but_lowest(cost_RW, self._until(start + width) - self._until(start))
        self.keep_RC[:, start : start + width] = keep

    def _until(self, weights: int) -> int:
        """How many of the first ``weights`` go, so that blocks add up to what was claimed."""
        return round(self.sparsity * weights)

    def column(self, weight_R: Tensor, j: int) -> Tensor:
        return weight_R * self.keep_RC[:, j]


@dataclass(frozen=True, kw_only=True)
class SparseGpt(Allocated):
    """Weights of a layer compete within blocks of 128 columns, across its outputs."""

    pattern: str = LAYER
    damp: float = 0.01
    """Added to the diagonal of H, in units of its mean; steadies small calibration sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)

    def pruned(self, weight_RC: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        dropping = Dropping(weight_RC, self.sparsity, self.pattern)
        factor_CC = inverse_factor(statistic.mean_CC, self.damp)
        moved = compensate(weight_RC, factor_CC, dropping)
        return moved.to(weight_RC.dtype), dropping.keep_RC

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
