"""Floating-point codes in short blocks that share a scale, which is a short number itself.

    nvfp4   codes e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), 16 a block; a scale is e4m3, times
            one float32 for the tensor, which puts its largest magnitude at 6 * 448
            (NVIDIA et al. 2025, arXiv:2509.25149)
    mxfp8   codes e4m3, 32 a block; a scale is a power of two, e8m0, the smallest with which no
            number is beyond 448 (Rouhani et al. 2023, arXiv:2310.10537; NVIDIA rounds exponents
            up, the OCP standard down, where the largest numbers saturate: arXiv:2506.08027)

Rounding is to the nearest, ties to the even code; what is beyond the largest number becomes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = {"nvfp4": 16, "mxfp8": 32}
"""Numbers that share a scale."""
BITS = {"nvfp4": 4, "mxfp8": 8}
"""Of a code."""
FP8 = torch.float8_e4m3fn
SCALE = {"nvfp4": FP8, "mxfp8": torch.float8_e8m0fnu}
"""Type of a scale."""
FP4_TOP, FP8_TOP = 6.0, 448.0
TOP = {"nvfp4": FP4_TOP, "mxfp8": FP8_TOP}
"""Largest number of a code."""
LEAST_FP8 = 2.0**-9
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_fp8(x: Tensor) -> Tensor:
    """The nearest float8_e4m3fn, ties to even; beyond 448 it is 448, where torch's cast has NaN."""
    return x.clamp(-FP8_TOP, FP8_TOP).to(FP8)


def round_fp4(x: Tensor) -> Tensor:
    """The nearest number of e2m1, in the type of x."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    return (magnitude / step).round().mul_(step).clamp_(max=FP4_TOP).copysign_(x)


def encode(x: Tensor, number: str) -> Tensor:
    """Codes, uint8, of numbers in units of their scales."""
    if number == "mxfp8":
        return to_fp8(x).view(torch.uint8)
    halves = (round_fp4(x) * 2).abs()  # 0, 1, 2, 3, 4, 6, 8, 12
    codes = halves.clamp(max=4)
    for bound in (6, 8, 12):
        codes += halves >= bound
    return (codes + 8 * (x < 0)).to(torch.uint8)


def numbers(codes: Tensor, number: str) -> Tensor:
    """What codes say before they are scaled, float32."""
    if number == "mxfp8":
        return codes.view(FP8).float()
    # no table: it would come from the host, which nothing in a CUDA graph may
    exponent, fraction = (codes >> 1) & 3, codes & 1
    halves = torch.where(exponent == 0, fraction, (2 + fraction) << (exponent.clamp(min=1) - 1))
    return (halves * 0.5).copysign_(7.5 - codes.float())


def over(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded: by a number of the host, a GPU multiplies with 1 / number."""
    return x / x.new_full((), number)


def global_scale(largest: Tensor) -> Tensor:
    """The float32 of a tensor in nvfp4, (), from its largest magnitude."""
    scale = over(largest.float(), FP4_TOP * FP8_TOP)
    return torch.where(scale > 0, scale, 1.0)


def block_scales(largest: Tensor, number: str, whole: Tensor | None) -> Tensor:
    """The scale of each block from its largest magnitude; ``whole`` is the global one of nvfp4.

    A block of zeros has scale one.
    """
    if number == "mxfp8":
        fraction, exponent = torch.frexp(over(largest.float(), FP8_TOP))
        exponent = (exponent - (fraction == 0.5).int()).clamp(-127, 127)
        exponent = torch.where(largest > 0, exponent, 0)
        return (exponent + 127).to(torch.uint8).view(SCALE[number])
    assert whole is not None
    scales = largest.float() / (FP4_TOP * whole.to(largest.device))
    scales = torch.where(scales > 0, scales, 1.0)
    return scales.clamp(LEAST_FP8, FP8_TOP).to(FP8)


def steps(scales: Tensor, whole: Tensor | None) -> Tensor:
    """What codes are multiplied with, float32."""
    return scales.float() if whole is None else scales.float() * whole.float()


def round_blocks(x: Tensor, number: str, whole: Tensor | None) -> Tensor:
    """x (..., C) as its codes and scales say it, with scales found as x comes.

    ``whole`` is the global scale of nvfp4, known beforehand.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK[number]))
    step = steps(block_scales(blocks.abs().amax(-1, keepdim=True), number, whole), whole)
    scaled = blocks / step
    rounded = round_fp4(scaled) if number == "nvfp4" else to_fp8(scaled).float()
    return (rounded * step).flatten(-2).to(x.dtype)
