"""Weights in 4 bits beside inputs that may be rounded, too: to nearest, or by GPTQ on the inputs as
they are (arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optpipe.blockwise import largest_of
from optpipe.calibrate import Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, Quantized
from optpipe.quant.clip import HESSIAN, check_clip, fit_clip
from optpipe.quant.gptq import Gptq
from optpipe.quant.inputs import Magnitudes, WeightsAndInputs

METHODS = ("gptq", "rtn")


class Seen(Gram):
    """What GPTQ and what the scale of inputs need to know."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self.magnitudes = Magnitudes(inputs)

    def add(self, x_NC: Tensor) -> None:
        super().add(x_NC)
        self.magnitudes.add(x_NC)


@dataclass(frozen=True, kw_only=True)
class FourBits(WeightsAndInputs):
    """Shared by nvfp4 and w4a8."""

    method: str = "gptq"
    """'gptq': column by column, later ones make up for earlier ones; 'rtn': each to nearest."""
    clip: str = HESSIAN
    """What the scale of a group is chosen by: its largest weight ('minmax'), or the least error of
    its weights ('mse') or of those weighted by the power of their inputs ('hessian')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got '{self.method}'")
        check_clip(self.clip)

    @property
    def looks(self) -> bool:
        """Whether calibration data changes the result."""
        return self.calibrated or self.method == "gptq" or self.clip == HESSIAN

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Any
    ) -> Quantized:
        """``statistic`` is a Seen, or None where data changes nothing."""
        if self.method == "gptq":
            gptq = Gptq(clip=self.clip, calib=self.calib)
            quantized = gptq.quantize(layer, weight_RC, form, statistic)
        else:
            power_C = None if statistic is None else statistic.mean_CC.diagonal()
            grid = fit_clip(weight_RC, form, self.clip, power_C, largest_of(layer))
            quantized = grid.module(grid.encode(weight_RC), layer)
        if statistic is not None and self.calibrated:
            largest = statistic.magnitudes.percentile(self.percentile)
            quantized.input_scale = self.scale(largest)
        return quantized

    def inputs(self, model: Checkpoint) -> str | None:
        return self.calib.inputs(model) if self.looks else None

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        return self.calib.observe(checkpoint, wanted, Seen) if self.looks else None
