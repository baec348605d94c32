"""Presets of NVIDIA's Model-Optimizer, with what it decides in our own forms (AWQ arXiv:2306.00978,
SmoothQuant arXiv:2211.10438, FP8 arXiv:2209.05433).

modelopt calibrates and rounds the torch model; the codes, scales and input scales are then read out
of its quantizers. Where it divides the inputs of a layer (pre_quant_scale), layers that read the
same inputs get the mean of their divisors, as in its own export, and this is folded into the norm
or the layer that makes the inputs. Shapes: R outputs, C inputs, G groups of inputs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import block_tensors, write_ends
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.errors import InputError
from optpipe.family import HEAD
from optpipe.fold import Fold, divide, folds, shared
from optpipe.kvcache import check_unrounded
from optpipe.linear import (
    LARGEST,
    PER_CHANNEL,
    PER_TENSOR,
    Form,
    Layers,
    Quantized,
    dense,
    mask_of,
)
from optpipe.microscaling import FP8
from optpipe.quant.grid import GROUP_SIZES
from optpipe.quant.inputs import input_scale
from optpipe.stage import Progress, Stage


@dataclass(frozen=True)
class Preset:
    """A config of modelopt and what it makes of a layer."""

    config: str
    form: dict[str, Any]
    grouped: bool = False
    scales_inputs: bool = False


PRESETS = {
    "int4_rtn": Preset("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"bits": 4}, grouped=True),
    "int4_awq": Preset("INT4_AWQ_CFG", {"bits": 4}, grouped=True, scales_inputs=True),
    "int8_smoothquant": Preset(
        "INT8_SMOOTHQUANT_CFG",
        {"bits": 8, "group_size": PER_CHANNEL, "inputs": "int8_tensor"},
        scales_inputs=True,
    ),
    "fp8": Preset(
        "FP8_DEFAULT_CFG",
        {"bits": 8, "number": "fp8", "group_size": PER_TENSOR, "inputs": "fp8_tensor"},
    ),
}
REFUSED = {
    "w4a8": "it rounds weights twice, to int4 and then to fp8, and no form here holds that",
    "nvfp4": "modelopt calibrates it on CUDA only, and no form here holds its blocks of 16",
    "mxfp4": "modelopt calibrates it on CUDA only, and no form here holds its blocks of 32",
    "mxfp8": "modelopt calibrates it on CUDA only, and no form here holds its blocks of 32",
    "auto_quantize": "it settles the number format of each layer as it runs, which a plan cannot "
    "say; quant=mixed settles bits under a budget",
}


@dataclass
class Calibrated:
    """What modelopt found out about a layer."""

    weight_RC: Tensor
    """As it was."""
    rounded_RC: Tensor
    """What modelopt multiplies with; of the divided inputs, if it divides them."""
    largest: Tensor
    """Of each scale, the weight that is its largest code."""
    input_C: Tensor | None
    """Largest magnitudes of inputs, (1) or (C)."""
    multiplier_C: Tensor | None
    """What modelopt multiplies inputs with."""


@dataclass(frozen=True, kw_only=True)
class Modelopt(Stage):
    """Every layer of the blocks; the head stays as it is. Holds the whole model in memory."""

    rewrites: ClassVar[bool] = True

    preset: str = "fp8"
    """'int4_rtn', 'int4_awq' (weights), 'int8_smoothquant', 'fp8' (weights and inputs)."""
    group_size: int = 128
    """Of int4: inputs that share a scale, 16, 32, 64, 128 or 256."""
    calib: Calib = field(default_factory=Calib)
    """Also of int4_rtn, which makes nothing of it."""

    def __post_init__(self) -> None:
        if self.preset in REFUSED:
            raise ValueError(f"preset '{self.preset}': {REFUSED[self.preset]}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {[*PRESETS]}, got '{self.preset}'")
        if self.group_size not in GROUP_SIZES or self.group_size == PER_CHANNEL:
            raise ValueError(f"group_size must be one of {GROUP_SIZES[1:]}, got {self.group_size}")

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return {n: form if n == HEAD else self.form(n, form) for n, form in layers.items()}

    def form(self, name: str, form: Form) -> Form:
        preset = PRESETS[self.preset]
        if not preset.grouped:
            return replace(form, **preset.form)
        if form.cols % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the {form.cols} inputs of layer "
                f"'{name}'; allowed are {[g for g in GROUP_SIZES[1:] if form.cols % g == 0]}"
            )
        return replace(form, **preset.form, group_size=self.group_size)

    def inputs(self, model: Checkpoint) -> str:
        if PRESETS[self.preset].scales_inputs and not model.decoder.gated:
            raise InputError(
                f"preset '{self.preset}' divides the inputs of every layer, but those of "
                f"{model.decoder.blocks[0].mlp_out} come from a nonlinear activation, into which "
                "nothing can be folded; use quant=awq or transform=smoothquant"
            )
        return self.calib.inputs(model)

    @torch.no_grad()
    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.inputs(checkpoint)
        if PRESETS[self.preset].scales_inputs:
            check_unrounded(checkpoint.path)
        decoder, planned = checkpoint.decoder, self.plan(model.layers(checkpoint))
        lm = model.load(checkpoint)
        found = self.calibrated(lm, checkpoint, progress)
        divisors: dict[str, Tensor] = {}
        if PRESETS[self.preset].scales_inputs:
            divisors = dict(fold_all(lm, checkpoint, found))
        for name, layer in found.items():
            quantized = read(lm.get_submodule(name), layer, planned[name], divisors.get(name))
            lm.set_submodule(name, quantized)
        writer = Writer(out, checkpoint)
        for block in decoder.blocks:
            writer.add(block.name, block_tensors(lm, block, checkpoint, planned))
        head = None if checkpoint.head_is_embedding else lm.get_submodule(decoder.head)
        write_ends(lm, checkpoint, writer, planned, head)
        writer.close(planned)
        return {"preset": self.preset, **self.calib.facts()}

    def calibrated(
        self, lm: PreTrainedModel, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Calibrated]:
        """Let modelopt calibrate the model; its layers are ordinary ones again afterwards."""
        ids_ST, done = self.calib.ids(checkpoint), 0

        def forward(_: nn.Module) -> None:
            nonlocal done
            for ids_T in ids_ST:  # AWQ asks for all of it twice
                progress(f"modelopt, sample {done}", done % len(ids_ST), len(ids_ST))
                lm(ids_T[None], use_cache=False)
                done += 1

        with imported() as mtq:
            mtq.quantize(lm, self.config(mtq), forward)
            names = [n for b in checkpoint.decoder.blocks for n, _ in model.block_linears(lm, b)]
            found = {name: observed(lm.get_submodule(name)) for name in names}
        for name, layer in found.items():
            old = lm.get_submodule(name)
            bias = old.bias if isinstance(old.bias, Tensor) else None
            lm.set_submodule(name, dense(layer.weight_RC, bias, mask_of(old)))
        return found

    def config(self, mtq: Any) -> dict[str, Any]:
        preset = PRESETS[self.preset]
        config: dict[str, Any] = copy.deepcopy(getattr(mtq, preset.config))
        for entry in config["quant_cfg"]:
            if "block_sizes" in entry.get("cfg", {}):
                entry["cfg"]["block_sizes"][-1] = self.group_size
        return config


@contextlib.contextmanager
def imported() -> Iterator[Any]:
    """modelopt.torch.quantization: 15 to 30 s to import, and talkative on standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        yield mtq


def observed(layer: Any) -> Calibrated:
    """Read one of modelopt's layers."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    multiplier = inputs.pre_quant_scale
    weight_RC = layer.weight.detach().float()
    rounded_RC = weights(weight_RC).float()
    largest_C = getattr(inputs, "_amax_for_smoothing", inputs.amax)
    if multiplier is not None:
        multiplier = multiplier.float().reshape(-1)
        weight_RC = weight_RC * multiplier
    return Calibrated(
        weight_RC=weight_RC,
        rounded_RC=rounded_RC,
        largest=weights.amax.float(),
        input_C=None if largest_C is None else largest_C.float().reshape(-1),
        multiplier_C=multiplier,
    )


def fold_all(
    lm: PreTrainedModel, checkpoint: Checkpoint, found: dict[str, Calibrated]
) -> Iterator[tuple[str, Tensor]]:
    """Fold the divisors of all layers; yields those that took effect, (C), by layer."""
    decoder = checkpoint.decoder
    for block in decoder.blocks:
        for fold in folds(decoder, block):
            names = [n for r in fold.readers for n in (r, f"{r}.right") if n in found]
            multipliers = [found[n].multiplier_C for n in names]
            dtype = checkpoint.floating(f"{fold.writer}.weight") if fold.norm else torch.float32
            factor_C = common_divisor(fold, [m for m in multipliers if m is not None])
            used_C = divide(lm, decoder, fold, factor_C, dtype)
            yield from ((name, used_C) for name in names)


def common_divisor(fold: Fold, multipliers: list[Tensor]) -> Tensor:
    """The divisor of inputs that several layers read: of the mean of their multipliers."""
    return shared(fold, 1 / torch.stack(multipliers).mean(0))


def read(layer: nn.Module, found: Calibrated, form: Form, divisor_C: Tensor | None) -> Quantized:
    """The layer in our form: modelopt's codes, or if inputs are divided its rounding of the weight
    as it is now."""
    assert isinstance(layer.weight, Tensor) and form.bits is not None
    top = LARGEST["fp8"] if form.number == "fp8" else 2 ** (form.bits - 1) - 1
    shape = (1, 1) if form.group_size == PER_TENSOR else (form.rows, form.groups)
    if divisor_C is None:
        value_RC, largest = found.rounded_RC, found.largest.reshape(shape)
    else:
        value_RC = layer.weight
        largest = value_RC.abs().reshape(*shape, -1).amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / top)
    steps = (value_RC.reshape(*shape, -1) / scales.unsqueeze(-1)).reshape(form.rows, form.cols)
    if form.number == "fp8":
        codes = steps.to(FP8).view(torch.uint8)
    else:
        codes = steps.round().clamp(-top - 1, top) + top + 1
    quantized = Quantized(form, codes, scales)
    quantized.mask = mask_of(layer)
    quantized.bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if form.inputs is not None:
        assert found.input_C is not None
        reach = found.input_C if divisor_C is None else found.input_C / divisor_C
        number = form.inputs.partition("_")[0]
        quantized.input_scale = input_scale(float(reach.max()), LARGEST[number])
    return quantized
