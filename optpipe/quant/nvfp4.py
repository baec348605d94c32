"""NVFP4: weights, and on request inputs, in 4-bit floating point, 16 a scale (NVIDIA et al. 2025,
arXiv:2509.25149; weight = e2m1 code * (e4m3 scale of its block * float32 of the layer)).

What is stored is what nvidia-modelopt and compressed-tensors store; layers that runtimes multiply
as one, as q, k and v, have the float32 in common (family.joined), which is what they load. Unless
clip=minmax, the scale that puts the largest weight of a block at 4 instead of 6 is tried, too
(four over six, arXiv:2512.02010).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optpipe import microscaling
from optpipe.linear import Form
from optpipe.quant.fourbits import FourBits
from optpipe.quant.grid import FIXED, check_groups

NUMBER = "nvfp4"


@dataclass(frozen=True, kw_only=True)
class Nvfp4(FourBits):
    """4.5 bits a weight. GPUs from compute capability 10.0 on multiply these natively."""

    kind: ClassVar[str] = NUMBER
    ways: ClassVar[tuple[str, ...]] = ("none", "block")

    activations: str = "none"
    """'none': inputs stay as they are (W4A16); 'block': they are rounded likewise (W4A4), with
    scales of blocks as they come, relative to one of the layer from calibration."""

    @property
    def weight(self) -> dict[str, object]:
        return {"number": NUMBER, **FIXED[NUMBER]}

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, microscaling.BLOCK[NUMBER], fixed=True)
        return super().form(name, form)

    def scale(self, largest: float) -> Tensor:
        return microscaling.global_scale(torch.tensor(largest))
