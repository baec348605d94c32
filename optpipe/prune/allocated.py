"""Which share of each layer goes: the same everywhere, by outliers (OWL), or by one budget.

OWL (arXiv:2310.05175, section 3.2): a block with more outliers among its Wanda scores keeps more.
The allocator instead adds up what dropping costs every layer: w^2 / (H^-1)_jj for each weight (OBS,
as in SparseGPT, arXiv:2301.00774, eq. 4), times how much the loss of the model feels that layer.
Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from optpipe.allocate import Option, allocate
from optpipe.calibrate import Calib, Gram, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import inverse_factor
from optpipe.flow import observed
from optpipe.linear import Layers, weight_of
from optpipe.prune.mask import Prune, parse_pattern
from optpipe.sensitivity import sensitivities
from optpipe.stage import Progress

UNIFORM, OWL, ALLOCATOR = "uniform", "owl", "allocator"
ALLOCATIONS = (UNIFORM, OWL, ALLOCATOR)
OUTLIER = 5.0
"""An outlier is a score above so many times the mean of its block (M in the paper)."""
SPREAD = 0.08
"""Half of the range of sparsities (lambda)."""
STEP = 0.05
REACH = 5
"""The allocator may move a layer by so many steps in either direction."""
HIGHEST = 0.95
DAMP = 0.01
"""On the diagonal of H, in units of its mean."""


@dataclass(frozen=True, kw_only=True)
class Allocated(Prune):
    """A method that looks at data, and can so tell how much each layer stands."""

    allocation: str = UNIFORM
    """'uniform': every layer by ``sparsity``; 'owl', 'allocator': all of them together."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, got '{self.allocation}'")
        if self.allocation != UNIFORM and parse_pattern(self.pattern):
            raise ValueError(
                f"pattern {self.pattern} fixes the sparsity of every layer; allocation must be "
                f"'{UNIFORM}', got '{self.allocation}'"
            )
        low, high = 2 * SPREAD, 1 - 2 * SPREAD
        if self.allocation == OWL and not low <= self.sparsity <= high:
            raise ValueError(
                f"allocation=owl spreads sparsities and needs one from {low:g} to {high:g}, got "
                f"{self.sparsity}"
            )

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def at(self, sparsity: float) -> Prune:
        return replace(self, sparsity=sparsity, allocation=UNIFORM)

    def sparsities(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, float]:
        if self.allocation == OWL:
            return self._by_outliers(checkpoint, layers, chosen, progress)
        if self.allocation == ALLOCATOR:
            return self._by_budget(checkpoint, layers, chosen, progress)
        return super().sparsities(checkpoint, layers, chosen, progress)

    def _by_outliers(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, float]:
        def block(name: str) -> str:
            found = (b.name for b in checkpoint.decoder.blocks if name.startswith(f"{b.name}."))
            return next(found)

        seen = observed(checkpoint, self.calib.observe(checkpoint, chosen, Squares))
        shares: dict[str, float] = {}
        for owner, members in groupby(seen, key=lambda item: block(item[0])):
            progress(f"{owner} outliers", len(shares), len(checkpoint.decoder.blocks))
            scores = [(weight_of(m).abs() * s.norm_C).reshape(-1) for _, m, s in members]
            shares[owner] = outliers(torch.cat(scores))
        sizes = dict.fromkeys(shares, 0)
        for name in chosen:
            sizes[block(name)] += layers[name].rows * layers[name].cols
        spread = owl(shares, sizes, self.sparsity)
        return {name: spread[block(name)] for name in layers if name in chosen}

    def _by_budget(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, float]:
        felt = sensitivities(checkpoint, self.calib.ids(checkpoint), progress)
        levels, curves = [*self.levels()], dict[str, list[Option]]()
        for name, layer, statistic in observed(
            checkpoint, self.calib.observe(checkpoint, chosen, Gram)
        ):
            progress(f"{name} sparsity", len(curves), len(chosen))
            curves[name] = options(weight_of(layer), statistic.mean_CC, felt[name], levels)
        budget = sum(layers[name].rows * layers[name].cols for name in chosen)
        taken = allocate(curves, budget * (1 - self.sparsity))
        return {name: levels[place] for name, place in taken.items()}

    def levels(self) -> Iterator[float]:
        """Sparsities that a layer may get, that of the model among them."""
        for step in range(-REACH, REACH + 1):
            level = self.sparsity + step * STEP
            if step == 0 or 0 <= level <= HIGHEST:
                yield level


def outliers(score: Tensor) -> float:
    """The share of scores above OUTLIER times their mean."""
    return float((score > OUTLIER * score.mean()).double().mean())


def owl(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Sparsities of blocks that drop ``sparsity`` of all weights, lower where outliers are.

    The shares of outliers are stretched to a range of 2 * SPREAD and moved to the mean.
    """
    low, high = min(shares.values()), max(shares.values())
    width = 2 * SPREAD / (high - low) if high > low else 0.0
    kept = {name: (share - low) * width for name, share in shares.items()}
    mean = sum(kept[name] * sizes[name] for name in kept) / sum(sizes.values())
    return {name: sparsity - (value - mean) for name, value in kept.items()}


def options(weight_RC: Tensor, gram_CC: Tensor, felt: float, levels: list[float]) -> list[Option]:
    """Weights kept and loss of every level, if each weight could be dropped on its own."""
    factor_CC = inverse_factor(gram_CC, DAMP)
    diagonal_C = factor_CC.square().sum(0)  # of H^-1 = U^T U
    costs = (weight_RC.double().square() / diagonal_C).reshape(-1).sort().values
    lost = torch.nn.functional.pad(costs.cumsum(0), (1, 0))
    drops = [round(level * costs.numel()) for level in levels]
    return [Option(costs.numel() - drop, felt * float(lost[drop])) for drop in drops]
