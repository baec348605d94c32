"""What a lowering rule finds: canonical nodes that one new node can stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Match:
    """Nodes taken together: what they need, what they make, and what writes their stand-in."""

    inputs: list[str]
    outputs: list[str]
    emit: Callable[[], object]


@dataclass(frozen=True)
class Product:
    """x @ weight (+ bias) of one quantized projection."""

    x: str
    """Its inputs as the canonical graph multiplies them."""
    dequantize: NodeProto
    dtype: int
    """Element type of the codes."""
    bias: str | None
    rounded: NodeProto | None
    """The QuantizeLinear behind ``x``, if it is rounded."""

    @property
    def grid(self) -> tuple[object, ...]:
        """Equal for projections that can be emitted as one, side by side."""
        attributes = tuple(sorted(map(str, self.dequantize.attribute)))
        zeros = len(self.dequantize.input) > 2
        return self.x, self.dtype, self.bias is None, zeros, attributes
