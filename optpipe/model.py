"""Checkpoints as running torch models, whole or one decoder block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from optpipe import kvcache
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import Block, describe
from optpipe.libc import trim
from optpipe.linear import Corrected, Form, Layers, LowRank, decode, dense


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model, ready to run; compressed layers keep their codes."""
    lm = skeleton(checkpoint, dtype)
    for block in checkpoint.decoder.blocks:
        fill(lm, block.name, checkpoint, dtype)
    return lm


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with everything in place but its decoder blocks, whose weights are on 'meta'."""
    lm = empty(checkpoint.config)
    blocks = tuple(f"{block.name}." for block in checkpoint.decoder.blocks)
    rest = [name for name, _ in lm.named_parameters() if not name.startswith(blocks)]
    for name in rest:
        if (tensor := checkpoint.get(name)) is not None:
            _set(lm, name, tensor.to(dtype))
    if checkpoint.decoder.tied:
        lm.tie_weights()
    _insert_head(lm, checkpoint, dtype)
    if checkpoint.cache is not None:
        kvcache.rounded(lm, checkpoint.decoder, checkpoint.cache)
    lm.eval()
    return lm


def empty(config: Any) -> PreTrainedModel:
    """A model of this shape whose parameters take no memory; its buffers are real."""
    # torch's fused attention knows no soft cap, and transformers before 5.24 let it drop that
    plain = {"attn_implementation": "eager"} if describe(config).attn_softcap else {}
    lm = _on_meta(config, dtype=torch.float32, **plain)
    for name, module in list(lm.named_modules()):
        if isinstance(module, Conv1D):  # GPT-2 stores (in, out); everything here is (out, in)
            lm.set_submodule(name, dense(module.weight.T, module.bias))
    return lm.requires_grad_(False)


def fill(lm: PreTrainedModel, block: str, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Give one decoder block its weights; returns the block. Lets go of what was read before."""
    checkpoint.let_go()
    trim()
    forms = checkpoint.forms or {}
    module = lm.get_submodule(block)
    for name in _linears(module, block):
        lm.set_submodule(name, layer(name, forms, checkpoint, dtype))
    for name, parameter in module.named_parameters(prefix=block):
        if parameter.device.type == "meta":
            tensor = checkpoint.get(name)
            assert tensor is not None, name
            _set(lm, name, tensor.to(dtype))
    return module


def transplant(lm: PreTrainedModel, other: PreTrainedModel, block: str) -> nn.Module:
    """Let the empty block of ``other``, whose config may differ, use the layers of ``lm``'s."""
    for name, parameter in lm.get_submodule(block).named_parameters(prefix=block):
        if (layer := name.rpartition(".")[0]) in _linears(other.get_submodule(block), block):
            other.set_submodule(layer, lm.get_submodule(layer))
        else:
            _set(other, name, parameter)
    return other.get_submodule(block)


def drop(lm: PreTrainedModel, block: str) -> None:
    """Take the memory of a block back."""
    lm.get_submodule(block).to("meta")


def layer(
    name: str, forms: Layers, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """One linear layer in its stored form, floating-point tensors as ``dtype``."""
    base = part(name, forms, checkpoint, dtype)
    if f"{name}.residual.left" not in forms:
        return base
    residual = part(f"{name}.residual", forms, checkpoint, dtype)
    assert isinstance(residual, LowRank)
    return Corrected(base, residual)


def part(
    name: str, forms: Layers, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A layer without its correction, if it has one."""
    if name == checkpoint.decoder.head and checkpoint.head_is_embedding:
        weight = checkpoint.get(f"{checkpoint.decoder.embed}.weight")
        assert weight is not None
        return dense(weight.to(dtype), None)
    if name in forms:
        return _cast(decode(name, forms[name], checkpoint.get), dtype)
    if f"{name}.left" in forms:
        sides = (part(f"{name}.{side}", forms, checkpoint, dtype) for side in ("right", "left"))
        return LowRank(*sides)
    weight, bias = checkpoint.get(f"{name}.weight"), checkpoint.get(f"{name}.bias")
    assert weight is not None, name
    if checkpoint.decoder.transposed and name != checkpoint.decoder.head:
        weight = weight.T.contiguous()
    return dense(weight.to(dtype), None if bias is None else bias.to(dtype))


def layers(checkpoint: Checkpoint) -> Layers:
    """Every linear layer of the model and its form."""
    if checkpoint.forms is not None:
        return checkpoint.forms
    return dict(_dense_layers(_known(checkpoint.config)))


@dataclass(frozen=True)
class _Config:
    """Equal where the texts are, so that what follows from a config is found once."""

    text: str
    config: Any = field(compare=False)


def _known(config: Any) -> _Config:
    return _Config(config.to_json_string(use_diff=False), config)


@lru_cache(maxsize=16)
def _dense_layers(given: _Config) -> Layers:
    lm, decoder = empty(given.config), describe(given.config)
    names = [*(name for block in decoder.blocks for name in block.linears), decoder.head]
    found: dict[str, Any] = {name: lm.get_submodule(name) for name in names}
    return {n: Form(rows=m.out_features, cols=m.in_features) for n, m in found.items()}


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise InputError unless a plain folder holds every tensor of its architecture, whole."""
    wanted, shapes = parameter_shapes(checkpoint), checkpoint.shapes()
    for name, shape in wanted.items():
        if name not in shapes:
            raise InputError(f"tensor '{name}' is missing from '{checkpoint.path}'")
        if shapes[name] != shape:
            raise InputError(f"tensor '{name}' has shape {shapes[name]}, the config says {shape}")
        checkpoint.floating(name)
    decoder = checkpoint.decoder
    embed, head = f"{decoder.embed}.weight", f"{decoder.head}.weight"
    if decoder.tied and head in shapes and not _equal(checkpoint, embed, head):
        raise InputError(
            f"the config of '{checkpoint.path}' ties '{head}' to '{embed}', but its files hold two "
            "different tensors; set tie_word_embeddings to false if both are meant"
        )


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise InputError for a weight that is infinite or no number."""
    for name in parameter_shapes(checkpoint):
        tensor = checkpoint.get(name)
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"tensor '{name}' of '{checkpoint.path}' holds NaN or infinity")


def _equal(checkpoint: Checkpoint, left: str, right: str) -> bool:
    one, other = checkpoint.get(left), checkpoint.get(right)
    return one is not None and other is not None and torch.equal(one, other)


def parameter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every tensor that a plain folder of this architecture holds, from its config alone."""
    return shapes_of(checkpoint.config)


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """As :func:`parameter_shapes`, of a config that belongs to no folder yet."""
    return dict(_shapes(_known(config)))


@lru_cache(maxsize=16)
def _shapes(given: _Config) -> dict[str, tuple[int, ...]]:
    named, decoder = _on_meta(given.config).named_parameters(), describe(given.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in named}
    if decoder.tied:
        shapes.pop(f"{decoder.head}.weight", None)
    return shapes


def block_linears(lm: PreTrainedModel, block: Block) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a block that multiply, factors of a low-rank layer each on their own."""
    for name in block.linears:
        yield from _parts(name, lm.get_submodule(name))


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, Corrected):
        yield from _parts(name, module.base)
        yield from _parts(f"{name}.residual", module.residual)
    elif isinstance(module, LowRank):
        yield f"{name}.right", module.right
        yield f"{name}.left", module.left
    else:
        yield name, module


def _linears(module: nn.Module, block: str) -> list[str]:
    return [n for n, m in module.named_modules(prefix=block) if isinstance(m, nn.Linear)]


def _insert_head(lm: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    head, forms = checkpoint.decoder.head, checkpoint.forms or {}
    if head in forms and not checkpoint.head_is_embedding:
        lm.set_submodule(head, layer(head, forms, checkpoint, dtype))


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _set(lm: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(lm.get_submodule(owner), key, nn.Parameter(tensor, requires_grad=False))


def _on_meta(config: Any, **options: Any) -> PreTrainedModel:
    """A model whose parameters take no memory, but whose buffers are real.

    ``torch.device("meta")`` would also void the buffers, such as rotary frequencies, that no
    checkpoint stores and that only the constructors of transformers know how to compute. What
    would fill the parameters is left out: on 'meta' it does nothing, and takes most of the time.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        with no_init_weights():
            lm: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **options
            )
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    lm.tie_weights()
    return lm
