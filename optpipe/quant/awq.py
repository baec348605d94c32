"""AWQ: scale up the weights of the strongest inputs before rounding, and clip (Lin et al. 2023,
arXiv:2306.00978).

Input j is divided by s_j = mean|X_j|^a, in the norm or the layer that makes it, and its weights are
multiplied by it (eq. 4 and 5). a is the one of a list, 0 among them, with which the layers that
read the same inputs lose the least output; then the range of each group is clipped where that
loses less. Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import order
from optpipe.blockwise import largest_of
from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import Block
from optpipe.fold import Fold, divide, folds, input_part, shared
from optpipe.kvcache import check_unrounded
from optpipe.linear import Form, Layers, Quantized
from optpipe.quant.clip import fit_output
from optpipe.quant.grid import Grid, WeightOnly, fit

LEAST = 1e-4
"""Strength below which inputs count alike, as a share of the strongest."""


@dataclass(frozen=True, kw_only=True)
class Awq(WeightOnly):
    """Rounds to nearest. The head is clipped, not scaled, and so are layers that read what a
    nonlinear activation makes. Masks hold."""

    rewrites: ClassVar[bool] = True

    exponents: int = 20
    """How many a are tried, evenly between 0 and 1, besides 0."""
    clip: bool = True
    """Clip the range of each group where that loses less of the output."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponents < 1:
            raise ValueError(f"exponents must be at least 1, got {self.exponents}")

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return super().plan(layers)

    def inputs(self, model: Checkpoint) -> str:
        """Raises InputError also if none of the targets has inputs that could be scaled."""
        decoder = model.decoder
        readers = [r for b in decoder.blocks for fold in folds(decoder, b) for r in fold.readers]
        parts = [part for reader in readers for part in (reader, f"{reader}.right")]
        if not any(fnmatch(part, target) for part in parts for target in self.targets):
            raise InputError(
                f"targets={list(self.targets)} matches no layer of {decoder.family} whose inputs "
                f"can be scaled; those of block 0 that can are {sorted(set(readers[:8]))}"
            )
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        check_unrounded(checkpoint.path)
        decoder, exponents = checkpoint.decoder, list[float]()

        def react(lm: PreTrainedModel, block: Block, seen: dict[str, Any]) -> None:
            for fold in folds(decoder, block):
                names = [n for r in fold.readers for n in (r, f"{r}.right") if n in seen]
                if not names:
                    continue
                grams = [seen[name] for name in names]
                weights = [input_part(lm, name).weight for name in names]
                exponent, factor_C = self.scale(weights, grams[0], fold)
                exponents.append(exponent)
                dtype = checkpoint.floating(f"{fold.writer}.weight") if fold.norm else torch.float32
                used_C = divide(lm, decoder, fold, factor_C, dtype)
                for gram in grams:
                    gram.divide(used_C)

        seen = self.calib.observe(checkpoint, wanted, Gram)
        return replace(seen, facts={**seen.facts, "exponents": exponents}, react=react)

    def scale(self, weights: Sequence[Tensor], gram: Gram, fold: Fold) -> tuple[float, Tensor]:
        """The best exponent of layers that read the same inputs, and its factors, (C)."""
        mean_C = gram.mean_abs_C.clamp(min=LEAST * float(gram.mean_abs_C.max()))
        strength_C = shared(fold, mean_C.clamp(min=torch.finfo(torch.float32).tiny)).float()
        gram_CC = gram.mean_CC.float()

        def lost(factor_C: Tensor) -> float:
            return sum(output_loss(w, factor_C, gram_CC, self._fit) for w in weights)

        tried = []
        for step in range(self.exponents + 1):
            factor_C = strength_C ** (step / self.exponents)
            factor_C = factor_C / (factor_C.max() * factor_C.min()).sqrt()
            tried.append((lost(factor_C), step / self.exponents, factor_C))
        _, exponent, factor_C = min(tried, key=lambda one: one[:2])
        return exponent, factor_C

    def _fit(self, weight_RC: Tensor) -> Grid:
        rows, cols = weight_RC.shape
        return fit(weight_RC, self.form("a layer to scale", Form(rows=rows, cols=cols)))

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Gram
    ) -> Quantized:
        largest = largest_of(layer)
        if self.clip:
            grid = fit_output(weight_RC, form, statistic.mean_CC, largest)
        else:
            grid = fit(weight_RC, form, largest)
        return grid.module(grid.encode(weight_RC), layer)


def output_loss(
    weight_RC: Tensor, factor_C: Tensor, gram_CC: Tensor, fitted: Callable[[Tensor], Grid]
) -> float:
    """Mean square of what the output is off by if the weight is rounded once it is scaled."""
    scaled_RC = weight_RC * factor_C
    grid = fitted(scaled_RC)
    error_RC = (grid.decode(grid.encode(scaled_RC)) - scaled_RC) / factor_C
    return float(((error_RC @ gram_CC) * error_RC).sum())
