"""Which weights a pruning method keeps, given a score. Shapes: R outputs, C inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite, select
from optpipe.bounds import divisor
from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint
from optpipe.family import HEAD
from optpipe.linear import Form, Layers, dense, mask_of
from optpipe.stage import Progress, Stage

ROW, LAYER = "row", "layer"
DEFAULT_SPARSITY = 0.5


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """'2:4' -> (2, 4): keep 2 of every 4 inputs. 'row', 'layer' -> None: no such structure."""
    if pattern in (ROW, LAYER):
        return None
    parts = pattern.split(":")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"pattern must be 'row', 'layer' or N:M, such as '2:4', got '{pattern}'")
    keep, of = map(int, parts)
    if not 0 < keep < of:
        raise ValueError(f"pattern N:M keeps N of every M, 0 < N < M, got '{pattern}'")
    return keep, of


def keep_mask(score_RC: Tensor, sparsity: float, pattern: str) -> Tensor:
    """True for the weights of highest score: of the layer, of each row or of each M inputs.

    Exactly round(sparsity * weights) of a layer or a row go.
    """
    if (n_m := parse_pattern(pattern)) is not None:
        keep, of = n_m
        return all_but_lowest(score_RC.reshape(-1, of), of - keep).reshape(score_RC.shape)
    groups = score_RC.reshape(1, -1) if pattern == LAYER else score_RC
    drop = round(sparsity * groups.shape[1])
    return all_but_lowest(groups, drop).reshape(score_RC.shape)


def all_but_lowest(score: Tensor, drop: int) -> Tensor:
    """False for the ``drop`` lowest along the last dimension; on a tie for the earlier ones."""
    order = score.argsort(dim=-1, stable=True)[..., :drop]
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order, False)


def follows(mask_RC: Tensor, pattern: str) -> bool:
    """Whether a mask keeps what its pattern promises: N of every M, or as many in every row."""
    if pattern == LAYER:
        return True
    if (n_m := parse_pattern(pattern)) is None:
        return bool((mask_RC.sum(-1) == mask_RC[0].sum()).all())
    keep, of = n_m
    return bool((mask_RC.reshape(-1, of).sum(-1) == keep).all())


@dataclass(frozen=True, kw_only=True)
class Prune(Stage):
    """What pruning methods share; each adds its score."""

    sparsity: float = DEFAULT_SPARSITY
    """Share of weights to drop, 0 to 1; an N:M pattern fixes it instead."""
    pattern: str = ROW
    """'layer' drops freely, 'row' as many in each row; 'N:M' keeps N of every M inputs."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of layer names, such as '*.mlp.*'."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")
        n_m = parse_pattern(self.pattern)
        if n_m and self.sparsity not in (DEFAULT_SPARSITY, fixed := 1 - n_m[0] / n_m[1]):
            raise ValueError(
                f"pattern {self.pattern} means a sparsity of {fixed:g}, got {self.sparsity}; leave "
                "sparsity out"
            )

    def dropped(self, form: Form) -> int:
        """Weights that go from a layer."""
        if (n_m := parse_pattern(self.pattern)) is not None:
            return form.rows * form.cols // n_m[1] * (n_m[1] - n_m[0])
        if self.pattern == LAYER:
            return round(self.sparsity * (form.rows * form.cols))
        return form.rows * round(self.sparsity * form.cols)

    def plan(self, layers: Layers) -> Layers:
        planned, chosen = dict(layers), select(layers, self.targets)
        order.check("prune", layers, chosen)
        of = (parse_pattern(self.pattern) or (1, 1))[1]
        for name, form in layers.items():
            if name not in chosen:
                continue
            if divisor(name, form) % of:
                raise ValueError(
                    f"pattern {self.pattern} does not fit layer '{name}': {of} does not divide "
                    f"its {divisor(name, form)} inputs"
                )
            planned[name] = replace(form, pattern=self.pattern)
        return planned

    @abstractmethod
    def pruned(self, weight_RC: Tensor, statistic: Any) -> tuple[Tensor, Tensor]:
        """The new weight and which of its elements are kept, both (R, C).

        ``statistic`` as asked for in ``observation``.
        """

    def without_lowest(self, weight_RC: Tensor, score_RC: Tensor) -> tuple[Tensor, Tensor]:
        """``weight_RC`` without the weights of lowest score, and the mask."""
        mask = keep_mask(score_RC, self.sparsity, self.pattern)
        return weight_RC * mask, mask

    def at(self, sparsity: float) -> Prune:
        """This method for one layer."""
        return replace(self, sparsity=sparsity)

    def sparsities(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, float]:
        """The share to drop of every chosen layer."""
        return dict.fromkeys((name for name in layers if name in chosen), self.sparsity)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        """What the method needs to know of the inputs of the layers."""
        return None

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers = model.layers(checkpoint)
        chosen, planned = select(layers, self.targets), self.plan(layers)
        shares = self.sparsities(checkpoint, layers, chosen, progress)
        each = {name: self.at(share) for name, share in shares.items()}

        def change(name: str, layer: nn.Module, statistic: Any) -> nn.Module:
            if name not in chosen:
                return layer
            assert isinstance(layer, nn.Linear)
            weight, mask = each[name].pruned(layer.weight, statistic)
            return dense(weight, layer.bias, mask)

        observation = self.observation(checkpoint, chosen)
        rewrite(source, out, planned, change, progress, observation)
        gone = sum(stage.dropped(layers[name]) for name, stage in each.items())
        facts = observation.facts if observation else {}
        if len(set(shares.values())) > 1:
            facts = {"sparsities": shares, **facts}
        return {"sparsity": sparsity(gone, checkpoint), "pattern": self.pattern, **facts}


def sparsity(gone: int, checkpoint: Checkpoint) -> float:
    """The share of a model's weights without which it is once ``gone`` more than before go."""
    layers = model.layers(checkpoint)
    pruned = (name for name, form in layers.items() if form.pattern)
    gone += sum(_zeros(name, layers, checkpoint) for name in pruned)
    stored = [f for n, f in layers.items() if n != HEAD or not checkpoint.head_is_embedding]
    return gone / sum(form.rows * form.cols for form in stored)


def _zeros(name: str, layers: Layers, checkpoint: Checkpoint) -> int:
    """Weights that an earlier stage dropped from a layer."""
    mask = mask_of(model.layer(name, layers, checkpoint))
    return 0 if mask is None else int((~mask).sum())
