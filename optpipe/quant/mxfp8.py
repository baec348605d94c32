"""MXFP8: weights, and on request inputs, in 8-bit floating point, 32 a power of two (Rouhani et al.
2023, arXiv:2310.10537; weight = e4m3 code * e8m0 scale of its block)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from optpipe import microscaling
from optpipe.linear import Form, Quantized
from optpipe.quant.clip import MINMAX, check_static_clip, fit_clip
from optpipe.quant.grid import FIXED, Quantize, check_groups

NUMBER = "mxfp8"
INPUTS = {"none": None, "block": "mxfp8_block"}


@dataclass(frozen=True, kw_only=True)
class Mxfp8(Quantize):
    """8.25 bits a weight, no calibration. GPUs from compute capability 10.0 on multiply these."""

    activations: str = "none"
    """'none': inputs stay as they are; 'block': they are rounded likewise as they come."""
    clip: str = MINMAX
    """What the scale of a block is chosen by: its largest weight ('minmax'), or the least error of
    its weights ('mse')."""

    def __post_init__(self) -> None:
        if self.activations not in INPUTS:
            raise ValueError(f"activations must be one of {(*INPUTS,)}, got '{self.activations}'")
        check_static_clip(self.clip)

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, microscaling.BLOCK[NUMBER], fixed=True)
        fields = {"number": NUMBER, "inputs": INPUTS[self.activations], **FIXED[NUMBER]}
        return replace(form, **fields)  # type: ignore[arg-type]

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: None
    ) -> Quantized:
        grid = fit_clip(weight_RC, form, self.clip)
        return grid.module(grid.encode(weight_RC), layer)
