"""Layers that round what they multiply with, too: scales of inputs from calibration data."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from optpipe.blockwise import largest_of
from optpipe.calibrate import Calib, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import LARGEST, STATIC_INPUTS, Form, Quantized
from optpipe.quant.grid import HALF, Quantize, fit


class Magnitudes:
    """How often each magnitude occurs among the inputs of a layer, in 64 bins an octave."""

    bins, least = 64, -40
    """Bins an octave; below 2 ** least, all magnitudes count alike."""

    def __init__(self, inputs: int) -> None:
        self.counts = torch.zeros(self.bins * 80, dtype=torch.float64)
        self.largest = 0.0

    def add(self, x_NC: Tensor) -> None:
        x = x_NC.float().abs().flatten()
        octaves = x.clamp(min=2.0**self.least).log2() - self.least
        index = (octaves * self.bins).long().clamp(max=len(self.counts) - 1)
        found = torch.bincount(index, minlength=len(self.counts))
        self.counts += found.double().cpu()
        self.largest = max(self.largest, float(x.max()))

    def percentile(self, percent: float) -> float:
        """The magnitude that so many percent do not exceed, at most 1.1 % too large."""
        if percent == 100 or self.largest == 0:
            return self.largest
        below = self.counts.cumsum(0) >= self.counts.sum() * percent / 100
        octave = (int(below.nonzero()[0]) + 1) / self.bins + self.least
        return min(self.largest, math.exp2(octave))


def input_scale(largest: float, top: float) -> Tensor:
    """``largest / top``, rounded up to 8 significant bits: exact in float16 and in bfloat16.

    The same codes then come out whatever type a runtime holds the scale in. Raises ValueError
    beyond float16.
    """
    scale = largest / top or 1.0
    if scale > HALF.max:
        raise ValueError(f"an input of {scale:.3g} steps is beyond a float16 scale")
    step = 2.0 ** max(math.frexp(scale)[1] - 8, -24)
    return torch.tensor(math.ceil(scale / step) * step, dtype=torch.float16)


@dataclass(frozen=True, kw_only=True)
class WeightsAndInputs(Quantize):
    """Weights to the nearest number; inputs likewise, whenever the layer runs."""

    kind: ClassVar[str]
    """What inputs are rounded to: 'int8', 'fp8' or 'nvfp4'."""
    ways: ClassVar[tuple[str, ...]] = ("tensor", "token")
    """What ``activations`` may be."""

    activations: str = "tensor"
    """'tensor': one scale for each layer, from calibration; 'token': one for each token, found
    when it is there, which ONNX Runtime and vLLM do and TensorRT does not."""
    percentile: float = 100.0
    """Percent of the magnitudes seen that the scale of a layer spans; what is beyond saturates."""
    calib: Calib = field(default_factory=Calib)
    """Only scales known beforehand look at data."""

    def __post_init__(self) -> None:
        if self.activations not in self.ways:
            raise ValueError(f"activations must be one of {self.ways}, got '{self.activations}'")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 0, at most 100, got {self.percentile}")
        if not self.calibrated and self.percentile != type(self).percentile:
            raise ValueError(
                f"percentile={self.percentile:g} has no effect with activations={self.activations},"
                " which needs no scale beforehand; leave it out"
            )

    @property
    def rounded(self) -> str | None:
        """How inputs are rounded, one of linear.INPUTS."""
        return None if self.activations == "none" else f"{self.kind}_{self.activations}"

    @property
    def calibrated(self) -> bool:
        """Whether inputs are rounded with a scale from calibration data."""
        return self.rounded in STATIC_INPUTS

    @property
    @abstractmethod
    def weight(self) -> dict[str, object]:
        """How weights are stored: fields of a form."""

    def form(self, name: str, form: Form) -> Form:
        return replace(form, inputs=self.rounded, **self.weight)  # type: ignore[arg-type]

    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Magnitudes | None
    ) -> Quantized:
        grid = fit(weight_RC, form, largest_of(layer))
        quantized = grid.module(grid.encode(weight_RC), layer)
        if statistic is not None:
            largest = statistic.percentile(self.percentile)
            quantized.input_scale = self.scale(largest)
        return quantized

    def scale(self, largest: float) -> Tensor:
        """That of inputs up to ``largest``."""
        return input_scale(largest, LARGEST[self.kind])

    def inputs(self, model: Checkpoint) -> str | None:
        return self.calib.inputs(model) if self.calibrated else None

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        if not self.calibrated:
            return None
        return self.calib.observe(checkpoint, wanted, Magnitudes)
