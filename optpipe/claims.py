"""What a compressed checkpoint holds, beside what its stage claims and what its parent had."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.artifact import Stats
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError
from optpipe.linear import BLOCKS, SCALARS, Form, Layers, Quantized, mask_of, weight_of
from optpipe.prune.mask import ROW, follows


def layer_facts(
    checkpoint: Checkpoint, forms: Layers, parent: Checkpoint, trained: bool = False
) -> Stats:
    """What the files hold, layer by layer, summed up. Raises GateError for a broken promise.

    Bits are those per weight of the model as it was, so that factors count for what they replace;
    sparsity is what masks take away, not what happens to be rounded to zero. Only a stage that
    ``trained`` may move the scales of a layer that was quantized before.
    """
    weights = gone = bits = original = 0.0
    ranks: dict[str, int] = {}
    before = parent.forms or {}
    for name, form in forms.items():
        if name == checkpoint.decoder.head and checkpoint.head_is_embedding:
            continue
        module = model.part(name, forms, checkpoint)
        weight, mask = weight_of(module), mask_of(module)
        if not bool(torch.isfinite(weight).all()):
            raise GateError(f"layer '{name}' holds weights that are not finite")
        if name in before:
            _check_kept(name, module, model.part(name, before, parent), trained)
        if mask is not None:
            _check_mask(name, weight, mask, form.pattern or ROW)
        kept = 1.0 if mask is None else int(mask.sum()) / mask.numel()
        weights += weight.numel()
        gone += 0 if mask is None else int((~mask).sum())
        bits += form.stored_bits(checkpoint.layer_dtype(name).itemsize * 8, kept)
        original += form.rows * form.cols
        if name.endswith(".right"):
            layer = name.removesuffix(".right")
            ranks[layer], left = form.rows, forms[f"{layer}.left"]
            replaced = 0 if layer.endswith(".residual") else left.rows * form.cols
            original += replaced - (left.rows + form.cols) * form.rows
    return {
        "parameters": _parameters(checkpoint, forms),
        "sparsity": gone / weights,
        "bits_per_weight": bits / original,
        "ranks": ranks,
        **_bits(checkpoint, forms),
    }


def _bits(checkpoint: Checkpoint, forms: Layers) -> Stats:
    """Of the quantized layers, bits of each, and bits of storage a weight, counted in the files.

    Raises GateError unless each layer takes what its form says.
    """
    layers = {name: form for name, form in forms.items() if form.bits}
    if not layers:
        return {}
    held = dict.fromkeys(layers, 0)
    for tensor, size_bytes in checkpoint.sizes().items():
        name, _, part = tensor.rpartition(".")
        if name in layers and part != "bias":
            held[name] += 8 * size_bytes
    for name, form in layers.items():
        if held[name] != (said := form.stored_bits() + _padding(form)):
            raise GateError(f"layer '{name}' takes {held[name]} bits, its form says {said:.0f}")
    padding = sum(_padding(form) for form in layers.values())
    return {
        "layer_bits": {name: form.bits for name, form in layers.items()},
        "layer_inputs": sorted({form.inputs for form in layers.values() if form.inputs}),
        "bits_per_quantized_weight": (sum(held.values()) - padding) / _weights(layers),
    }


def _padding(form: Form) -> int:
    """Bits that end each row of codes, zeros and mask at a byte."""
    assert form.bits is not None
    zeros = 0 if form.symmetric else form.groups * form.bits
    mask = form.cols if form.pattern else 0
    return form.rows * sum(-bits % 8 for bits in (form.cols * form.bits, zeros, mask))


def _weights(layers: Layers) -> int:
    return sum(form.rows * form.cols for form in layers.values())


def _parameters(checkpoint: Checkpoint, forms: Layers) -> int:
    """Weights of the model, zeros included, each in however few bits; a tied head once."""
    tied = checkpoint.decoder.head if checkpoint.head_is_embedding else None
    found = sum(form.rows * form.cols for name, form in forms.items() if name != tied)
    for name, shape in checkpoint.shapes().items():
        owner, _, part = name.rpartition(".")
        if owner not in forms or part == "bias":
            found += math.prod(shape)
    return found


def check_claims(claimed: Stats, found: Stats) -> None:
    """Raise GateError unless the files hold what the stage says they do."""
    parameters, sparsity = claimed.get("parameters"), claimed.get("sparsity")
    if parameters not in (None, found["parameters"]):
        raise GateError(f"{parameters} parameters were claimed, {found['parameters']} are there")
    if sparsity is not None and abs(found["sparsity"] - sparsity) > 1e-6:
        raise GateError(f"a sparsity of {sparsity} was claimed, {found['sparsity']} is there")
    for name, rank in claimed.get("ranks", {}).items():
        if (there := found["ranks"].get(name)) != rank:
            raise GateError(f"rank {rank} was claimed for '{name}', {there} is there")
    _check_bits(claimed, found)


def _check_bits(claimed: Stats, found: Stats) -> None:
    layer_bits = found.get("layer_bits", {})
    for name, bits in claimed.get("layer_bits", {}).items():
        if (there := layer_bits.get(name)) != bits:
            raise GateError(f"{bits} bits were claimed for '{name}', {there} are there")
    if (bits := claimed.get("bits")) is not None and bits not in layer_bits.values():
        raise GateError(f"{bits} bits were claimed, {sorted({*layer_bits.values()})} are there")
    key = "bits_per_quantized_weight"
    stored, there = claimed.get(key), found.get(key, 0.0)
    if stored is not None and not math.isclose(stored, there, rel_tol=1e-9):
        raise GateError(f"{stored} bits a quantized weight were claimed, {there} are there")


def _check_kept(name: str, module: nn.Module, before: nn.Module, trained: bool) -> None:
    """Raise GateError unless a layer has the mask and the grid that it had before the stage."""
    mask, old = mask_of(module), mask_of(before)
    if old is not None and (mask is None or not torch.equal(mask, old)):
        raise GateError(f"layer '{name}' lost the mask it was pruned with")
    if not isinstance(before, Quantized):
        return
    free = ("scales",) if trained and before.form.number not in BLOCKS else ()
    for part in ("codes", "zeros", *SCALARS, "scales"):
        ours, theirs = getattr(module, part, None), getattr(before, part)
        if part in free or ours is theirs is None:
            continue
        if ours is None or theirs is None or not torch.equal(ours, theirs):
            raise GateError(f"layer '{name}' lost the {part} it was quantized with")


def _check_mask(name: str, weight_RC: Tensor, mask_RC: Tensor, pattern: str) -> None:
    """Raise GateError unless the mask is of its pattern and the weight is zero where it says so."""
    if bool(weight_RC[~mask_RC].any()):
        raise GateError(f"layer '{name}' has weights where its mask says there are none")
    if not follows(mask_RC, pattern):
        raise GateError(f"the mask of layer '{name}' does not follow the pattern '{pattern}'")
