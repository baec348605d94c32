"""Grids that may clip: for each group the scale of least cost on a list of shrunken ranges.

The range that spans all weights of a group is on the list, so that no group gets worse by it.
Shapes: R outputs, C inputs, G groups of W inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optpipe.linear import Form
from optpipe.quant.grid import Grid, fit

MINMAX, MSE, HESSIAN = "minmax", "mse", "hessian"
CLIPS = (MINMAX, MSE, HESSIAN)
RATIOS = tuple(1 - step / 50 for step in range(31))
"""Shares of the range, from all of it to 0.4: below that, two bits are better spent otherwise."""
FOUR_OVER_SIX = 1.5
"""Of e2m1, too: the numbers below 4 lie closer to each other than those up to 6."""

Loss = Callable[[Tensor], Tensor]
"""Errors of the weights, (R, G, W), to what they cost in each group, (R, G)."""


def check_clip(clip: str) -> None:
    """Raises ValueError for a name that is none of ``CLIPS``."""
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {CLIPS}, got '{clip}'")


def check_static_clip(clip: str) -> None:
    """Raises ValueError for a name that is none of those that look at weights alone."""
    if clip not in (MINMAX, MSE):
        raise ValueError(f"clip must be one of {(MINMAX, MSE)}, got '{clip}'")


def fit_clip(
    weight_RC: Tensor,
    form: Form,
    clip: str,
    power_C: Tensor | None = None,
    largest: Tensor | None = None,
) -> Grid:
    """The grid of 'minmax', or of least sum (w - q)^2 ('mse') or sum H_jj (w - q)^2 ('hessian').

    ``power_C`` is the mean square of each input, H_jj, in any unit; only 'hessian' looks at it.
    ``largest`` is as ``fit`` has it.
    """
    if clip == MINMAX:
        return fit(weight_RC, form, largest)
    if clip == MSE:
        return search(weight_RC, form, lambda error_RGW: error_RGW.square().sum(-1), largest)
    assert clip == HESSIAN and power_C is not None
    power_GW = power_C.float().reshape(form.groups, -1)

    def loss(error_RGW: Tensor) -> Tensor:
        return (error_RGW.square() * power_GW).sum(-1)

    return search(weight_RC, form, loss, largest)


def fit_output(
    weight_RC: Tensor, form: Form, gram_CC: Tensor, largest: Tensor | None = None
) -> Grid:
    """The grid with which each group alone loses the least output, d^T H_gg d (AWQ's clipping)."""
    size = form.cols // form.groups
    gram_GWW = gram_CC.float().unfold(0, size, size).unfold(1, size, size)
    gram_GWW = torch.stack([gram_GWW[g, g] for g in range(form.groups)])

    def loss(error_RGW: Tensor) -> Tensor:
        by_group = error_RGW.transpose(0, 1)  # (G, R, W)
        return ((by_group @ gram_GWW) * by_group).sum(-1).T

    return search(weight_RC, form, loss, largest)


def search(weight_RC: Tensor, form: Form, loss: Loss, largest: Tensor | None = None) -> Grid:
    """The grid of least ``loss`` in every group; on a tie the wider one."""
    weight_RC = weight_RC.float()
    if form.number == "nvfp4" and largest is None:
        largest = weight_RC.abs().amax()
    best, lowest_RG = None, torch.empty(0)
    for ratio in (*RATIOS, FOUR_OVER_SIX) if form.number == "nvfp4" else RATIOS:
        grid = fit(weight_RC * ratio, form, largest)
        error_RC = grid.decode(grid.encode(weight_RC)) - weight_RC
        loss_RG = loss(error_RC.reshape(form.rows, form.groups, -1))
        if best is None:
            best, lowest_RG = grid, loss_RG
            continue
        better = loss_RG < lowest_RG
        lowest_RG = torch.where(better, loss_RG, lowest_RG)
        scales = torch.where(better, grid.scales_RG, best.scales_RG)
        zeros = torch.where(better, grid.zeros_RG, best.zeros_RG)
        best = Grid(form, scales, zeros, best.global_scale)
    assert best is not None
    return best
