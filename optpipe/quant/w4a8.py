"""W4A8: int4 weights in groups, inputs in fp8, as TensorRT-LLM multiplies them under the name
W4A8_AWQ (4-bit weights with 8-bit inputs: QServe, arXiv:2405.04532). Weights are rounded as they
are, without the scales that AWQ searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optpipe.linear import Form
from optpipe.quant.clip import MSE, check_static_clip, fit_clip
from optpipe.quant.grid import GROUP_SIZES, Grid, check_groups
from optpipe.quant.inputs import WeightsAndInputs


@dataclass(frozen=True, kw_only=True)
class W4a8(WeightsAndInputs):
    """A GPU reads a quarter of the bytes and multiplies in fp8, from compute capability 8.9 on."""

    kind: ClassVar[str] = "fp8"

    group_size: int = 128
    """Inputs that share a scale: 16, 32, 64, 128 or 256; -1: all of an output channel."""
    clip: str = MSE
    """What the scale of a group is chosen by: its largest weight ('minmax'), or the least error of
    its weights ('mse')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_static_clip(self.clip)
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")

    @property
    def weight(self) -> dict[str, object]:
        return {"bits": 4, "number": "int", "group_size": self.group_size, "symmetric": True}

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, self.group_size)
        return super().form(name, form)

    def grid(self, weight_RC: Tensor, form: Form) -> Grid:
        return fit_clip(weight_RC, form, self.clip)
