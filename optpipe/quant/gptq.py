"""GPTQ: round column by column and let later columns make up for it (arXiv:2210.17323).

A weight that pruning dropped stays zero, and the columns after it make up for that too. Shapes: R
outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optpipe.blockwise import largest_of
from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import check_damp, compensate, inverse_factor
from optpipe.linear import Form, Quantized, mask_of
from optpipe.quant.clip import HESSIAN, check_clip, fit_clip
from optpipe.quant.grid import Grid, WeightOnly


class Rounding:
    """Fixes columns to the nearest values of a grid, those without a weight to zero.

    Column j of the recursion is column ``order_C[j]`` of the layer.
    """

    width = 1

    def __init__(self, grid: Grid, order_C: Tensor, keep_RC: Tensor | None) -> None:
        self.grid, self.order, self.keep_RC = grid, order_C.tolist(), keep_RC
        shape, device = (grid.form.rows, grid.form.cols), grid.scales_RG.device
        self.codes_RC = torch.empty(shape, dtype=torch.uint8, device=device)

    def decide(self, weight_RW: Tensor, factor_W: Tensor, start: int) -> None:
        """Nothing: the grid is static."""

    def column(self, weight_R: Tensor, j: int) -> Tensor:
        column = self.order[j]
        codes, fixed = self.grid.column(weight_R, column)
        if self.keep_RC is not None:
            keep = self.keep_RC[:, column]
            fixed, codes = fixed * keep, torch.where(keep, codes, self.grid.zero(column))
        self.codes_RC[:, column] = codes
        return fixed


@dataclass(frozen=True, kw_only=True)
class Gptq(WeightOnly):
    """Grids are fitted to the original weights (static groups), whatever the order of columns."""

    act_order: bool = True
    """Fix the columns with the strongest inputs first, while there are most others to make up."""
    damp: float = 0.01
    """Added to the diagonal of H, in units of its mean; steadies small calibration sets."""
    clip: str = HESSIAN
    """What the scales of a group are chosen by: its range ('minmax'), or the least error of its
    weights ('mse') or of those weighted by the power of their inputs ('hessian')."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        check_clip(self.clip)

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Gram
    ) -> Quantized:
        gram_CC = statistic.mean_CC
        grid = fit_clip(weight_RC, form, self.clip, gram_CC.diagonal(), largest_of(layer))
        order_C = torch.arange(form.cols, device=gram_CC.device)
        if self.act_order:
            order_C = gram_CC.diagonal().argsort(descending=True, stable=True)
        factor_CC = inverse_factor(gram_CC[order_C][:, order_C], self.damp)
        rounding = Rounding(grid, order_C, mask_of(layer))
        compensate(weight_RC[:, order_C], factor_CC, rounding)
        return grid.module(rounding.codes_RC, layer)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
