"""Weights and activations in 8-bit floating point, e4m3 (Micikevicius et al. 2022,
arXiv:2209.05433).

A scale puts the largest magnitude at 448, the largest number of e4m3. One for a layer is common to
layers that runtimes multiply as one (family.joined).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optpipe.linear import PER_CHANNEL, PER_TENSOR
from optpipe.quant.inputs import WeightsAndInputs

WEIGHTS = {"tensor": PER_TENSOR, "channel": PER_CHANNEL}


@dataclass(frozen=True, kw_only=True)
class Fp8(WeightsAndInputs):
    """GPUs from compute capability 8.9 on multiply these natively."""

    kind: ClassVar[str] = "fp8"

    weights: str = "tensor"
    """One scale for each layer ('tensor', as TensorRT-LLM has it) or output ('channel')."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {(*WEIGHTS,)}, got '{self.weights}'")

    @property
    def weight(self) -> dict[str, object]:
        size = WEIGHTS[self.weights]
        return {"bits": 8, "number": "fp8", "group_size": size, "symmetric": True}
