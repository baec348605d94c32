"""Weights and activations in 8-bit integers, W8A8 (Jacob et al. 2017, arXiv:1712.05877).

Weights have a scale for each output channel and no zero point, activations one for each layer or
token: what TensorRT, ONNX Runtime and vLLM multiply as integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optpipe.linear import PER_CHANNEL
from optpipe.quant.inputs import WeightsAndInputs


@dataclass(frozen=True, kw_only=True)
class Int8(WeightsAndInputs):
    """Where activations have outliers, transform=smoothquant belongs before it."""

    kind: ClassVar[str] = "int8"

    percentile: float = 99.999
    """As of the base. Ten inputs in a million saturate: integers are evenly spaced, so that a scale
    that spans every outlier has no steps left for the rest."""

    @property
    def weight(self) -> dict[str, object]:
        return {"bits": 8, "number": "int", "group_size": PER_CHANNEL, "symmetric": True}
