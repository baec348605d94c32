"""Which share of each layer goes: the same everywhere, or less where outliers are.

OWL (arXiv:2310.05175, section 3.2): a block with more outliers among its Wanda scores keeps more.
The allocator: a block keeps more where the loss of the whole model is lower for it (probe.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from optpipe.calibrate import Calib, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.flow import observed
from optpipe.linear import Layers, weight_of
from optpipe.prune import probe
from optpipe.prune.mask import Prune, parse_pattern
from optpipe.stage import Progress

UNIFORM, OWL, ALLOCATOR = "uniform", "owl", "allocator"
ALLOCATIONS = (UNIFORM, OWL, ALLOCATOR)
OUTLIER = 5.0
"""An outlier is a score above so many times the mean of its block (M in the paper)."""
SPREAD = 0.08
"""Half of the range of sparsities (lambda)."""
STEP = 0.04
"""Between the sparsities that the allocator chooses from."""


@dataclass(frozen=True, kw_only=True)
class Allocated(Prune):
    """A method that looks at data, and can so tell how much each layer stands."""

    allocation: str = UNIFORM
    """'uniform': every layer by ``sparsity``; 'owl', 'allocator': all of them together, blocks by
    about 0.08 more or less. The allocator tries every block at five sparsities."""
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
        if self.allocation != UNIFORM and not low <= self.sparsity <= high:
            raise ValueError(
                f"allocation={self.allocation} spreads sparsities and needs one from {low:g} to "
                f"{high:g}, got {self.sparsity}"
            )

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def at(self, sparsity: float) -> Prune:
        return replace(self, sparsity=sparsity, allocation=UNIFORM)

    def sparsities(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, float]:
        if self.allocation == UNIFORM:
            return super().sparsities(checkpoint, layers, chosen, progress)
        owners = {name: b.name for b in checkpoint.decoder.blocks for name in chosen
                  if name.startswith(f"{b.name}.")}  # fmt: skip
        sizes = dict.fromkeys(owners.values(), 0)
        for name, owner in owners.items():
            sizes[owner] += layers[name].rows * layers[name].cols
        if self.allocation == OWL:
            spread = owl(self._outliers(checkpoint, owners, progress), sizes, self.sparsity)
        else:
            others = [self.sparsity + k * STEP for k in (-2, -1, 1, 2)]
            found = probe.losses(self, checkpoint, chosen, others, progress)
            spread = probe.spread(found, sizes, self.sparsity)
        return {name: spread[owners[name]] for name in layers if name in chosen}

    def _outliers(
        self, checkpoint: Checkpoint, owners: Mapping[str, str], progress: Progress
    ) -> dict[str, float]:
        """The share of outliers of every block."""
        seen = observed(checkpoint, self.calib.observe(checkpoint, frozenset(owners), Squares))
        shares: dict[str, float] = {}
        for owner, members in groupby(seen, key=lambda item: owners[item[0]]):
            progress(f"{owner} outliers", len(shares), len(checkpoint.decoder.blocks))
            scores = [(weight_of(m).abs() * s.norm_C).reshape(-1) for _, m, s in members]
            shares[owner] = outliers(torch.cat(scores))
        return shares


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
