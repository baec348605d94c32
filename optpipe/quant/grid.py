"""The grids of weights, integer or floating point, and what quantization methods share.

Shapes: R outputs, C inputs, G groups of inputs that share a scale. weight = (code - zero) * scale.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import microscaling, model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import one_scale, rewrite, select
from optpipe.bounds import divisor
from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import (
    BLOCKS,
    LARGEST,
    NUMBERS,
    PER_CHANNEL,
    PER_TENSOR,
    Form,
    Layers,
    Quantized,
    mask_of,
)
from optpipe.microscaling import FP8, to_fp8
from optpipe.stage import Progress, Stage

BITS = (2, 3, 4, 8)
GROUP_SIZES = (PER_CHANNEL, 16, 32, 64, 128, 256)
FIXED: dict[str, dict[str, int | bool]] = {
    "fp8": {"bits": 8, "symmetric": True},
    **{
        number: {"bits": microscaling.BITS[number], "symmetric": True, "group_size": block}
        for number, block in microscaling.BLOCK.items()
    },
}
"""What a number leaves no choice of."""
HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of one weight; values between them are what its codes can say."""

    form: Form
    scales_RG: Tensor
    """As stored: rounded before any code is chosen, so that what is stored is what was meant.
    (1, 1) for one scale a layer."""
    zeros_RG: Tensor
    """uint8; 2 ** (bits - 1) throughout if symmetric, 0 for floats. Shaped as the scales."""
    global_scale: Tensor | None = None
    """float32, (); only in nvfp4."""

    @cached_property
    def steps_RG(self) -> Tensor:
        """What numbers are multiplied with, float32."""
        return microscaling.steps(self.scales_RG, self.global_scale)

    def encode(self, weight_RC: Tensor) -> Tensor:
        """The nearest codes, uint8 (R, C)."""
        scales, zeros = self._spread()
        return self._codes(weight_RC / scales, zeros)

    def decode(self, codes_RC: Tensor) -> Tensor:
        """The weights that codes stand for, float32 (R, C)."""
        scales, zeros = self._spread()
        return (self._numbers(codes_RC) - zeros) * scales

    def zero(self, column: int) -> Tensor:
        """The codes that stand for zero in one column, uint8 (R)."""
        return self.zeros_RG[:, self._group(column)]

    def column(self, weight_R: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Nearest codes of one column, uint8 (R), and the weights they stand for, (R)."""
        group = self._group(column)
        scale = self.steps_RG[:, group].to(weight_R.dtype)
        zero = self.zeros_RG[:, group].to(weight_R.dtype)
        codes = self._codes(weight_R / scale, zero)
        return codes, (self._numbers(codes).to(weight_R.dtype) - zero) * scale

    def module(self, codes_RC: Tensor, layer: nn.Module) -> Quantized:
        """The quantized layer, with the bias and the mask of the one it replaces."""
        quantized = Quantized(self.form, codes_RC, self.scales_RG)
        quantized.zeros = None if self.form.symmetric else self.zeros_RG
        quantized.mask, quantized.global_scale = mask_of(layer), self.global_scale
        bias = layer.bias
        quantized.bias = bias if isinstance(bias, Tensor) else None
        return quantized

    @property
    def top(self) -> int:
        assert self.form.bits is not None
        return int(2**self.form.bits - 1)

    def _codes(self, steps: Tensor, zeros: Tensor) -> Tensor:
        """The codes, uint8, nearest to so many scales."""
        if self.form.number == "fp8":
            return to_fp8(steps).view(torch.uint8)
        if self.form.number in BLOCKS:
            return microscaling.encode(steps, self.form.number)
        return (steps.round() + zeros).clamp(0, self.top).to(torch.uint8)

    def _numbers(self, codes: Tensor) -> Tensor:
        if self.form.number in BLOCKS:
            return microscaling.numbers(codes, self.form.number)
        return (codes.view(FP8) if self.form.number == "fp8" else codes).float()

    def _group(self, column: int) -> int:
        return 0 if self.form.groups == 1 else column // self.form.group_size

    def _spread(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every weight, (R, C)."""
        width = self.form.cols // self.form.groups
        wide = (t.float().repeat_interleave(width, dim=1) for t in (self.steps_RG, self.zeros_RG))
        scales, zeros = wide
        return scales, zeros


def fit(weight_RC: Tensor, form: Form, largest: Tensor | None = None) -> Grid:
    """The grid that spans each group from its smallest to its largest weight, and zero.

    ``largest`` is the magnitude that a scale for the whole layer spans, by default its own.
    """
    assert form.bits is not None
    if form.number in BLOCKS:
        return _fit_blocks(weight_RC, form, largest)
    shape = (1, 1) if form.group_size == PER_TENSOR else (form.rows, form.groups)
    groups = weight_RC.float().reshape(*shape, -1)
    top = 2**form.bits - 1
    if form.number == "fp8":
        reach = groups.abs().amax(-1)
        if one_scale(form) and largest is not None:
            reach = largest.reshape(shape)
        scales = _half(reach / LARGEST["fp8"])
        return Grid(form, scales, torch.zeros_like(scales).to(torch.uint8))
    if form.symmetric:
        scales = _half(groups.abs().amax(-1) / (top // 2))
        return Grid(form, scales, torch.full_like(scales, top // 2 + 1).to(torch.uint8))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = _half((high - low) / top)
    zeros = (-low / scales.float()).round().clamp(0, top)
    return Grid(form, scales, zeros.to(torch.uint8))


def _fit_blocks(weight_RC: Tensor, form: Form, largest: Tensor | None) -> Grid:
    largest_RG = weight_RC.float().reshape(form.rows, form.groups, -1).abs().amax(-1)
    whole = None
    if form.number == "nvfp4":
        whole = microscaling.global_scale(largest_RG.amax() if largest is None else largest)
    scales_RG = microscaling.block_scales(largest_RG, form.number, whole)
    zeros_RG = torch.zeros(scales_RG.shape, dtype=torch.uint8, device=scales_RG.device)
    return Grid(form, scales_RG, zeros_RG, whole)


def check_groups(name: str, form: Form, size: int, fixed: bool = False) -> None:
    """Raise ValueError unless groups of ``size`` divide the inputs of a layer."""
    inputs = divisor(name, form)
    if size != PER_CHANNEL and inputs % size:
        allowed = [g for g in GROUP_SIZES if inputs % g == 0]
        raise ValueError(
            f"group_size={size} does not divide the {inputs} inputs of layer '{name}'; "
            + ("leave it out of targets" if fixed else f"allowed are {allowed}")
        )


def _said(fields: dict[str, int | bool], names: Iterable[str]) -> list[str]:
    return [f"{name}={str(fields[name]).lower()}" for name in names]


def _half(scales: Tensor) -> Tensor:
    """As float16, rounded up; a group of zeros gets scale 1. Raises ValueError beyond float16.

    Rounded to nearest, a scale could leave the largest weights outside the grid: at 8 bits by half
    a step where scales are subnormal, as those of small weights (0.005) are.
    """
    if bool((scales > HALF.max).any()):
        raise ValueError(f"a weight of {float(scales.max()):.3g} steps is beyond a float16 scale")
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    nearest = scales.half()
    below = nearest.float() < scales
    return (nearest.view(torch.int16) + below).view(torch.float16)  # the next one's bits are +1


@dataclass(frozen=True, kw_only=True)
class Quantize(Stage):
    """Quantization of the linear layers; each method chooses forms and codes its own way."""

    head: bool = False
    """Also quantize the output projection; where it is tied, the embedding stays as it is."""
    targets: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of layer names, the head aside."""

    def plan(self, layers: Layers) -> Layers:
        planned, chosen = dict(layers), select(layers, self.targets, self.head)
        order.check("quantize", layers, chosen)
        for name, form in layers.items():
            if name not in chosen:
                continue
            planned[name] = self.form(name, form)
        return planned

    @abstractmethod
    def form(self, name: str, form: Form) -> Form:
        """What a layer becomes. Raises ValueError, with its name, if it cannot."""

    @abstractmethod
    def quantize(
        self, layer: nn.Module, weight_RC: Tensor, form: Form, statistic: Any
    ) -> Quantized:
        """The layer with codes; ``statistic`` as asked for in ``observation``."""

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation | None:
        """What the method needs to know of the inputs of the layers."""
        return None

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        planned = self.plan(model.layers(Checkpoint(source.path)))
        return self.write(source, out, planned, progress)

    def write(self, source: Artifact, out: Path, planned: Layers, progress: Progress) -> Stats:
        """Give every layer its form."""
        checkpoint = Checkpoint(source.path)
        chosen = select(model.layers(checkpoint), self.targets, self.head)

        def change(name: str, layer: nn.Module, statistic: Any) -> nn.Module:
            if name not in chosen:
                return layer
            assert isinstance(layer, nn.Linear)
            return self.quantize(layer, layer.weight, planned[name], statistic)

        observation = self.observation(checkpoint, chosen)
        rewrite(source, out, planned, change, progress, observation)
        facts = observation.facts if observation else {}
        return {"bits": max(planned[name].bits or 0 for name in chosen), **stored(planned), **facts}


def stored(planned: Layers) -> Stats:
    """What a stage claims that all quantized layers take on disk, scales and zeros included."""
    quantized = [form for form in planned.values() if form.bits]
    weights = sum(form.rows * form.cols for form in quantized)
    bits = sum(form.stored_bits() for form in quantized)
    return {"bits_per_quantized_weight": bits / weights}


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Quantize):
    """Codes for the weights, in groups; inputs stay as they are."""

    number: str = "int"
    """'int'; 'fp8', floating point of 8 bits (e4m3); or 'nvfp4', 'mxfp8': floating point of 4 and
    8 bits in blocks of 16 and 32 with scales of 8 bits. All but 'int' are symmetric."""
    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share a scale: 16, 32, 64, 128 or 256; -1: all of an output channel."""
    symmetric: bool = True
    """Without zero points; TensorRT and most kernels take nothing else."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.number not in NUMBERS:
            raise ValueError(f"number must be one of {NUMBERS}, got '{self.number}'")
        fields = {"bits": self.bits, "symmetric": self.symmetric, "group_size": self.group_size}
        fixed = FIXED.get(self.number, {})
        if any(fields[name] != value for name, value in fixed.items()):
            takes, got = (" and ".join(_said(fields, fixed)) for fields in (fixed, fields))
            raise ValueError(f"number={self.number} takes {takes}, got {got}")

    def form(self, name: str, form: Form) -> Form:
        check_groups(name, form, self.group_size)
        return replace(
            form,
            bits=self.bits,
            number=self.number,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )
