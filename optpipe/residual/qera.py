"""QERA: a low-rank correction of a quantized or pruned weight, in the metric of its inputs
(arXiv:2410.06040, theorem 1; the same as EoRA, arXiv:2410.21271).

y = Q x + left (right x), where left @ right is the truncated SVD of (W - Q) H^(1/2), brought back
by H^(-1/2): of all corrections of the rank it loses the least output. H is that of the compressed
model's inputs. W is the weight before anything was lost of it: that of the model the run started
from or, where a stage folded, trained or cut weights, what this made of them. So the residual of a
pruned layer, quantized or not, also gives back what the mask took, as EoRA's does; the main branch
keeps the mask, and with it the kernel that it is for. Two factors are corrected as one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite, select
from optpipe.calibrate import Calib, Gram
from optpipe.checkpoint import Checkpoint
from optpipe.family import Block
from optpipe.leastsquares import loss
from optpipe.linear import Corrected, Form, Layers, LowRank, dense, weight_of
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
        chosen = self.chosen(layers)
        order.check("correct", layers, {name for parts in chosen.values() for name in parts})
        planned: Layers = {}
        for name, form in layers.items():
            planned[name] = form
            layer = order.layer_of(name)
            if layer in chosen and not name.endswith(".right"):  # the left factor comes last
                right = layers[chosen[layer][0]]
                self._check(layer, [layers[part] for part in chosen[layer]])
                planned[f"{layer}.residual.right"] = Form(rows=self.rank, cols=right.cols)
                planned[f"{layer}.residual.left"] = Form(rows=form.rows, cols=self.rank)
        return planned

    def chosen(self, layers: Layers) -> dict[str, list[str]]:
        """The parts of every layer that is corrected: itself, or its right and its left factor."""
        parts: dict[str, list[str]] = {}
        for name in layers:
            parts.setdefault(order.layer_of(name), []).append(name)
        whole = {layer: layers[names[0]] for layer, names in parts.items()}
        return {layer: parts[layer] for layer in select(whole, self.targets)}

    def _check(self, layer: str, parts: list[Form]) -> None:
        if all(form.bits is None and form.pattern is None for form in parts):
            raise ValueError(f"layer '{layer}' is neither quantized nor pruned: nothing to correct")
        rows, cols = parts[-1].rows, parts[0].cols
        if self.rank * (rows + cols) >= sum(form.rows * form.cols for form in parts):
            raise ValueError(
                f"rank={self.rank} takes no fewer weights than layer '{layer}' itself "
                f"({rows} x {' x '.join(str(form.cols) for form in parts[::-1])})"
            )

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        return self.run_with(source, source, out, progress)

    def run_with(
        self, source: Artifact, original: Artifact, out: Path, progress: Progress
    ) -> Stats:
        checkpoint, before = Checkpoint(source.path), Checkpoint(original.path)
        layers = model.layers(checkpoint)
        planned, chosen = self.plan(layers), self.chosen(layers)
        kept: dict[str, float] = {}

        def react(lm: PreTrainedModel, block: Block, seen: dict[str, Any]) -> None:
            for name in filter(chosen.__contains__, block.linears):
                wanted = weight_of(model.layer(name, before.forms or {}, before))
                layer, statistic = lm.get_submodule(name), seen[chosen[name][0]]
                corrected, kept[name] = self.corrected(layer, wanted, statistic)
                lm.set_submodule(name, corrected)

        observed = frozenset(parts[0] for parts in chosen.values())
        observation = replace(self.calib.observe(checkpoint, observed, Gram), react=react)
        rewrite(source, out, planned, lambda _, layer, __: layer, progress, observation)
        return {"rank": self.rank, "loss_kept": sum(kept.values()) / len(kept), **observation.facts}

    def corrected(
        self, layer: nn.Module, wanted_RC: Tensor, statistic: Gram
    ) -> tuple[Corrected, float]:
        """The layer with its correction, and the share of its loss that is left."""
        gram_CC, weight_RC = statistic.mean_CC, weight_of(layer).double()
        missing_RC = wanted_RC.to(weight_RC) - weight_RC
        left_RK, right_KC = whitened(missing_RC, gram_CC, self.rank)
        before = loss(missing_RC, gram_CC)
        after = loss(missing_RC - left_RK @ right_KC, gram_CC)
        factors = LowRank(dense(right_KC.float(), None), dense(left_RK.float(), None))
        return Corrected(layer, factors), after / before if before else 0.0
