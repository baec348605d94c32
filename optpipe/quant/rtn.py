"""Round to nearest: every weight to the closest code (the baseline of arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from optpipe.blockwise import largest_of
from optpipe.calibrate import Calib, Observation, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, Quantized
from optpipe.quant.clip import HESSIAN, MINMAX, check_clip, fit_clip
from optpipe.quant.grid import WeightOnly


@dataclass(frozen=True, kw_only=True)
class Rtn(WeightOnly):
    """The baseline of every other method. Zeros stay zeros, so masks hold."""

    clip: str = MINMAX
    """What the scales of a group are chosen by: its range ('minmax'), or the least error of its
    weights ('mse') or of those weighted by the power of their inputs ('hessian')."""
    calib: Calib = field(default_factory=Calib)
    """Only clip='hessian' looks at data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip)

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Squares | None
    ) -> Quantized:
        power_C = None if statistic is None else statistic.sum_C
        grid = fit_clip(weight_RC, form, self.clip, power_C, largest_of(layer))
        return grid.module(grid.encode(weight_RC), layer)

    def inputs(self, model: Checkpoint) -> str | None:
        return self.calib.inputs(model) if self.clip == HESSIAN else None

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        return self.calib.observe(checkpoint, wanted, Squares) if self.clip == HESSIAN else None
