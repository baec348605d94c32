"""W4A8: int4 weights in groups, inputs in fp8, as TensorRT-LLM multiplies them under the name
W4A8_AWQ (4-bit weights with 8-bit inputs: QServe, arXiv:2405.04532). Codes are GPTQ's, without
the scales that AWQ searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optpipe.linear import Form
from optpipe.quant.fourbits import FourBits
from optpipe.quant.grid import GROUP_SIZES, check_groups


@dataclass(frozen=True, kw_only=True)
class W4a8(FourBits):
    """A GPU reads a quarter of the bytes and multiplies in fp8, from compute capability 8.9 on."""

    kind: ClassVar[str] = "fp8"

    group_size: int = 128
    """Inputs that share a scale: 16, 32, 64, 128 or 256; -1: all of an output channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")

    @property
    def weight(self) -> dict[str, object]:
        return {"bits": 4, "number": "int", "group_size": self.group_size, "symmetric": True}

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, self.group_size)
        return super().form(name, form)
