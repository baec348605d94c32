"""NVFP4: weights, and on request inputs, in 4-bit floating point, 16 a scale (NVIDIA et al. 2025,
arXiv:2509.25149; weight = e2m1 code * (e4m3 scale of its block * float32 of the layer)).

What is stored is what nvidia-modelopt and compressed-tensors store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optpipe import microscaling
from optpipe.linear import Form
from optpipe.quant.clip import MINMAX, check_static_clip, fit_clip
from optpipe.quant.grid import FIXED, Grid, check_groups
from optpipe.quant.inputs import WeightsAndInputs

NUMBER = "nvfp4"


@dataclass(frozen=True, kw_only=True)
class Nvfp4(WeightsAndInputs):
    """4.5 bits a weight. GPUs from compute capability 10.0 on multiply these natively."""

    kind: ClassVar[str] = NUMBER
    ways: ClassVar[tuple[str, ...]] = ("none", "block")

    activations: str = "none"
    """'none': inputs stay as they are (W4A16); 'block': they are rounded likewise (W4A4), with
    scales of blocks as they come, relative to one of the layer from calibration."""
    clip: str = MINMAX
    """What the scale of a block is chosen by: its largest weight ('minmax'), or the least error of
    its weights ('mse'), among them the scale that puts the largest at 4 instead of 6
    (four over six, arXiv:2512.02010)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_static_clip(self.clip)

    @property
    def weight(self) -> dict[str, object]:
        return {"number": NUMBER, **FIXED[NUMBER]}

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, microscaling.BLOCK[NUMBER], fixed=True)
        return super().form(name, form)

    def grid(self, weight_RC: Tensor, form: Form) -> Grid:
        return fit_clip(weight_RC, form, self.clip)

    def scale(self, largest: float) -> Tensor:
        return microscaling.global_scale(torch.tensor(largest))
