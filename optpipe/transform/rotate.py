"""Rotations folded into the weights, as R1 and R2 of SpinQuant (arXiv:2405.16406) and QuaRot
(arXiv:2404.00456), without their online ones.

The residual stream becomes x Q: the embedding and every layer that writes to it are rotated, every
layer that reads it is rotated back. An RMSNorm does the same to the rotated once its weight is in
the layers after it; a LayerNorm does if Q keeps the mean. The values of each attention head are
rotated likewise, and the output projection back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import block_tensors, write_ends
from optpipe.checkpoint import Checkpoint, Writer, untie
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.family import Block, Decoder
from optpipe.fold import (
    absorb,
    input_part,
    output_part,
    put,
    rotate_inputs,
    rotate_outputs,
    values,
)
from optpipe.kvcache import check_unrounded
from optpipe.linear import Layers, dense
from optpipe.stage import Progress, Stage
from optpipe.transform.orthogonal import KINDS, keeping_mean, orthogonal


@dataclass(frozen=True)
class Turns:
    """The rotations of a run; None: none."""

    residual: Tensor | None
    heads: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Rotate(Stage):
    """For stages that round weights or activations after it. A tied head becomes its own weight."""

    rewrites: ClassVar[bool] = True

    residual: bool = True
    """R1, the residual stream."""
    heads: bool = True
    """R2, the values of each attention head."""
    kind: str = "hadamard"
    """'hadamard' with random signs, for sizes of which one is known; 'random': uniform."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got '{self.kind}'")
        if not (self.residual or self.heads):
            raise ValueError("with residual=false and heads=false nothing would be rotated")

    def unties(self) -> bool:
        return self.residual

    def plan(self, layers: Layers) -> Layers:
        order.check("rotate", layers)
        return layers

    def inputs(self, model: Checkpoint) -> None:
        decoder = model.decoder
        if self.residual and any(block.attn_out_norm for block in decoder.blocks):
            raise InputError(
                f"{decoder.family} norms the outputs of its layers before it adds them to the "
                "residual stream, so that this cannot be rotated: set residual=false"
            )
        self.turns(decoder)

    def turns(self, decoder: Decoder) -> Turns:
        """Raises ValueError for a size that has no Hadamard matrix."""
        residual = heads = None
        if self.residual:
            residual = orthogonal(decoder.hidden, self.kind, self.seed)
            residual = keeping_mean(residual) if decoder.norm == "layer" else residual
        if self.heads:
            heads = orthogonal(decoder.head_dim, self.kind, self.seed + 1)
        return Turns(residual, heads)

    @torch.no_grad()
    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint, device = Checkpoint(source.path), fastest()
        self.inputs(checkpoint)
        if self.heads:
            check_unrounded(checkpoint.path)
        decoder, layers = checkpoint.decoder, model.layers(checkpoint)
        turns, lm = self.turns(decoder), model.skeleton(checkpoint)
        writer = Writer(out, checkpoint)
        for index, block in enumerate(decoder.blocks):
            progress(block.name, index, len(decoder.blocks))
            model.fill(lm, block.name, checkpoint, torch.float32).to(device)
            turn_block(lm, decoder, block, turns)
            lm.get_submodule(block.name).to("cpu")
            writer.add(block.name, block_tensors(lm, block, checkpoint, layers))
            model.drop(lm, block.name)
        if turns.residual is not None:
            turn_ends(lm, decoder, turns.residual)
        shared = decoder.tied and not self.residual
        head = None if shared else lm.get_submodule(decoder.head)
        write_ends(lm, checkpoint, writer, layers, head)
        writer.close(layers)
        if self.residual and decoder.tied:
            untie(out)
        return {"rotated": [name for name in ("residual", "heads") if getattr(self, name)]}


def turn_block(lm: PreTrainedModel, decoder: Decoder, block: Block, turns: Turns) -> None:
    """Rotate all that a block reads and writes."""
    if turns.heads is not None:
        fold = values(decoder, block)
        part = slice(fold.first, fold.first + decoder.kv_heads * decoder.head_dim)
        rotate_outputs(output_part(lm, fold.writer), turns.heads, part)
        rotate_inputs(input_part(lm, block.attn_out), turns.heads)
    if turns.residual is None:
        return
    for norm, readers in ((block.attn_norm, block.qkv), (block.mlp_norm, block.mlp_in)):
        absorb(lm, decoder, norm, readers)
        _turn_bias(lm, norm, turns.residual)
        for name in readers:
            rotate_inputs(input_part(lm, name), turns.residual)
    for name in (block.attn_out, block.mlp_out):
        rotate_outputs(output_part(lm, name), turns.residual)


def turn_ends(lm: PreTrainedModel, decoder: Decoder, rotation: Tensor) -> None:
    """Rotate the embeddings, and the head back; it gets a weight of its own."""
    head = lm.get_submodule(decoder.head)
    assert isinstance(head.weight, Tensor)
    bias = head.bias if isinstance(head.bias, Tensor) else None
    lm.set_submodule(decoder.head, dense(head.weight, bias))
    absorb(lm, decoder, decoder.final_norm, [decoder.head])
    _turn_bias(lm, decoder.final_norm, rotation)
    rotate_inputs(input_part(lm, decoder.head), rotation)
    for name in filter(None, (decoder.embed, decoder.positions)):
        table = lm.get_submodule(name)
        assert isinstance(table.weight, Tensor)
        put(table, "weight", (table.weight.double() @ rotation).to(table.weight.dtype))


def _turn_bias(lm: PreTrainedModel, norm: str, rotation: Tensor) -> None:
    module = lm.get_submodule(norm)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        put(module, "bias", (bias.double() @ rotation.to(bias.device)).to(bias.dtype))
