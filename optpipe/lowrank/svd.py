"""Truncated SVD of the weight (Eckart and Young 1936; the baseline of arXiv:2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optpipe.lowrank.factorize import Factorize, truncated


@dataclass(frozen=True, kw_only=True)
class Svd(Factorize):
    """Needs no data; the baseline of every other method."""

    def factors(self, weight_RC: Tensor, rank: int, statistic: Any) -> tuple[Tensor, Tensor]:
        return truncated(weight_RC, rank)
