"""Which weights a pruning method keeps, given a score. Shapes: R outputs, C inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import Observation, rewrite, select
from optpipe.checkpoint import Checkpoint
from optpipe.family import HEAD
from optpipe.linear import Layers, dense
from optpipe.stage import Progress, Stage

ROW = "row"


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """'2:4' -> (2, 4): keep 2 of every 4 inputs. 'row' -> None: no structure within a row."""
    if pattern == ROW:
        return None
    parts = pattern.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"pattern must be 'row' or N:M, such as '2:4', got '{pattern}'")
    keep, of = map(int, parts)
    if not 0 < keep < of:
        raise ValueError(f"pattern N:M keeps N of every M, 0 < N < M, got '{pattern}'")
    return keep, of


def keep_mask(score_RC: Tensor, sparsity: float, pattern: str) -> Tensor:
    """True for the weights of highest score: of each row, or of each group of M inputs.

    Exactly round(sparsity * C) weights of a row go; on a tie the earlier ones do.
    """
    rows, cols = score_RC.shape
    if (n_m := parse_pattern(pattern)) is None:
        groups, drop = score_RC.unsqueeze(1), round(sparsity * cols)
    else:
        keep, of = n_m
        groups, drop = score_RC.reshape(rows, cols // of, of), of - keep
    order = groups.argsort(dim=-1, stable=True)[..., :drop]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order, False).reshape(rows, cols)


def follows(mask_RC: Tensor, pattern: str) -> bool:
    """Whether a mask keeps what its pattern promises: N of every M, or as many in every row."""
    if (n_m := parse_pattern(pattern)) is None:
        return bool((mask_RC.sum(-1) == mask_RC[0].sum()).all())
    keep, of = n_m
    return bool((mask_RC.reshape(-1, of).sum(-1) == keep).all())


@dataclass(frozen=True, kw_only=True)
class Prune(Stage):
    """What pruning methods share; each adds its score."""

    sparsity: float = 0.5
    """Share of weights to drop, 0 to 1; an N:M pattern fixes it instead."""
    pattern: str = ROW
    """'row' drops freely within each row; 'N:M' keeps N of every M inputs."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of layer names, such as '*.mlp.*'."""

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")

    def dropped(self, cols: int) -> int:
        """Weights that go from a row of ``cols``."""
        if (n_m := parse_pattern(self.pattern)) is None:
            return round(self.sparsity * cols)
        return cols * (n_m[1] - n_m[0]) // n_m[1]

    def plan(self, layers: Layers) -> Layers:
        planned, chosen = dict(layers), select(layers, self.targets)
        of = (parse_pattern(self.pattern) or (1, 1))[1]
        for name, form in layers.items():
            if name not in chosen:
                continue
            if form.bits is not None:
                raise ValueError(f"layer '{name}' is quantized already; prune before that")
            if form.pattern is not None:
                raise ValueError(f"layer '{name}' is pruned already ({form.pattern})")
            if form.cols % of:
                raise ValueError(
                    f"pattern {self.pattern} does not fit layer '{name}': {of} does not divide "
                    f"its {form.cols} inputs"
                )
            planned[name] = replace(form, pattern=self.pattern)
        return planned

    @abstractmethod
    def score(self, weight_RC: Tensor, statistic: Any) -> Tensor:
        """How much each weight matters, (R, C); ``statistic`` as asked for in ``observation``."""

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        """What the score needs to know of the inputs of the layers."""
        return None

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers = model.layers(checkpoint)
        chosen = select(layers, self.targets)

        def change(name: str, layer: nn.Module, statistic: Any) -> nn.Module:
            if name not in chosen:
                return layer
            assert isinstance(layer, nn.Linear)
            mask = keep_mask(self.score(layer.weight, statistic), self.sparsity, self.pattern)
            return dense(layer.weight * mask, layer.bias, mask)

        observation = self.observation(checkpoint, chosen)
        rewrite(source, out, self.plan(layers), change, progress, observation)
        gone = sum(layers[name].rows * self.dropped(layers[name].cols) for name in chosen)
        stored = [f for n, f in layers.items() if n != HEAD or not checkpoint.head_is_embedding]
        facts = observation.facts if observation else {}
        return {"sparsity": gone / sum(f.rows * f.cols for f in stored), **facts}
