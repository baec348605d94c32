"""GPTQ: round column by column and let later columns make up for it (arXiv:2210.17323).

For one layer, H = X^T X / N and U is the upper Cholesky factor of its damped inverse. Once column j
is fixed to q_j, the columns after it move by -(w_j - q_j) / U_jj * U_j,: (eq. 2 and 3 of the paper
in their Cholesky form, algorithm 1). A weight that pruning dropped is fixed to zero, and the
columns after it make up for that too. Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optpipe.blockwise import Observation
from optpipe.calibrate import Calib, Gram
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, Quantized, mask_of
from optpipe.quant.grid import Grid, Quantize, fit

BLOCK = 128
"""Columns whose updates to all later ones are applied at once: the same result, in fewer passes."""


def inverse_factor(gram_CC: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of (H + damp * mean(diag H))^-1, U^T U, float64 (C, C)."""
    damped = gram_CC.clone()
    diagonal = damped.diagonal()
    diagonal += damp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # no input ever, and no damping: any positive number will do
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def compensate(
    weight_RC: Tensor, factor_CC: Tensor, grid: Grid, order_C: Tensor, keep_RC: Tensor | None
) -> Tensor:
    """Codes, uint8 (R, C), of the columns of ``weight_RC``, fixed in the order ``order_C``.

    ``factor_CC`` belongs to the reordered columns. Where ``keep_RC`` is False the code is the one
    that stands for zero.
    """
    work = weight_RC[:, order_C].double()
    codes_RC = torch.empty(work.shape, dtype=torch.uint8)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        errors = torch.zeros(work.shape[0], stop - start, dtype=work.dtype)
        for j in range(start, stop):
            column = int(order_C[j])
            codes, fixed = grid.column(work[:, j], column)
            if keep_RC is not None:
                keep = keep_RC[:, column]
                fixed = fixed * keep
                codes = torch.where(keep, codes, _zero_code(grid, column))
            codes_RC[:, column] = codes
            error = (work[:, j] - fixed) / factor_CC[j, j]
            work[:, j + 1 : stop] -= error[:, None] * factor_CC[j, j + 1 : stop]
            errors[:, j - start] = error
        work[:, stop:] -= errors @ factor_CC[start:stop, stop:]
    return codes_RC


def _zero_code(grid: Grid, column: int) -> Tensor:
    group = 0 if grid.form.groups == 1 else column // grid.form.group_size
    return grid.zeros_RG[:, group]


@dataclass(frozen=True, kw_only=True)
class Gptq(Quantize):
    """Grids are fitted to the original weights (static groups), whatever the order of columns."""

    act_order: bool = True
    """Fix the columns with the strongest inputs first, while there are most others to make up."""
    damp: float = 0.01
    """Added to the diagonal of H, in units of its mean; steadies small calibration sets."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damp < float("inf"):
            raise ValueError(f"damp must be above 0 and finite, got {self.damp}")

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Gram
    ) -> Quantized:
        gram_CC, grid = statistic.mean_CC, fit(weight_RC, form)
        order_C = torch.arange(form.cols)
        if self.act_order:
            order_C = gram_CC.diagonal().argsort(descending=True, stable=True)
        factor_CC = inverse_factor(gram_CC[order_C][:, order_C], self.damp)
        codes_RC = compensate(weight_RC, factor_CC, grid, order_C, mask_of(layer))
        return grid.module(codes_RC, layer)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        ids_ST, facts = self.calib.ids(checkpoint), self.calib.facts()
        return Observation(ids_ST=ids_ST, wanted=wanted, statistic=Gram, facts=facts)
