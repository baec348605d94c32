"""QERA: a low-rank correction of a quantized or pruned weight, in the metric of its inputs
(arXiv:2410.06040, theorem 1; the same as EoRA, arXiv:2410.21271).

y = Q x + left (right x), where left @ right is the truncated SVD of (W - Q) H^(1/2), brought back
by H^(-1/2): of all corrections of the rank it loses the least output. W is the weight of the model
that the run started from, H that of the compressed model's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite, select
from optpipe.calibrate import Calib, Gram
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.leastsquares import loss
from optpipe.linear import Corrected, Form, Layers, LowRank, Quantized, dense, weight_of
from optpipe.lowrank.svdllm import whitened
from optpipe.stage import Progress, Stage


@dataclass(frozen=True, kw_only=True)
class Qera(Stage):
    """Comes last: whatever changes a weight later does not know of the correction."""

    compares: ClassVar[bool] = True

    rank: int = 16
    """Of the correction; it costs rank * (inputs + outputs) floats a layer."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of layer names, such as '*.down_proj'."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def plan(self, layers: Layers) -> Layers:
        chosen = select(layers, self.targets)
        order.check("correct", layers, chosen)
        planned: Layers = {}
        for name, form in layers.items():
            planned[name] = form
            if name in chosen:
                self._check(name, form)
                planned[f"{name}.residual.right"] = Form(rows=self.rank, cols=form.cols)
                planned[f"{name}.residual.left"] = Form(rows=form.rows, cols=self.rank)
        return planned

    def _check(self, name: str, form: Form) -> None:
        if form.bits is None and form.pattern is None:
            raise ValueError(f"layer '{name}' is neither quantized nor pruned: nothing to correct")
        if self.rank * (form.rows + form.cols) >= form.rows * form.cols:
            raise ValueError(
                f"rank={self.rank} takes no fewer weights than layer '{name}' itself "
                f"({form.rows} x {form.cols})"
            )

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        return self.run_with(source, source, out, progress)

    def run_with(
        self, source: Artifact, baseline: Artifact, out: Path, progress: Progress
    ) -> Stats:
        checkpoint, original = Checkpoint(source.path), Checkpoint(baseline.path)
        layers = model.layers(checkpoint)
        planned, chosen = self.plan(layers), select(layers, self.targets)
        check_comparable(checkpoint, original)
        kept: dict[str, float] = {}

        def change(name: str, layer: nn.Module, statistic: Any) -> nn.Module:
            if name not in chosen:
                return layer
            wanted = weight_of(model.layer(name, original.forms or {}, original))
            corrected, kept[name] = self.corrected(name, layer, wanted, statistic)
            return corrected

        observation = self.calib.observe(checkpoint, chosen, Gram)
        rewrite(source, out, planned, change, progress, observation)
        return {"rank": self.rank, "loss_kept": sum(kept.values()) / len(kept), **observation.facts}

    def corrected(
        self, name: str, layer: nn.Module, wanted_RC: Tensor, statistic: Gram
    ) -> tuple[Corrected, float]:
        """The layer with its correction, and the share of its loss that is left."""
        assert isinstance(layer, nn.Linear | Quantized)
        gram_CC, weight_RC = statistic.mean_CC, weight_of(layer).double()
        missing_RC = wanted_RC.to(weight_RC) - weight_RC
        before = loss(missing_RC, gram_CC)
        if before > loss(wanted_RC, gram_CC):
            raise InputError(
                f"layer '{name}' is further from its original weight than zero is: a stage before "
                "changed what it means, such as a rotation, and a residual cannot follow that"
            )
        left_RK, right_KC = whitened(missing_RC, gram_CC, self.rank)
        after = loss(missing_RC - left_RK @ right_KC, gram_CC)
        factors = LowRank(dense(right_KC.float(), None), dense(left_RK.float(), None))
        return Corrected(layer, factors), after / before if before else 0.0


def check_comparable(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Raise InputError if weights no longer mean what they did: folded, rotated or cut."""
    for name, shape in model.parameter_shapes(original).items():
        stored = checkpoint.get(name)
        if len(shape) == 1 and stored is not None and not name.endswith(".bias"):
            before = original.get(name)
            if before is None or not torch.equal(before, stored):
                raise InputError(
                    f"'{name}' is not that of the original model: a stage before folded something "
                    "into it or cut the model, so that the original weights are no reference for a "
                    "residual"
                )
