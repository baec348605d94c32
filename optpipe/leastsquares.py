"""The best weights on a given support: exact least squares, row by row, in float64.

A layer with the inputs of a Gram matrix H = X^T X / N loses tr((W - W') H (W - W')^T). For a row
with support S that is least where H_SS w'_S = (W H)_S (ALPS, arXiv:2406.07831, eq. 9, there by
conjugate gradients). Shapes: R outputs, C inputs, B rows solved together, K the largest support
among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 1 << 24
"""Of the systems solved at a time, B * K * K: 128 MB."""


def damped(gram_CC: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) on the diagonal, float64: what is solved has to be regular.

    In the loss it is a pull towards the original weights. An input that is never there gets a one.
    """
    result = gram_CC.to(torch.float64, copy=True)
    diagonal = result.diagonal()
    diagonal += damp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    return result


def refit(keep_RC: Tensor, gram_CC: Tensor, target_RC: Tensor) -> Tensor:
    """The weights W' of least loss that are zero outside ``keep_RC``, float64 (R, C).

    ``gram_CC`` is a regular H, ``target_RC`` is W H: what the outputs should be, in correlation
    with the inputs.
    """
    result = torch.zeros_like(target_RC)
    sizes_R = keep_RC.sum(1)
    order_R = sizes_R.argsort(stable=True)  # supports of about one size together: little padding
    rows = max(1, ELEMENTS // max(1, int(sizes_R.max())) ** 2)
    for rows_B in order_R.split(rows):
        result[rows_B] = _solve(keep_RC[rows_B], gram_CC, target_RC[rows_B])
    return result


def _solve(keep_BC: Tensor, gram_CC: Tensor, target_BC: Tensor) -> Tensor:
    most = int(keep_BC.sum(1).max())
    place_BK = keep_BC.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    real_BK = keep_BC.gather(1, place_BK)  # the others are padding: an identity of their own
    system_BKK = gram_CC[place_BK[:, :, None], place_BK[:, None, :]]
    system_BKK *= real_BK[:, :, None] & real_BK[:, None, :]
    system_BKK.diagonal(dim1=1, dim2=2)[~real_BK] = 1.0
    wanted_BK = target_BC.gather(1, place_BK) * real_BK
    factor_BKK = torch.linalg.cholesky(system_BKK)
    found_BK = torch.cholesky_solve(wanted_BK[..., None], factor_BKK)[..., 0]
    return torch.zeros_like(target_BC).scatter_(1, place_BK, found_BK)


def loss(change_RC: Tensor, gram_CC: Tensor) -> float:
    """tr(D H D^T): the mean squared change of a layer's outputs."""
    change_RC = change_RC.to(gram_CC.dtype)
    return float(((change_RC @ gram_CC) * change_RC).sum())
