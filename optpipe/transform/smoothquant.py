"""SmoothQuant: move outliers of activations into weights (Xiao et al. 2022, arXiv:2211.10438).

Input j of a layer is divided by s_j = max|X_j|^a / max|W_j|^(1 - a) and its weights multiplied by
it (eq. 4). The division is folded into the norm before the layer, so that nothing is computed that
was not before, and the model is the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite
from optpipe.calibrate import Calib, Peak
from optpipe.checkpoint import Checkpoint
from optpipe.family import Block, Decoder
from optpipe.fold import Fold, divide, folds, input_part, shared
from optpipe.kvcache import check_unrounded
from optpipe.linear import Layers
from optpipe.stage import Progress, Stage

LEAST = 1e-5
"""Factors below it are those of channels that hardly ever carry anything."""


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Stage):
    """For stages that round activations after it. Masks hold: a factor makes no zero a weight."""

    rewrites: ClassVar[bool] = True

    alpha: float = 0.5
    """0: all of the difficulty stays in the activations; 1: all of it goes to the weights."""
    linears: bool = False
    """Also fold from the output projection of the attention into the values, and from the down
    into the up projection of a gated MLP."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return layers

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers, decoder = model.layers(checkpoint), checkpoint.decoder
        if self.linears:
            check_unrounded(checkpoint.path)
        chosen = {block.name: self.folds(decoder, block) for block in decoder.blocks}
        first = {fold.readers[0] for found in chosen.values() for fold in found}
        wanted = frozenset(n for n in layers if n.removesuffix(".right") in first)

        def react(lm: PreTrainedModel, block: Block, seen: dict[str, Any]) -> None:
            for fold in chosen[block.name]:
                name = fold.readers[0]
                peak = seen[name] if name in seen else seen[f"{name}.right"]
                factor_C = shared(fold, self.factor(peak.max_C, weight_peaks(lm, fold)))
                dtype = checkpoint.floating(f"{fold.writer}.weight") if fold.norm else torch.float32
                divide(lm, decoder, fold, factor_C, dtype)

        observation = replace(self.calib.observe(checkpoint, wanted, Peak), react=react)
        rewrite(source, out, layers, lambda _, layer, __: layer, progress, observation)
        return {"folds": sum(map(len, chosen.values())), **observation.facts}

    def factor(self, input_C: Tensor, weight_C: Tensor) -> Tensor:
        """Eq. 4, from the largest absolute inputs and weights; 1 where there is nothing to move."""
        factor_C = input_C.pow(self.alpha) / weight_C.pow(1 - self.alpha)
        live = (input_C > 0) & (weight_C > 0)
        return torch.where(live, factor_C.clamp(min=LEAST), torch.ones_like(factor_C))

    def folds(self, decoder: Decoder, block: Block) -> tuple[Fold, ...]:
        return tuple(f for f in folds(decoder, block) if f.norm or self.linears)


def weight_peaks(lm: PreTrainedModel, fold: Fold) -> Tensor:
    """The largest absolute weight that each input meets, (C)."""
    peaks = [input_part(lm, name).weight.abs().amax(0) for name in fold.readers]
    return torch.stack(peaks).amax(0)
