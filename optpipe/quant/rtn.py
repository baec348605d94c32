"""Round to nearest: every weight to the closest code (the baseline of arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optpipe.linear import Form, Quantized
from optpipe.quant.grid import Quantize, fit


@dataclass(frozen=True, kw_only=True)
class Rtn(Quantize):
    """Needs no data; the baseline of every other method. Zeros stay zeros, so masks hold."""

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Any
    ) -> Quantized:
        grid = fit(weight_RC, form)
        return grid.module(grid.encode(weight_RC), layer)
