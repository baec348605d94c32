"""SVD-LLM: truncated SVD in the metric of the inputs (arXiv:2403.07378, algorithm 1).

The error that counts is that of the output, tr((W - W') H (W - W')^T) with H = X^T X / N. With a
whitening S, S S^T = H, it is the Frobenius norm of (W - W') S, which the truncated SVD of W S
minimizes: what is lost is the sum of the discarded squared singular values. S comes from the
eigenvectors of H (as in SVD-LLM v2, arXiv:2503.12340), which needs no damping when H is singular.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.lowrank.factorize import Factorize, truncated

NEGLIGIBLE = 1e-12
"""Directions whose share of the largest eigenvalue is below this carry no input."""


def whitened(weight_RC: Tensor, gram_CC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (R, K) and (K, C) that lose the least output for inputs of this Gram matrix.

    All in float64. Where inputs never go, the factors are zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram_CC)
    live = eigenvalues > NEGLIGIBLE * eigenvalues[-1]
    scale = eigenvalues[live].sqrt()
    left, right = truncated(weight_RC @ vectors[:, live] * scale, rank)
    missing = rank - right.shape[0]
    if missing > 0:  # fewer live directions than ranks: nothing is lost, the rest stays empty
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left, (right / scale) @ vectors[:, live].T


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Factorize):
    """Truncation-aware data whitening, without the paper's later updates of the factors."""

    calib: Calib = field(default_factory=Calib)

    def factors(self, weight_RC: Tensor, rank: int, statistic: Gram) -> tuple[Tensor, Tensor]:
        return whitened(weight_RC, statistic.mean_CC, rank)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
