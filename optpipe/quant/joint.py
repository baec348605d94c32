"""Prune and round in one pass: columns are dropped and put on a grid together, and the ones after
them make up for both errors at once (SparseGPT, arXiv:2301.00774, section 3.5).

What is dropped is decided as SparseGPT does, on weights that have moved already, in the order of
the layer's own columns; what is kept is rounded as GPTQ does. Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import largest_of, select
from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import check_damp, compensate, inverse_factor
from optpipe.linear import Form, Layers, Quantized, dense
from optpipe.prune.mask import sparsity
from optpipe.prune.sparsegpt import Dropping, SparseGpt
from optpipe.quant.clip import HESSIAN, check_clip, fit_clip
from optpipe.quant.gptq import Rounding
from optpipe.quant.grid import WeightOnly
from optpipe.stage import Progress


class DroppingAndRounding:
    """Decides as the one, fixes as the other; the mask is shared."""

    def __init__(self, dropping: Dropping, rounding: Rounding) -> None:
        self.width, self.decide = dropping.width, dropping.decide
        self.column = rounding.column


@dataclass(frozen=True, kw_only=True)
class Joint(WeightOnly):
    """One pass instead of SparseGPT and then GPTQ."""

    sparsity: float = 0.5
    """Share of weights to drop, 0 to 1; an N:M pattern fixes it instead."""
    pattern: str = "layer"
    """'layer' drops freely, 'row' as many in each row; 'N:M' keeps N of every M inputs."""
    damp: float = 0.01
    """Added to the diagonal of H, in units of its mean; steadies small calibration sets."""
    clip: str = HESSIAN
    """As of GPTQ: 'minmax', 'mse' or 'hessian'."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)
        check_clip(self.clip)
        if self.head:
            raise ValueError("head must be false: the output projection is not pruned")
        _ = self.pruning

    @property
    def pruning(self) -> SparseGpt:
        """The half that drops. Raises ValueError for a sparsity or a pattern that it refuses."""
        return SparseGpt(sparsity=self.sparsity, pattern=self.pattern, targets=self.targets)

    def plan(self, layers: Layers) -> Layers:
        return super().plan(self.pruning.plan(layers))

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Gram
    ) -> Quantized:
        gram_CC = statistic.mean_CC
        grid = fit_clip(weight_RC, form, self.clip, gram_CC.diagonal(), largest_of(layer))
        dropping = Dropping(weight_RC, self.sparsity, self.pattern)
        order_C = torch.arange(form.cols, device=gram_CC.device)
        rounding = Rounding(grid, order_C, dropping.keep_RC)
        factor_CC = inverse_factor(gram_CC, self.damp)
        compensate(weight_RC, factor_CC, DroppingAndRounding(dropping, rounding))
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        return grid.module(rounding.codes_RC, dense(weight_RC, bias, dropping.keep_RC))

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers = model.layers(checkpoint)
        gone = sum(self.pruning.dropped(layers[name]) for name in select(layers, self.targets))
        stats = super().run(source, out, progress)
        return {"sparsity": sparsity(gone, checkpoint), **stats}

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)
