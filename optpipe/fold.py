"""Factors and rotations that move through a model without changing what it computes.

Layers are given new weights, never changed in place: those read from a file may be views of it.
Shapes: R outputs, C inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe.errors import InputError
from optpipe.family import Block, Decoder
from optpipe.linear import LowRank


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Layers that read the same inputs, and what makes these: it can take a factor of each input.

    Input (h * repeat + r) * size + i of the readers is row ``first + h * size + i`` of the writer.
    """

    readers: tuple[str, ...]
    writer: str
    norm: bool
    """Whether the writer is a norm; else it is a linear layer."""
    first: int = 0
    repeat: int = 1
    """Inputs that come from one row: query heads share the values of a key head."""
    size: int
    """Inputs that follow each other in the writer as in the readers."""


def folds(decoder: Decoder, block: Block) -> tuple[Fold, ...]:
    """Where factors on inputs of the layers of a block can go without changing its output.

    The inputs of ``mlp_out`` come from a product with the up projection if the MLP is gated; else
    from a nonlinear activation, which lets no factor through.
    """
    fused = len(block.mlp_in) == 1  # gate and up in one layer
    up = Fold(
        readers=(block.mlp_out,),
        writer=block.mlp_in[-1],
        norm=False,
        first=decoder.intermediate if fused else 0,
        size=decoder.intermediate,
    )
    return (
        Fold(readers=block.qkv, writer=block.attn_norm, norm=True, size=decoder.hidden),
        values(decoder, block),
        Fold(readers=block.mlp_in, writer=block.mlp_norm, norm=True, size=decoder.hidden),
        *([up] if decoder.gated else []),
    )


def values(decoder: Decoder, block: Block) -> Fold:
    """From the output projection of the attention to the value projection."""
    fused = len(block.qkv) == 1
    return Fold(
        readers=(block.attn_out,),
        writer=block.qkv[-1],
        norm=False,
        first=(decoder.heads + decoder.kv_heads) * decoder.head_dim if fused else 0,
        repeat=decoder.heads // decoder.kv_heads,
        size=decoder.head_dim,
    )


def input_part(lm: nn.Module, name: str) -> nn.Linear:
    """What of a layer multiplies its inputs: the right factor of one of low rank, else itself."""
    layer = lm.get_submodule(name)
    part = layer.right if isinstance(layer, LowRank) else layer
    assert isinstance(part, nn.Linear), name
    return part


def output_part(lm: nn.Module, name: str) -> nn.Linear:
    """What of a layer makes its outputs: the left factor of one of low rank, else itself."""
    layer = lm.get_submodule(name)
    part = layer.left if isinstance(layer, LowRank) else layer
    assert isinstance(part, nn.Linear), name
    return part


def shared(fold: Fold, factor_C: Tensor) -> Tensor:
    """The nearest factors, (C), that the writer can take: inputs of one row share their mean."""
    grouped = factor_C.reshape(-1, fold.repeat, fold.size)
    return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)


def divide(
    lm: PreTrainedModel, decoder: Decoder, fold: Fold, factor_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Divide the inputs of the readers by ``factor_C``, and make up for that in their weights.

    ``factor_C`` is positive and as ``shared`` makes it; a norm is stored as ``dtype``. Returns the
    factors that took effect, (C): a norm has them rounded, and the readers follow it.
    """
    if fold.norm:
        norm = lm.get_submodule(fold.writer)
        factor_C = _divide_norm(norm, factor_C, decoder.norm_offset, dtype)
    else:
        _divide_rows(output_part(lm, fold.writer), fold, factor_C)
    for name in fold.readers:
        reader = input_part(lm, name)
        put(reader, "weight", reader.weight * factor_C.to(reader.weight.dtype))
    return factor_C


def _divide_norm(norm: nn.Module, factor_C: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    assert isinstance(norm.weight, Tensor)
    old = norm.weight + offset
    new = (old / factor_C.to(old.dtype) - offset).to(dtype).to(old.dtype)
    lost = new + offset == 0  # also where it was zero before
    new = torch.where(lost, norm.weight, new)
    put(norm, "weight", new)
    factor_C = torch.where(lost, torch.ones_like(old), old / (new + offset))
    if isinstance(bias := getattr(norm, "bias", None), Tensor):
        put(norm, "bias", bias / factor_C)
    return factor_C


def _divide_rows(writer: nn.Linear, fold: Fold, factor_C: Tensor) -> None:
    factor_R = factor_C.reshape(-1, fold.repeat, fold.size)[:, 0].reshape(-1)
    part = slice(fold.first, fold.first + len(factor_R))
    for key in ("weight", "bias"):
        if isinstance(old := getattr(writer, key), Tensor):
            new = old.clone()
            new[part] /= factor_R.to(old.dtype).reshape(-1, *[1] * (old.dim() - 1))
            put(writer, key, new)


def absorb(lm: PreTrainedModel, decoder: Decoder, norm: str, readers: Iterable[str]) -> None:
    """Move the weight of a norm into the layers that read it; what is left has weight one.

    Raises InputError for a LayerNorm whose weight is zero somewhere: its bias could not stay.
    """
    module = lm.get_submodule(norm)
    assert isinstance(module.weight, Tensor)
    scale_C = module.weight + decoder.norm_offset
    for name in readers:
        reader = input_part(lm, name)
        put(reader, "weight", reader.weight * scale_C)
    put(module, "weight", torch.full_like(scale_C, 1 - decoder.norm_offset))
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        if bool((scale_C == 0).any()):
            raise InputError(
                f"the weight of '{norm}' is zero somewhere, so its bias cannot be kept"
            )
        put(module, "bias", bias / scale_C)


def rotate_inputs(layer: nn.Linear, rotation: Tensor) -> None:
    """A layer whose inputs, in runs as long as the rotation, come rotated: x' = x Q."""
    old = layer.weight
    runs = old.double().reshape(old.shape[0], -1, len(rotation)) @ rotation.to(old.device)
    put(layer, "weight", runs.reshape(old.shape).to(old.dtype))


def rotate_outputs(layer: nn.Linear, rotation: Tensor, part: slice = slice(None)) -> None:
    """Rotate these outputs of a layer, in runs as long as the rotation: y' = y Q."""
    for key in ("weight", "bias"):
        if isinstance(old := getattr(layer, key), Tensor):
            new, turn = old.clone(), rotation.T.to(old.device)
            runs = turn @ old[part].double().reshape(-1, len(rotation), old[0].numel())
            new[part] = runs.reshape(old[part].shape).to(old.dtype)
            put(layer, key, new)


def put(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Give a module a new parameter."""
    setattr(module, key, nn.Parameter(tensor, requires_grad=False))
