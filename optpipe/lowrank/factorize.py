"""What low-rank methods share: which layers, which rank, and two factors in place of a weight.

Shapes: R outputs, C inputs, K rank.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite, select
from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, Layers, LowRank, dense
from optpipe.stage import Progress, Stage


@dataclass(frozen=True, kw_only=True)
class Factorize(Stage):
    """W (R, C) becomes left (R, K) @ right (K, C)."""

    keep: float = 0.8
    """Share of a layer's parameters that its two factors may take, above 0 and below 1."""
    rank_multiple: int = 32
    """Ranks are rounded down to a multiple of this: a later quantization wants whole groups along
    the rank, and matrix units whole tiles."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of layer names, such as '*.o_proj'."""

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be above 0 and below 1, got {self.keep}")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {self.rank_multiple}")

    def rank(self, form: Form) -> int:
        """floor(keep * R * C / (R + C)), rounded down to a multiple of ``rank_multiple``."""
        largest = self._largest(form)
        return largest - largest % self.rank_multiple

    def _largest(self, form: Form) -> int:
        return int(self.keep * form.rows * form.cols / (form.rows + form.cols))

    def most(self, name: str, form: Form) -> int:
        """The largest rank that is planned for; 0 if the layer stays whole. Raises ValueError."""
        if (rank := self.rank(form)) >= 1:
            return rank
        if (largest := self._largest(form)) >= 1:
            advice = f"lower rank_multiple to at most {largest} or leave it out of targets"
        else:
            advice = "leave it out of targets"
        raise ValueError(
            f"keep={self.keep} leaves layer '{name}' ({form.rows} x {form.cols}) no rank that "
            f"is a multiple of {self.rank_multiple}; {advice}"
        )

    @property
    def bound(self) -> int | None:
        """Form.bound of the factors."""
        return None

    def plan(self, layers: Layers) -> Layers:
        chosen = select(layers, self.targets)
        order.check("factorize", layers, chosen)
        planned: Layers = {}
        for name, form in layers.items():
            rank = self.most(name, form) if name in chosen else 0
            if not rank:
                planned[name] = form
                continue
            planned[f"{name}.right"] = Form(rows=rank, cols=form.cols, bound=self.bound)
            planned[f"{name}.left"] = Form(rows=form.rows, cols=rank, bound=self.bound)
        return planned

    @abstractmethod
    def factors(self, weight_RC: Tensor, rank: int, statistic: Any) -> tuple[Tensor, Tensor]:
        """left (R, K) and right (K, C); ``statistic`` as asked for in ``observation``."""

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        """What the factors need to know of the inputs of the layers."""
        return None

    def ranks(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, int]:
        """The rank of every chosen layer that is factorized; one that is left out stays whole."""
        return {name: self.rank(form) for name, form in layers.items() if name in chosen}

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers = model.layers(checkpoint)
        self.plan(layers)
        chosen = select(layers, self.targets)
        ranks = self.ranks(checkpoint, layers, chosen, progress)

        def change(name: str, layer: nn.Module, statistic: Any) -> nn.Module:
            if name not in ranks:
                return layer
            assert isinstance(layer, nn.Linear)
            left, right = self.factors(layer.weight.double(), ranks[name], statistic)
            return LowRank(dense(right.float(), None), dense(left.float(), layer.bias))

        observation = self.observation(checkpoint, frozenset(ranks))
        rewrite(source, out, _settled(layers, ranks), change, progress, observation)
        facts = observation.facts if observation else {}
        return {"ranks": ranks, **facts}


def _settled(layers: Layers, ranks: dict[str, int]) -> Layers:
    made: Layers = {}
    for name, form in layers.items():
        if name in ranks:
            made[f"{name}.right"] = Form(rows=ranks[name], cols=form.cols)
            made[f"{name}.left"] = Form(rows=form.rows, cols=ranks[name])
        else:
            made[name] = form
    return made


def truncated(weight_RC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors in the Frobenius norm, singular values split evenly between them.

    Even factors are of one size: half precision and integer grids suit both.
    """
    u, s, v = torch.linalg.svd(weight_RC, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
