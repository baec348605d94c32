"""The forms of a linear layer, dense, sparse, quantized, low rank, corrected, on disk and in torch.

On disk a layer NAME is stored as what it is, row-major, with R outputs, C inputs, G scales a row:

    dense      NAME.weight (R, C)
    sparse     NAME.values (kept weights, row by row)   NAME.mask (1 bit a weight, padded rows)
    quantized  NAME.codes (``bits`` a weight, padded rows)  NAME.scales (R, G) fp16, or (1, 1)
               [NAME.zeros (``bits`` a group, padded rows) unless symmetric]  [NAME.mask]
               [NAME.global_scale () fp32 in nvfp4]
               [NAME.input_scale () fp16, in nvfp4 fp32, if a scale of inputs is known beforehand]
    low rank   two layers, NAME.right (rank, C) and NAME.left (R, rank), each in a form of its own
    corrected  NAME in any of the first three forms and a low-rank layer NAME.residual: their sum

each with an optional NAME.bias (R). Integer codes are unsigned: weight = (code - zero) * scale,
where the zero of a symmetric layer is 2 ** (bits - 1). Codes of 8-bit floating point ('fp8') are
the bytes of a float8_e4m3fn: weight = code * scale. Both are as in ONNX, TensorRT and vLLM. Blocks
of 'nvfp4' and 'mxfp8' (optpipe/microscaling.py) have scales of 8 bits, float8_e4m3fn and
float8_e8m0fnu: weight = code * (scale * global_scale), and code * scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import microscaling
from optpipe.microscaling import FP8, FP8_TOP, to_fp8

PER_CHANNEL, PER_TENSOR = -1, 0
BLOCKS = (*microscaling.BLOCK,)
NUMBERS = ("int", "fp8", *BLOCKS)
STATIC_INPUTS = ("int8_tensor", "fp8_tensor", "nvfp4_block")
INPUTS = (*STATIC_INPUTS, "int8_token", "fp8_token", "mxfp8_block")
"""How a layer may round its inputs: to which numbers, with one scale known beforehand ('tensor') or
with one for each token, its largest magnitude over the largest number. Blocks get theirs as they
come; those of nvfp4 are relative to a global one known beforehand."""
LARGEST = {"int8": 127.0, "fp8": FP8_TOP}


@dataclass(frozen=True, kw_only=True)
class Form:
    """How one linear layer is stored; ``bits is None`` means floating point."""

    rows: int
    cols: int
    bits: int | None = None
    number: str = "int"
    """What a code is: 'int'; 'fp8', a floating-point number of 8 bits (e4m3); or 'nvfp4', 'mxfp8',
    whose ``bits`` and ``group_size`` are those of optpipe/microscaling.py."""
    group_size: int = PER_CHANNEL
    """Inputs that share a scale; -1: the whole row; 0: one scale for the layer."""
    inputs: str | None = None
    """One of INPUTS if the layer rounds what it multiplies with; None: it does not."""
    symmetric: bool = True
    pattern: str | None = None
    """'row' or 'N:M' if a mask says which weights are kept; None: all are."""
    bound: int | None = None
    """In a plan: the rank is settled later, at most as planned, a multiple of this; or to all."""
    choices: tuple[int, ...] | None = None
    """In a plan: the bits are settled later, to one of these."""

    @property
    def groups(self) -> int:
        return self.cols // self.group_size if self.group_size > 0 else 1

    @property
    def scales(self) -> int:
        """How many scales are stored."""
        return 1 if self.group_size == PER_TENSOR else self.rows * self.groups

    @property
    def static_inputs(self) -> bool:
        """Whether inputs are rounded with a scale that is stored."""
        return self.inputs in STATIC_INPUTS

    @property
    def other_bits(self) -> int:
        """What a layer stores once: global scale, and scale of inputs."""
        wide = 32 if self.number == "nvfp4" else 0
        return wide + self.static_inputs * (32 if self.inputs == "nvfp4_block" else 16)

    def stored_bits(self, float_bits: int = 16, density: float = 1.0) -> float:
        """Bits this layer takes on disk, without bias; ``density``: the share of kept weights."""
        weights = self.rows * self.cols
        mask = weights if self.pattern else 0
        if self.bits is None:
            return weights * float_bits * (density if self.pattern else 1) + mask
        per_group = (8 if self.number in BLOCKS else 16) + (0 if self.symmetric else self.bits)
        return weights * self.bits + self.scales * per_group + self.other_bits + mask


Layers = dict[str, Form]
"""Every linear layer of a model by its name, in the order of the model."""


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Integers below 2 ** bits, (R, C), to bytes (R, ceil(C * bits / 8)), low bits first."""
    rows = codes_RC.shape[0]
    if bits == 8:
        return codes_RC.to(torch.uint8)
    if bits == 4:  # the common case, two codes at a time instead of bit by bit
        pairs = functional.pad(codes_RC.to(torch.uint8), (0, codes_RC.shape[1] % 2))
        pairs = pairs.contiguous().view(torch.int16)
        return ((pairs | (pairs >> 4)) & 255).to(torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8)
    flat = ((codes_RC.to(torch.uint8).unsqueeze(-1) >> shifts) & 1).reshape(rows, -1)
    flat = functional.pad(flat, (0, -flat.shape[1] % 8)).reshape(rows, -1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 (R, cols)."""
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :cols]
    if bits == 4:
        pairs = packed.to(torch.int16)
        pairs = ((pairs | (pairs << 4)) & 0x0F0F).contiguous()
        return pairs.view(torch.uint8)[:, :cols].contiguous()
    single = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    single = single.reshape(rows, -1)[:, : cols * bits].reshape(rows, cols, bits)
    return (single << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def round_inputs(x: Tensor, inputs: str, scale: Tensor | None) -> Tensor:
    """What a layer multiplies with instead of x (..., C): scale * nearest number to x / scale.

    As QuantizeLinear and DequantizeLinear of ONNX: ties to even, -128 and 448 are the ends.
    ``scale`` is a scalar, or None where every token or block has its own.
    """
    number, _, per = inputs.partition("_")
    if per == "block":
        return microscaling.round_blocks(x, number, scale)
    wide = x.float()
    if per == "token":
        scale = wide.abs().amax(-1, keepdim=True) / LARGEST[number]
        scale = torch.where(scale == 0, 1.0, scale)
    assert scale is not None
    scaled = wide / scale
    rounded = scaled.round().clamp(-128, 127) if number == "int8" else to_fp8(scaled).float()
    return (rounded * scale).to(x.dtype)


SCALARS = ("global_scale", "input_scale")


def scale_dtype(number: str) -> torch.dtype:
    """What the scales of a layer are stored as."""
    return microscaling.SCALE.get(number, torch.float16)


class Quantized(nn.Module):
    """A linear layer that keeps its codes and multiplies with what they stand for.

    Where its form says so, it rounds its inputs first, as the runtimes do.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None
    mask: Tensor | None

    def __init__(self, form: Form, codes_RC: Tensor, scales_RG: Tensor) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("codes", codes_RC.to(torch.uint8))
        self.register_buffer("scales", scales_RG.to(scale_dtype(form.number)))
        for name in ("zeros", "bias", "mask", "global_scale", "input_scale"):
            self.register_buffer(name, None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, (R, C)."""
        form = self.form
        grouped = self._numbers().reshape(form.rows, form.groups, -1)
        weight = grouped * microscaling.steps(self.scales, self.global_scale).unsqueeze(-1)
        return weight.reshape(form.rows, form.cols).to(dtype)

    def _numbers(self) -> Tensor:
        """What the codes say before they are scaled, (R, C) or (R, G, C / G), float32."""
        form = self.form
        assert form.bits is not None
        if form.number == "fp8":
            return self.codes.view(FP8).to(torch.float32)
        if form.number in BLOCKS:
            return microscaling.numbers(self.codes, form.number)
        codes = self.codes.reshape(form.rows, form.groups, -1).to(torch.float32)
        if self.zeros is None:
            return codes - float(2 ** (form.bits - 1))
        return codes - self.zeros.unsqueeze(-1).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.form.inputs is not None:
            x = round_inputs(x, self.form.inputs, self.input_scale)
        return functional.linear(x, self.dequantize(x.dtype), bias)


class LowRank(nn.Module):
    """y = left(right(x)): a linear layer of rank ``right.out_features``."""

    def __init__(self, right: nn.Module, left: nn.Module) -> None:
        super().__init__()
        self.right, self.left = right, left

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y


class Corrected(nn.Module):
    """y = base(x) + residual(x): a compressed layer and a low-rank part of what it lost."""

    def __init__(self, base: nn.Module, residual: LowRank) -> None:
        super().__init__()
        self.base, self.residual = base, residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.residual(x)
        return y


def dense(weight_RC: Tensor, bias_R: Tensor | None, mask_RC: Tensor | None = None) -> nn.Linear:
    """An ordinary linear layer; the mask, if any, stays with it as a buffer."""
    rows, cols = weight_RC.shape
    linear = nn.Linear(cols, rows, bias=bias_R is not None, device="meta")
    linear.weight = nn.Parameter(weight_RC, requires_grad=False)
    if bias_R is not None:
        linear.bias = nn.Parameter(bias_R, requires_grad=False)
    linear.register_buffer("mask", mask_RC, persistent=False)
    return linear


def weight_of(module: nn.Module) -> Tensor:
    """The weight a layer multiplies with, (R, C) float; the product of two factors."""
    if isinstance(module, Quantized):
        return module.dequantize()
    if isinstance(module, LowRank):
        return weight_of(module.left) @ weight_of(module.right)
    assert isinstance(module, nn.Linear)
    return module.weight


def mask_of(module: nn.Module) -> Tensor | None:
    """True where a weight is kept, (R, C); None if the layer was never pruned."""
    mask = getattr(module, "mask", None)
    assert mask is None or isinstance(mask, Tensor)
    return mask


def encode(name: str, module: nn.Module, form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that store a layer (see the top of this file); floats are kept as ``dtype``."""
    mask = mask_of(module)
    stored: dict[str, Tensor] = {}
    if isinstance(module, Quantized):
        assert form.bits is not None
        stored["codes"] = pack(module.codes, form.bits)
        stored["scales"] = module.scales.to(scale_dtype(form.number))  # float32 while trained
        if module.zeros is not None:
            stored["zeros"] = pack(module.zeros, form.bits)
        for part in SCALARS:
            if (scale := getattr(module, part)) is not None:
                stored[part] = scale
    elif mask is not None:
        stored["values"] = weight_of(module)[mask].to(dtype)
    else:
        stored["weight"] = weight_of(module).to(dtype)
    if mask is not None:
        stored["mask"] = pack(mask, 1)
    if isinstance(bias := module.bias, Tensor):
        stored["bias"] = bias.to(dtype)
    return {f"{name}.{key}": value.contiguous() for key, value in stored.items()}


def decode(name: str, form: Form, get: Callable[[str], Tensor | None]) -> nn.Module:
    """The layer back from its tensors; ``get`` returns None for a name that is not stored."""
    packed_mask, bias = get(f"{name}.mask"), get(f"{name}.bias")
    mask = None if packed_mask is None else unpack(packed_mask, 1, form.cols).bool()
    if form.bits is not None:
        codes, scales, zeros = (get(f"{name}.{part}") for part in ("codes", "scales", "zeros"))
        assert codes is not None and scales is not None
        module = Quantized(form, unpack(codes, form.bits, form.cols), scales)
        module.zeros = None if zeros is None else unpack(zeros, form.bits, form.groups)
        module.bias, module.mask = bias, mask
        for part in SCALARS:
            setattr(module, part, get(f"{name}.{part}"))
        return module
    weight = get(f"{name}.weight")
    if weight is None:
        values = get(f"{name}.values")
        assert values is not None and mask is not None
        weight = torch.zeros(form.rows, form.cols, dtype=values.dtype)
        weight[mask] = values
    return dense(weight, bias, mask)
