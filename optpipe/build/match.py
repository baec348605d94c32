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
    dequantize: NodeProto
    bias: str | None

    @property
    def grid(self) -> tuple[str, bool, int, tuple[str, ...]]:
        """Equal for projections that can be emitted as one, side by side."""
        attributes = tuple(sorted(map(str, self.dequantize.attribute)))
        return self.x, self.bias is None, len(self.dequantize.input), attributes
