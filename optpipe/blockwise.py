"""A model rewritten layer by layer, with one decoder block in memory at a time.

A method that looks at data sees, for each layer, the inputs that the model gives it once all blocks
before are compressed (the sequential scheme of SparseGPT, arXiv:2301.00774, and GPTQ,
arXiv:2210.17323); the layers of one block are all observed before the first of them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.family import HEAD, Block, Decoder, joined
from optpipe.flow import Flow, advance, observe, observe_head, start
from optpipe.linear import PER_TENSOR, Form, Layers, LowRank, Quantized, encode, mask_of
from optpipe.stage import Progress

Change = Callable[[str, nn.Module, Any], nn.Module]
"""(layer name, layer, statistic of its inputs or None) -> what takes its place."""


def select(layers: Layers, targets: Iterable[str], head: bool = False) -> frozenset[str]:
    """Names in the blocks that match a pattern, and that of the output projection if ``head``.

    Raises ValueError for a pattern that matches none, and if nothing is chosen.
    """
    names = [name for name in layers if name != HEAD]
    chosen = {HEAD} if head else set()
    for pattern in targets:
        found = [name for name in names if fnmatch(name, pattern)]
        if not found:
            raise ValueError(
                f"target '{pattern}' matches none of {len(names)} layers, such as {names[0]}"
            )
        chosen.update(found)
    if not chosen:
        raise ValueError("targets is empty, so nothing would change; use '*' for every layer")
    return frozenset(chosen)


@torch.no_grad()
def rewrite(
    source: Artifact,
    out: Path,
    planned: Layers,
    change: Change,
    progress: Progress,
    observation: Observation | None = None,
) -> None:
    """Pass every layer through ``change`` and write the model in its ``planned`` forms.

    The block at work and the hidden states live on the fastest device, all else on the CPU.
    """
    checkpoint, device = Checkpoint(source.path), fastest()
    writer, lm = Writer(out, checkpoint), model.skeleton(checkpoint)
    blocks = checkpoint.decoder.blocks
    flow = start(lm, blocks, observation.ids_ST).to(device) if observation else None
    total = len(model.layers(checkpoint))
    done = 0
    for index, block in enumerate(blocks):
        progress(block.name, done, total)
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        seen = observe(lm, block, index, flow, observation) if flow and observation else {}
        if observation and observation.react:
            observation.react(lm, block, seen)
        share_ranges(lm, block, planned)
        for name, layer in list(model.block_linears(lm, block)):
            progress(name, done, total)
            if (changed := change(name, layer, seen.pop(name, None))) is not layer:
                lm.set_submodule(name, changed)  # which would also take a correction away
            done += 1
        if flow:
            advance(module, flow, index)
        module.to("cpu")
        writer.add(block.name, block_tensors(lm, block, checkpoint, planned))
        model.drop(lm, block.name)
    decoder = checkpoint.decoder
    head = _changed_head(lm, decoder, change, flow, observation)
    shared = decoder.tied and planned[decoder.head].bits is None
    write_ends(lm, checkpoint, writer, planned, None if shared else head)
    writer.close(planned)


@torch.no_grad()
def final_logits(checkpoint: Checkpoint, ids_T: Tensor) -> Tensor:
    """Logits after the last of these tokens, (V), with one block of the model in memory.

    A soft cap on them is left out.
    """
    device, decoder = fastest(), checkpoint.decoder
    lm = model.skeleton(checkpoint)
    flow = start(lm, decoder.blocks, ids_T[None]).to(device)
    for index, block in enumerate(decoder.blocks):
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        advance(module, flow, index)
        model.drop(lm, block.name)
    last = flow.hidden[0][:, -1].cpu()
    logits: Tensor = lm.get_submodule(decoder.head)(lm.get_submodule(decoder.final_norm)(last))
    return logits[0]


def _changed_head(
    lm: PreTrainedModel,
    decoder: Decoder,
    change: Change,
    flow: Flow | None,
    observation: Observation | None,
) -> nn.Module:
    statistic = None
    if flow and observation and decoder.head in observation.wanted:
        statistic = observe_head(lm, decoder, flow, observation)
    layer = lm.get_submodule(decoder.head).to(fastest())
    return change(decoder.head, layer, statistic).to("cpu")


def write_ends(
    lm: PreTrainedModel,
    checkpoint: Checkpoint,
    writer: Writer,
    planned: Layers,
    head: nn.Module | None,
) -> None:
    """Store the head, if it has a weight of its own, and all that is neither head nor block."""
    decoder = checkpoint.decoder
    if head is not None:
        writer.add(decoder.head, _stored(decoder.head, head, planned[decoder.head], checkpoint))
    elsewhere = (f"{decoder.head}.", *(f"{block.name}." for block in decoder.blocks))
    rest = [name for name, _ in lm.named_parameters() if not name.startswith(elsewhere)]
    writer.add("rest", {name: current(lm, checkpoint, name) for name in rest})


def one_scale(form: Form) -> bool:
    """Whether a scale spans all of a layer: its only one, or that others are relative to."""
    return form.number == "nvfp4" or (form.bits is not None and form.group_size == PER_TENSOR)


def share_ranges(lm: PreTrainedModel, block: Block, planned: Layers) -> None:
    """Let a scale that spans a layer span those that runtimes multiply with it as one.

    They take one such scale for all of them, so that codes by another would be rounded again.
    """
    for names in joined(n for n in block.linears if n in planned and one_scale(planned[n])):
        layers = [lm.get_submodule(name) for name in names]
        dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
        largest = [layer.weight.abs().amax() for layer in dense]
        for layer in dense:
            layer.register_buffer("largest", torch.stack(largest).amax(), persistent=False)


def largest_of(layer: nn.Module) -> Tensor | None:
    """What a scale for the whole layer spans, if that is more than its own weights."""
    largest = getattr(layer, "largest", None)
    assert largest is None or isinstance(largest, Tensor)
    return largest


def block_tensors(
    lm: PreTrainedModel, block: Block, checkpoint: Checkpoint, planned: Layers
) -> dict[str, Tensor]:
    """All that is stored of a block, as the model holds it now."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.block_linears(lm, block):
        tensors |= _stored(name, layer, planned[name], checkpoint)
    layers = tuple(f"{name}." for name in block.linears)
    # of its parameters alone: old files hold buffers, such as the causal masks of GPT-2
    for name, _ in lm.get_submodule(block.name).named_parameters(prefix=block.name):
        if not name.startswith(layers):
            tensors[name] = current(lm, checkpoint, name)
    return tensors


def like_source(
    lm: PreTrainedModel, block: Block, checkpoint: Checkpoint, planned: Layers
) -> dict[str, Tensor]:
    """As ``block_tensors``; from a folder of Hugging Face's own, in its layout."""
    tensors = block_tensors(lm, block, checkpoint, planned)
    if checkpoint.forms is None and checkpoint.decoder.transposed:
        for name in block.linears:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].T.contiguous()
    return tensors


def close_like_source(
    lm: PreTrainedModel, checkpoint: Checkpoint, writer: Writer, planned: Layers
) -> None:
    """Store what is outside the blocks and seal the model: the head has the form it had."""
    head = None if checkpoint.head_is_embedding else lm.get_submodule(checkpoint.decoder.head)
    write_ends(lm, checkpoint, writer, planned, head)
    if checkpoint.forms is None:
        writer.seal()
    else:
        writer.close(planned)


def _stored(name: str, layer: nn.Module, form: Form, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a layer, which must have become what was planned."""
    assert not isinstance(layer, LowRank), name
    if isinstance(layer, Quantized):
        assert layer.form == form, (name, layer.form, form)
    else:
        assert form.bits is None and layer.weight.shape == (form.rows, form.cols), (name, form)
    assert (mask_of(layer) is not None) == (form.pattern is not None), (name, form)
    return encode(name, layer, form, checkpoint.layer_dtype(name))


def current(lm: PreTrainedModel, checkpoint: Checkpoint, name: str) -> Tensor:
    """A norm, a bias or an embedding as the model holds it now, in the type it is stored as.

    One that nobody changed comes back bit by bit: float32 holds every stored type.
    """
    return lm.get_parameter(name).detach().to(checkpoint.floating(name))
