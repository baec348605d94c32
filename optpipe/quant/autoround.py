"""AutoRound: learn how to round each weight, block by block, by signed gradients (Cheng et al.
2023, arXiv:2309.05516), through Intel's library of that name.

The library is handed one block after another, with what the model as it came feeds it and what
the rounded blocks before it do; its codes, scales and zero points are kept as they are. Only
asymmetric grids: its symmetric ones may have negative scales.
Shapes: R outputs, C inputs, G groups of inputs.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import block_tensors, write_ends
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.family import HEAD
from optpipe.flow import Flow, start
from optpipe.linear import PER_CHANNEL, Form, Layers, Quantized
from optpipe.quant.grid import BITS, GROUP_SIZES, stored
from optpipe.stage import Progress, Stage


@dataclass(frozen=True, kw_only=True)
class AutoRound(Stage):
    """Every layer of the blocks; the head stays as it is. One block is in memory at a time."""

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int = 128
    """Inputs that share a scale and a zero point: 16, 32, 64, 128, 256; -1: an output channel."""
    iterations: int = 200
    """Steps of gradient descent for each block."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return {n: form if n == HEAD else self.form(n, form) for n, form in layers.items()}

    def form(self, name: str, form: Form) -> Form:
        if form.pattern is not None:
            raise ValueError(
                f"layer '{name}' is pruned ({form.pattern}), and AutoRound keeps no zeros; use "
                "quant=gptq"
            )
        if self.group_size != PER_CHANNEL and form.cols % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the {form.cols} inputs of layer "
                f"'{name}'; allowed are {[g for g in GROUP_SIZES if form.cols % g == 0]}"
            )
        return replace(form, bits=self.bits, group_size=self.group_size, symmetric=False)

    def inputs(self, model: Checkpoint) -> str:
        if find_spec("auto_round") is None:
            raise InputError(
                "quant=autoround needs package 'auto-round': pip install 'optpipe[autoround]'"
            )
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.inputs(checkpoint)
        decoder, planned = checkpoint.decoder, self.plan(model.layers(checkpoint))
        writer, lm = Writer(out, checkpoint), model.skeleton(checkpoint)
        with torch.no_grad():
            flow = start(lm, decoder.blocks, self.calib.ids(checkpoint))
        rounded: list[Tensor] | None = None
        for index, block in enumerate(decoder.blocks):
            progress(f"auto-round, {block.name}", index, len(decoder.blocks))
            module = model.fill(lm, block.name, checkpoint, torch.float32)
            rounded = self.tune(Alone(module, checkpoint.config), flow, index, rounded)
            for name, layer in list(model.block_linears(lm, block)):
                lm.set_submodule(name, read(layer, planned[name]))
            writer.add(block.name, block_tensors(lm, block, checkpoint, planned))
            model.drop(lm, block.name)
        head = None if checkpoint.head_is_embedding else lm.get_submodule(decoder.head)
        write_ends(lm, checkpoint, writer, planned, head)
        writer.close(planned)
        facts = {"bits": self.bits, "iterations": self.iterations}
        return {**facts, **stored(planned), **self.calib.facts()}

    def tune(
        self, alone: Alone, flow: Flow, index: int, rounded: list[Tensor] | None
    ) -> list[Tensor]:
        """Round a block in place; its layers also get the scales and zeros of their groups.

        ``rounded`` is what the rounded blocks before it make of the samples; returns that of this
        one, and moves ``flow`` on by the block as it was.
        """
        args, kwargs = flow.calls[index]
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            library = self.library(alone, len(flow.hidden), flow.hidden[0].shape[1])
            with torch.enable_grad():
                made, flow.hidden = library.quantize_block(
                    alone.model.get_submodule("layers.0"),
                    [(((hidden, *args), dict(kwargs)),) for hidden in flow.hidden],
                    q_input=rounded,
                    device=str(fastest()),
                    auto_offload=False,
                )
        alone.to("cpu")
        return list(made)

    def library(self, alone: Alone, samples: int, tokens: int) -> Any:
        """Auto-round's own object, for one block."""
        import auto_round  # slow to import, optional

        made = auto_round.AutoRound(
            alone,
            "",  # it wants a tokenizer, and has no use for one with hidden states as data
            scheme={"bits": self.bits, "group_size": self.group_size, "sym": False,
                    "data_type": "int"},
            iters=self.iterations,
            nsamples=samples,
            seqlen=tokens,
            seed=self.calib.seed,
            amp=False,  # the block stays in float32
            enable_torch_compile=False,
            device_map=str(fastest()),
        )  # fmt: skip
        made.configure_layer_config(enable_gguf_official_mixed=False)
        made.batch_dim = 0
        return made


class Alone(nn.Module):
    """A block as a whole model, the way the library looks for blocks in one."""

    dtype = torch.float32
    name_or_path = ""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.layers = nn.ModuleList([block])


def read(layer: Any, form: Form) -> Quantized:
    """One of AutoRound's layers, whose weight is (code - zero) * scale, in our form."""
    scales_RG = layer.scale.detach().float().reshape(form.rows, form.groups)
    zeros_RG = layer.zp.detach().float().reshape(form.rows, form.groups)
    weight_RGW = layer.weight.detach().float().reshape(form.rows, form.groups, -1)
    codes_RGW = weight_RGW / scales_RG.unsqueeze(-1) + zeros_RG.unsqueeze(-1)
    quantized = Quantized(form, codes_RGW.round().reshape(form.rows, form.cols), scales_RG)
    quantized.zeros = zeros_RG.to(torch.uint8)
    quantized.bias = None if layer.bias is None else layer.bias.detach().float()
    return quantized
