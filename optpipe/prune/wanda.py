"""Wanda: drop weights by |weight| x norm of their input (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from optpipe.calibrate import Calib, Observation, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.prune.mask import Prune


@dataclass(frozen=True, kw_only=True)
class Wanda(Prune):
    """Compares the weights of one output with each other; kept weights do not change."""

    calib: Calib = field(default_factory=Calib)

    def pruned(self, weight_RC: Tensor, statistic: Squares) -> tuple[Tensor, Tensor]:
        return self.without_lowest(weight_RC, self.score(weight_RC, statistic))

    def score(self, weight_RC: Tensor, statistic: Squares) -> Tensor:
        """Eq. 1 of the paper."""
        return weight_RC.abs() * statistic.norm_C.to(weight_RC.dtype)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Squares)
