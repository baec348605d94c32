"""Mixed precision: bits for each layer so that all of them together lose the least output.

What a layer loses at each number of bits is the error of its output on calibration data, as a share
of that output, tr(D H D^T) / tr(W H W^T) with D = W' - W (the Hessian-weighted error of HAWQ-V2,
arXiv:1911.03852, with the Hessian of the layer's output). The budget is spent by the allocator.
Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.allocate import Curves, Option, allocate
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import select
from optpipe.bounds import ends
from optpipe.calibrate import Calib, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.flow import observed
from optpipe.linear import Form, Layers, Quantized, weight_of
from optpipe.quant.clip import HESSIAN, check_clip, fit_clip
from optpipe.quant.gptq import Gptq
from optpipe.quant.grid import BITS, Quantize, WeightOnly
from optpipe.stage import Progress

RTN, GPTQ = "rtn", "gptq"
METHODS = (RTN, GPTQ)


@dataclass(frozen=True, kw_only=True)
class Mixed(Quantize):
    """Weight-only. What it settles, every layer's bits, is in the stats of the artifact."""

    average_bits: float = 4.5
    """Bits of storage for each weight of the layers that are quantized, scales and zeros included:
    at most so many on average."""
    bits: list[int] = field(default_factory=lambda: [3, 4, 8])
    """What a layer may take, of 2, 3, 4 and 8."""
    method: str = GPTQ
    """'rtn' or 'gptq': how codes are chosen, and what losses are measured with."""
    group_size: int = 128
    """Inputs that share a scale: 16, 32, 64, 128 or 256; -1: all of an output channel."""
    symmetric: bool = True
    """Without zero points; TensorRT and most kernels take nothing else."""
    clip: str = HESSIAN
    """As of rtn and gptq."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if len(set(self.bits)) < 2 or not set(self.bits) <= set(BITS):
            raise ValueError(f"bits must be two or more of {BITS}, got {list(self.bits)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got '{self.method}'")
        check_clip(self.clip)
        self._grouped()

    def _grouped(self) -> WeightOnly:
        """What chooses the codes; the bits are those of each form."""
        return Gptq(group_size=self.group_size, symmetric=self.symmetric, clip=self.clip)

    def form(self, name: str, form: Form) -> Form:
        grouped = self._grouped().form(name, form)
        return replace(grouped, bits=max(self.bits), choices=tuple(sorted(self.bits)))

    def plan(self, layers: Layers) -> Layers:
        planned = super().plan(layers)
        chosen = select(layers, self.targets, self.head)
        ranks = {name: ends(name, layers[name]) for name in chosen}
        least = self._least([[self._fewest(n, f) for f in forms] for n, forms in ranks.items()])
        if self.average_bits < least:
            at = ", at the worst of the ranks that are still open"
            raise ValueError(
                f"average_bits={self.average_bits} is below {least:.4g}, what {min(self.bits)} "
                f"bits a weight and the scales of group_size={self.group_size} take"
                + at
                * any(len(forms) > 1 for forms in ranks.values())
            )
        return planned

    def _fewest(self, name: str, form: Form) -> Form:
        return replace(self.form(name, form), bits=min(self.bits))

    def _least(self, ends: list[list[Form]]) -> float:
        """Bits a weight where all take the fewest, at the ranks that make that most.

        The largest ratio of two sums, by the iteration of Dinkelbach (1967).
        """
        average, found = -1.0, 0.0
        while found > average:
            average = found
            worst = [max(f, key=lambda f: _stored(f) - average * f.rows * f.cols) for f in ends]
            found = sum(map(_stored, worst)) / sum(f.rows * f.cols for f in worst)
        return average

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Gram
    ) -> Quantized:
        if self.method == GPTQ:
            return self._grouped().quantize(layer, weight_RC, form, statistic)
        grid = fit_clip(weight_RC, form, self.clip, statistic.mean_CC.diagonal())
        return grid.module(grid.encode(weight_RC), layer)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Gram)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        planned = self.plan(model.layers(checkpoint))
        curves = dict(self.curves(checkpoint, planned, progress))
        weights = sum(planned[name].rows * planned[name].cols for name in curves)
        settled = self.settle(curves, self.average_bits * weights)
        for name, bits in settled.items():
            planned[name] = replace(planned[name], bits=bits, choices=None)
        stats = self.write(source, out, planned, progress)
        return {**stats, "layers_of_bits": dict(Counter(settled.values())), "layer_bits": settled}

    def settle(self, curves: Curves, budget: float) -> dict[str, int]:
        """The bits of every layer."""
        return {name: self.bits[place] for name, place in allocate(curves, budget).items()}

    def curves(
        self, checkpoint: Checkpoint, planned: Layers, progress: Progress
    ) -> Iterator[tuple[str, list[Option]]]:
        """What each number of bits costs, in bits, and loses, for every layer, on the model as it
        comes."""
        chosen = select(planned, self.targets, self.head)
        observation = self.observation(checkpoint, chosen)
        for done, (name, layer, gram) in enumerate(observed(checkpoint, observation)):
            progress(f"losses of {name}", done, len(chosen))
            forms = [replace(planned[name], bits=bits, choices=None) for bits in self.bits]
            yield name, [Option(_stored(form), self.loss(layer, form, gram)) for form in forms]

    def loss(self, layer: nn.Module, form: Form, gram: Gram) -> float:
        """Share of the output's power that is lost, or 0 if there is no output."""
        gram_CC, weight_RC = gram.mean_CC, weight_of(layer)
        made = self.quantize(layer, weight_RC, form, gram).dequantize()
        whole = _power(weight_RC, gram_CC)
        return _power(made - weight_RC, gram_CC) / whole if whole else 0.0


def _power(weight_RC: Tensor, gram_CC: Tensor) -> float:
    """Mean square of the outputs, tr(W H W^T)."""
    weight_RC = weight_RC.detach().to(gram_CC.dtype)
    return float(torch.sum((weight_RC @ gram_CC) * weight_RC))


def _stored(form: Form) -> float:
    """Bits of codes, scales and zeros; a mask was paid by who made it."""
    return replace(form, pattern=None).stored_bits()
