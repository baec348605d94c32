"""ADMM: find the support and the weights together, then refit the weights exactly (Boza 2024,
arXiv:2401.02938; ALPS, arXiv:2406.07831).

min tr((W - B) H (W - B)^T) with B sparse is split into a dense B and a sparse Z, held together by
the dual V (algorithm 1 of Boza, for inputs of equal norm):

    B = (W H + rho (Z - V)) (H + rho I)^-1     Z = the largest of B + V     V = V + B - Z

The share that is dropped grows over the first half of the steps, the support settles in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optpipe.calibrate import Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import check_damp
from optpipe.leastsquares import damped, refit
from optpipe.prune.allocated import Allocated
from optpipe.prune.mask import LAYER, keep_mask

Mask = Callable[[Tensor, float], Tensor]
"""(score (R, C), how far along, 0 to 1) -> which weights are kept, (R, C)."""


def support(weight_RC: Tensor, gram_CC: Tensor, mask: Mask, steps: int, rho: float) -> Tensor:
    """Which weights to keep, (R, C), for a regular Gram matrix; computed in the dtype of W."""
    norm_C, dtype = gram_CC.diagonal().sqrt(), weight_RC.dtype
    weight_RC = weight_RC * norm_C.to(dtype)  # from here on every input has norm one
    values_C, vectors_CC = torch.linalg.eigh(gram_CC / norm_C / norm_C[:, None])
    inverse_CC = ((vectors_CC / (values_C + rho)) @ vectors_CC.T).to(dtype)
    target_RC = weight_RC @ ((vectors_CC * values_C) @ vectors_CC.T).to(dtype)
    sparse_RC, dual_RC = weight_RC, torch.zeros_like(weight_RC)
    keep_RC = mask(weight_RC.abs(), 0.0)
    for step in range(1, steps + 1):
        dense_RC = (target_RC + rho * (sparse_RC - dual_RC)) @ inverse_CC
        keep_RC = mask((dense_RC + dual_RC).abs(), step / steps)
        sparse_RC = (dense_RC + dual_RC) * keep_RC
        dual_RC = dual_RC + dense_RC - sparse_RC
    return keep_RC


@dataclass(frozen=True, kw_only=True)
class Admm(Allocated):
    """The lowest error of a layer of all methods here, at some 40 products of its size."""

    pattern: str = LAYER
    steps: int = 40
    """Iterations, at least 2."""
    rho: float = 1.0
    """Penalty of B and Z being apart, in units of an input's squared norm."""
    damp: float = 0.01
    """Added to the diagonal of H, in units of its mean; steadies small calibration sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if not 0 < self.rho < float("inf"):
            raise ValueError(f"rho must be above 0 and finite, got {self.rho}")
        check_damp(self.damp)

    def pruned(self, weight_RC: Tensor, statistic: Gram) -> tuple[Tensor, Tensor]:
        gram_CC = damped(statistic.mean_CC, self.damp)
        keep_RC = support(weight_RC, gram_CC, self.mask, self.steps, self.rho)
        found_RC = refit(keep_RC, gram_CC, weight_RC.double() @ gram_CC)
        return found_RC.to(weight_RC.dtype), keep_RC

    def mask(self, score_RC: Tensor, progress: float) -> Tensor:
        """N:M at once; else a share that grows as the cube root of time, as in the paper."""
        share = min(1.0, 2 * progress) ** (1 / 3)
        return keep_mask(score_RC, self.sparsity * share, self.pattern)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
