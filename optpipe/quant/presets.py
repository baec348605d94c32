"""Presets of NVIDIA's Model-Optimizer, with what it decides in our own forms (AWQ arXiv:2306.00978,
SmoothQuant arXiv:2211.10438, FP8 arXiv:2209.05433).

modelopt calibrates one decoder block at a time, on what the model as it came feeds that block. What
it finds out about inputs is read out of its quantizers: their largest magnitudes, and what it
divides them with. Layers that read the same inputs are one layer to it, so that it chooses one
divisor for all of them, which is folded into the norm or the layer that makes the inputs. Weights
are then rounded as its own quantizers do, whose ranges are those of the weights.
Shapes: R outputs, C inputs, G groups of inputs.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import microscaling, model
from optpipe.blockwise import block_tensors, largest_of, one_scale, share_ranges, write_ends
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.family import Block, Decoder
from optpipe.flow import advance, call, start
from optpipe.fold import Fold, divide, folds, shared
from optpipe.kvcache import check_unrounded
from optpipe.linear import (
    BLOCKS,
    LARGEST,
    PER_CHANNEL,
    PER_TENSOR,
    Form,
    Layers,
    LowRank,
    Quantized,
    mask_of,
)
from optpipe.microscaling import to_fp8
from optpipe.quant.grid import FIXED, check_groups, fit
from optpipe.quant.inputs import input_scale
from optpipe.quant.joined import joined
from optpipe.stage import Progress


@dataclass(frozen=True)
class Preset:
    """A config of modelopt and what it makes of a layer."""

    config: str
    fields: dict[str, Any]
    grouped: bool = False
    scales_inputs: bool = False
    cuda: bool = False
    """Whether modelopt calibrates it on a GPU only."""

    @property
    def effective_bits(self) -> float:
        """Bits a weight as modelopt's auto_quantize counts them."""
        return 4.5 if self.fields.get("number") == "nvfp4" else float(self.fields["bits"])

    def form(self, name: str, form: Form, group_size: int) -> Form:
        """What a layer becomes. Raises ValueError if groups do not divide its inputs."""
        made = replace(form, **self.fields)
        if self.grouped:
            made = replace(made, group_size=group_size)
        if made.group_size > 0:
            check_groups(name, form, made.group_size, fixed=not self.grouped)
        return made

    def settings(self, mtq: Any, group_size: int) -> dict[str, Any]:
        """The config, with these groups."""
        config: dict[str, Any] = copy.deepcopy(getattr(mtq, self.config))
        for entry in config["quant_cfg"]:
            found = entry.get("cfg", {})
            for cfg in found if isinstance(found, list) else [found]:
                if self.grouped and "block_sizes" in cfg:
                    cfg["block_sizes"][-1] = group_size
        return config


NVFP4 = {"number": "nvfp4", **FIXED["nvfp4"], "inputs": "nvfp4_block"}
PRESETS = {
    "int4_rtn": Preset("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"bits": 4}, grouped=True),
    "int4_awq": Preset("INT4_AWQ_CFG", {"bits": 4}, grouped=True, scales_inputs=True),
    "w4a8": Preset(
        "W4A8_AWQ_BETA_CFG",
        {"bits": 4, "inputs": "fp8_tensor"},
        grouped=True,
        scales_inputs=True,
    ),
    "int8_smoothquant": Preset(
        "INT8_SMOOTHQUANT_CFG",
        {"bits": 8, "group_size": PER_CHANNEL, "inputs": "int8_tensor"},
        scales_inputs=True,
    ),
    "fp8": Preset(
        "FP8_DEFAULT_CFG",
        {"bits": 8, "number": "fp8", "group_size": PER_TENSOR, "inputs": "fp8_tensor"},
    ),
    "nvfp4": Preset("NVFP4_DEFAULT_CFG", NVFP4),
    "nvfp4_awq": Preset("NVFP4_AWQ_LITE_CFG", NVFP4, scales_inputs=True, cuda=True),
}
"""modelopt rounds the weights of w4a8 once more, to fp8; the kernels that take such weights do not,
and neither do we."""


def check_preset(checkpoint: Checkpoint, name: str, runs: bool = False) -> None:
    """Raise InputError if there is no GPU for a preset that needs one to be calibrated or, with
    ``runs``, to be run by modelopt, or if it divides inputs that nothing could be folded into."""
    preset, decoder = PRESETS[name], checkpoint.decoder
    cuda = preset.cuda or (runs and preset.fields.get("number") in BLOCKS)
    if cuda and not torch.cuda.is_available():
        verb = "runs" if runs else "calibrates"
        raise InputError(f"preset '{name}': modelopt {verb} it on CUDA only, and there is none")
    if preset.scales_inputs and not decoder.gated:
        raise InputError(
            f"preset '{name}' divides the inputs of every layer, but those of "
            f"{decoder.blocks[0].mlp_out} come from a nonlinear activation, into which nothing can "
            "be folded; use quant=awq or transform=smoothquant"
        )


@dataclass(frozen=True)
class Inputs:
    """What modelopt found out about the inputs of a layer."""

    largest_C: Tensor | None
    """Their largest magnitudes, (1) or (C)."""
    divisor_C: Tensor | None
    """What it divides them with, if it does."""


@dataclass(frozen=True)
class Rounding:
    """Blocks rounded one after another, each layer by a preset of its own."""

    presets: Mapping[str, str]
    """Of the layers that are rounded, by name. Those that read the same inputs have the same."""
    group_size: int
    ids_ST: Tensor

    @torch.no_grad()
    def write(self, checkpoint: Checkpoint, out: Path, planned: Layers, progress: Progress) -> None:
        if any(PRESETS[preset].scales_inputs for preset in self.presets.values()):
            check_unrounded(checkpoint.path)
        decoder, device = checkpoint.decoder, fastest()
        writer, lm = Writer(out, checkpoint), model.skeleton(checkpoint)
        flow = start(lm, decoder.blocks, self.ids_ST).to(device)
        for index, block in enumerate(decoder.blocks):
            progress(f"modelopt, {block.name}", index, len(decoder.blocks))
            module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)

            def forward(_: nn.Module, module: nn.Module = module, index: int = index) -> None:
                for hidden in flow.hidden:
                    call(module, flow, index, hidden)

            found = self.calibrated(lm, decoder, block, forward)
            advance(module, flow, index)  # as it came: modelopt looks at the unrounded model
            self.round(lm, checkpoint, block, found, planned)
            module.to("cpu")
            writer.add(block.name, block_tensors(lm, block, checkpoint, planned))
            model.drop(lm, block.name)
        head = None if checkpoint.head_is_embedding else lm.get_submodule(decoder.head)
        write_ends(lm, checkpoint, writer, planned, head)
        writer.close(planned)

    def calibrated(
        self,
        lm: PreTrainedModel,
        decoder: Decoder,
        block: Block,
        forward: Callable[[nn.Module], None],
    ) -> dict[str, Inputs]:
        """Let modelopt calibrate a block that ``forward`` runs; the block stays as it is."""
        found: dict[str, Inputs] = {}
        names = [name for name, _ in model.block_linears(lm, block) if name in self.presets]
        for chosen in sorted({self.presets[name] for name in names}):
            preset, of_it = PRESETS[chosen], [n for n in names if self.presets[n] == chosen]
            groups = [[name] for name in of_it]
            if preset.scales_inputs:
                groups = [parts(fold, of_it) for fold in foldings(lm, decoder, block)]
                groups = [group for group in groups if group]
            with joined(lm, groups) as layers, imported() as mtq:
                mtq.quantize(layers, preset.settings(mtq, self.group_size), forward)
            for group, layer in zip(groups, layers, strict=True):
                found |= dict.fromkeys(group, observed(layer))
        return found

    def round(
        self,
        lm: PreTrainedModel,
        checkpoint: Checkpoint,
        block: Block,
        found: dict[str, Inputs],
        planned: Layers,
    ) -> None:
        """Fold what inputs are divided with, then round what the weights have become."""
        used: dict[str, Tensor] = {}
        for fold in foldings(lm, checkpoint.decoder, block):
            names = parts(fold, found)
            divisors = [found[name].divisor_C for name in names]
            if not divisors or (divisor_C := divisors[0]) is None:
                continue
            assert len(names) == len(fold.readers), (fold, names)
            dtype = checkpoint.floating(f"{fold.writer}.weight") if fold.norm else torch.float32
            used_C = divide(lm, checkpoint.decoder, fold, shared(fold, divisor_C), dtype)
            used |= dict.fromkeys(names, used_C)
        share_ranges(lm, block, planned)
        for name, inputs in found.items():
            layer = lm.get_submodule(name)
            lm.set_submodule(name, rounded(layer, inputs, planned[name], used.get(name)))


def foldings(lm: PreTrainedModel, decoder: Decoder, block: Block) -> list[Fold]:
    """Where the divisors of every layer of a block can go; the left factor's into the right one."""
    found = list(folds(decoder, block))
    for name in block.linears:
        layer = lm.get_submodule(name)
        if isinstance(layer, LowRank):
            assert isinstance(layer.left, nn.Linear)
            rank = layer.left.in_features
            right, left = f"{name}.right", f"{name}.left"
            found.append(Fold(readers=(left,), writer=right, norm=False, size=rank))
    return found


def parts(fold: Fold, names: Container[str]) -> list[str]:
    """The layers, of those named, that read the inputs of a fold: of low rank, the right factor."""
    return [name for r in fold.readers for name in (r, f"{r}.right") if name in names]


@contextlib.contextmanager
def imported() -> Iterator[Any]:
    """modelopt.torch.quantization: 15 to 30 s to import, and talkative on standard output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        yield mtq


def observed(layer: Any) -> Inputs:
    """Read one of modelopt's layers."""
    quantizer = layer.input_quantizer
    largest, multiplier = quantizer.amax, quantizer.pre_quant_scale
    largest = getattr(quantizer, "_amax_for_smoothing", largest)
    return Inputs(
        largest_C=None if largest is None else largest.float().reshape(-1),
        divisor_C=None if multiplier is None else 1 / multiplier.float().reshape(-1),
    )


def rounded(layer: nn.Module, inputs: Inputs, form: Form, divisor_C: Tensor | None) -> Quantized:
    """The layer in our form; each scale spans its largest weight, as modelopt's do."""
    assert isinstance(layer, nn.Linear)
    quantized = coded(layer, form)
    if form.inputs is not None:
        assert inputs.largest_C is not None
        largest_C = inputs.largest_C.to(layer.weight.device)
        reach = (largest_C if divisor_C is None else largest_C / divisor_C).max()
        number = form.inputs.partition("_")[0]
        if number == "nvfp4":
            quantized.input_scale = microscaling.global_scale(reach)
        else:
            quantized.input_scale = input_scale(float(reach), LARGEST[number])
    return quantized


def coded(layer: nn.Linear, form: Form) -> Quantized:
    """Codes by scales as modelopt has them, in float32; integers and fp8 store these in float16."""
    if form.number in BLOCKS:
        grid = fit(layer.weight, form, largest_of(layer))
        return grid.module(grid.encode(layer.weight), layer)
    assert form.bits is not None
    top = LARGEST["fp8"] if form.number == "fp8" else 2 ** (form.bits - 1) - 1
    shape = (1, 1) if form.group_size == PER_TENSOR else (form.rows, form.groups)
    groups = layer.weight.reshape(*shape, -1)
    largest = groups.abs().amax(-1)
    if one_scale(form) and (spanned := largest_of(layer)) is not None:
        largest = spanned.reshape(shape)
    scales = torch.where(largest == 0, 1.0, largest / top)
    steps = (groups / scales.unsqueeze(-1)).reshape(form.rows, form.cols)
    if form.number == "fp8":
        codes = to_fp8(steps).view(torch.uint8)
    else:
        codes = steps.round().clamp(-top - 1, top) + top + 1
    quantized = Quantized(form, codes, scales)
    quantized.mask, quantized.bias = mask_of(layer), layer.bias
    return quantized
