"""Change a weight column by column and let later columns make up for it: SparseGPT and GPTQ.

For one layer, H = X^T X / N and U is the upper Cholesky factor of its damped inverse. Once column j
is fixed to q_j, the columns after it move by -(w_j - q_j) / U_jj * U_j,: (GPTQ, arXiv:2210.17323,
eq. 2 and 3 in their Cholesky form, algorithm 1; SparseGPT, arXiv:2301.00774, algorithm 1). What a
column is fixed to is up to the method. Shapes: R outputs, C inputs, W columns decided together.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from optpipe.leastsquares import damped

BLOCK = 128
"""Columns whose updates to all later ones are applied at once: the same result, in fewer passes."""


class Projection(Protocol):
    """What columns are fixed to."""

    @property
    def width(self) -> int:
        """Columns about which something is decided together, W."""

    def decide(self, weight_RW: Tensor, factor_W: Tensor, start: int) -> None:
        """Look at the columns from ``start`` on, before the first of them is fixed.

        ``factor_W`` is the diagonal of U: a weight that becomes zero costs (w / U_jj)^2.
        """

    def column(self, weight_R: Tensor, j: int) -> Tensor:
        """What column j becomes, (R)."""


def check_damp(damp: float) -> None:
    """Raises ValueError for a damping that ``inverse_factor`` cannot take."""
    if not 0 < damp < float("inf"):
        raise ValueError(f"damp must be above 0 and finite, got {damp}")


def inverse_factor(gram_CC: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of (H + damp * mean(diag H))^-1, U^T U, float64 (C, C).

    Raises ValueError if the damping is too small for H to be regular.
    """
    # H = V V^T with V upper: the Cholesky factor of H read backwards. Then U = V^-1.
    try:
        upper = torch.linalg.cholesky(damped(gram_CC, damp).flip(0, 1)).flip(0, 1)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"damp={damp:g} is too small for a layer with inputs that are few or alike; raise it "
            "or calib.samples"
        ) from error
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor


def compensate(weight_RC: Tensor, factor_CC: Tensor, projection: Projection) -> Tensor:
    """``weight_RC`` with every column fixed, float64."""
    work_CR = weight_RC.T.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    cols, width = (
        len(work_CR),
        projection.width,
    )  # transposed: a column is contiguous, and 3x faster
    block = max(BLOCK - BLOCK % width, width)  # what is decided together lies in one block
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors = torch.zeros_like(work_CR[start:stop])
        for j in range(start, stop):
            if j % width == 0:
                ahead = slice(j, min(j + width, cols))
                projection.decide(work_CR[ahead].T, factor_CC.diagonal()[ahead], j)
            fixed = projection.column(work_CR[j], j)
            error = (work_CR[j] - fixed) / factor_CC[j, j]
            work_CR[j] = fixed
            work_CR[j + 1 : stop].addr_(factor_CC[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        work_CR[stop:].addmm_(factor_CC[start:stop, stop:].T, errors, alpha=-1)
    return work_CR.T
