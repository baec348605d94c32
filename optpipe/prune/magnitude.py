"""Magnitude pruning: drop the smallest weights (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optpipe.prune.mask import Prune


@dataclass(frozen=True, kw_only=True)
class Magnitude(Prune):
    """Needs no data; the baseline of every other method."""

    def pruned(self, weight_RC: Tensor, statistic: Any) -> tuple[Tensor, Tensor]:
        return self.without_lowest(weight_RC, weight_RC.abs())
