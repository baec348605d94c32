"""A model rewritten layer by layer, with one decoder block in memory at a time.

A method that looks at data sees, for each layer, the inputs that the model gives it once all blocks
before are compressed (the sequential scheme of SparseGPT, arXiv:2301.00774, and GPTQ,
arXiv:2210.17323); the layers of one block are all observed before the first of them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.calibrate import Observation, Statistic
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.family import HEAD, Block
from optpipe.linear import Form, Layers, LowRank, Quantized, encode, mask_of
from optpipe.stage import Progress

Change = Callable[[str, nn.Module, Any], nn.Module]
"""(layer name, layer, statistic of its inputs or None) -> what takes its place."""


@dataclass
class _Flow:
    """Hidden states of all samples on their way through the blocks."""

    hidden: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """What the model hands each block besides the hidden state: masks and rotations."""

    def to(self, device: torch.device) -> _Flow:
        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return _Flow(tree_map(moved, self.hidden), tree_map(moved, self.calls))


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
    flow = _start(lm, blocks, observation.ids_ST).to(device) if observation else None
    total = len(model.layers(checkpoint))
    done = 0
    for index, block in enumerate(blocks):
        progress(block.name, done, total)
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        seen = _observe(lm, block, index, flow, observation) if flow and observation else {}
        for name, layer in list(model.block_linears(lm, block)):
            progress(name, done, total)
            lm.set_submodule(name, change(name, layer, seen.pop(name, None)))
            done += 1
        if flow:
            _advance(module, flow, index)
        module.to("cpu")
        writer.add(block.name, _block_tensors(lm, block, checkpoint, planned))
        model.drop(lm, block.name)
    _write_head(lm, checkpoint, writer, planned, _head_change(lm, change, flow, observation))
    writer.close(planned)


@torch.no_grad()
def final_logits(checkpoint: Checkpoint, ids_T: Tensor) -> Tensor:
    """Logits after the last of these tokens, (V), with one block of the model in memory.

    A soft cap on them is left out.
    """
    device, decoder = fastest(), checkpoint.decoder
    lm = model.skeleton(checkpoint)
    flow = _start(lm, decoder.blocks, ids_T[None]).to(device)
    for index, block in enumerate(decoder.blocks):
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        _advance(module, flow, index)
        model.drop(lm, block.name)
    last = flow.hidden[0][:, -1].cpu()
    logits: Tensor = lm.get_submodule(decoder.head)(lm.get_submodule(decoder.final_norm)(last))
    return logits[0]


def _start(lm: PreTrainedModel, blocks: tuple[Block, ...], ids_ST: Tensor) -> _Flow:
    """The input of the first block for each sample, and the other arguments of every block.

    The blocks, still without weights, are made to note what they are called with.
    """
    flow = _Flow([], [])
    modules = [lm.get_submodule(block.name) for block in blocks]

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                flow.hidden.append(hidden)
            if len(flow.calls) == index:  # the same for every sample: they are equally long
                flow.calls.append((args, kwargs))
            return hidden

        return record

    for index, module in enumerate(modules):
        module.forward = recorder(index)
    for ids_T in ids_ST:
        lm.base_model(ids_T[None], use_cache=False)
    for module in modules:
        del module.forward
    return flow


def _call(module: nn.Module, flow: _Flow, index: int, hidden: Tensor) -> Tensor:
    args, kwargs = flow.calls[index]
    result = module(hidden, *args, **kwargs)
    assert isinstance(result, Tensor), type(result)
    return result


def _advance(module: nn.Module, flow: _Flow, index: int) -> None:
    """Send all samples through a block, in place: two sets of hidden states never coexist."""
    for sample, hidden in enumerate(flow.hidden):
        flow.hidden[sample] = _call(module, flow, index, hidden)


def _observe(
    lm: PreTrainedModel, block: Block, index: int, flow: _Flow, observation: Observation
) -> dict[str, Statistic]:
    """Run the block on every sample and collect what its wanted layers are fed."""
    seen: dict[str, Statistic] = {}
    hooks = []
    for name, layer in model.block_linears(lm, block):
        if name in observation.wanted:
            seen[name] = observation.statistic(_inputs(layer))
            hooks.append(layer.register_forward_pre_hook(_feed(seen[name])))
    if hooks:
        for hidden in flow.hidden:
            _call(lm.get_submodule(block.name), flow, index, hidden)
    for hook in hooks:
        hook.remove()
    return seen


def _feed(statistic: Statistic) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(_: nn.Module, args: tuple[Tensor]) -> None:  # what a hook returns becomes the input
        statistic.add(args[0].reshape(-1, args[0].shape[-1]))

    return hook


def _inputs(layer: nn.Module) -> int:
    if isinstance(layer, Quantized):
        return layer.form.cols
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _head_change(
    lm: PreTrainedModel, change: Change, flow: _Flow | None, observation: Observation | None
) -> Callable[[str, str], nn.Module]:
    """Changes the head, whose inputs are the final hidden states after their norm."""

    device = fastest()

    def changed(head: str, norm: str) -> nn.Module:
        layer, statistic = lm.get_submodule(head).to(device), None
        if flow and observation and head in observation.wanted:
            statistic = observation.statistic(_inputs(layer))
            for hidden in flow.hidden:
                normed = lm.get_submodule(norm).to(device)(hidden)
                statistic.add(normed.reshape(-1, normed.shape[-1]))
        return change(head, layer, statistic).to("cpu")

    return changed


def _write_head(
    lm: PreTrainedModel,
    checkpoint: Checkpoint,
    writer: Writer,
    planned: Layers,
    changed: Callable[[str, str], nn.Module],
) -> None:
    """Store the head, if it has a weight of its own, and all that is neither head nor block."""
    decoder = checkpoint.decoder
    head = changed(decoder.head, decoder.final_norm)
    if not (decoder.tied and planned[decoder.head].bits is None):
        writer.add(decoder.head, _stored(decoder.head, head, planned[decoder.head], checkpoint))
    elsewhere = (f"{decoder.head}.", *(f"{block.name}." for block in decoder.blocks))
    rest = [name for name, _ in lm.named_parameters() if not name.startswith(elsewhere)]
    writer.add("rest", {name: _tensor(checkpoint, name) for name in rest})


def _block_tensors(
    lm: PreTrainedModel, block: Block, checkpoint: Checkpoint, planned: Layers
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in model.block_linears(lm, block):
        tensors |= _stored(name, layer, planned[name], checkpoint)
    layers = tuple(f"{name}." for name in block.linears)
    # of its parameters alone: old files hold buffers, such as the causal masks of GPT-2
    for name, _ in lm.get_submodule(block.name).named_parameters(prefix=block.name):
        if not name.startswith(layers):
            tensors[name] = _tensor(checkpoint, name)
    return tensors


def _stored(name: str, layer: nn.Module, form: Form, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a layer, which must have become what was planned."""
    assert not isinstance(layer, LowRank), name
    if isinstance(layer, Quantized):
        assert layer.form == form, (name, layer.form, form)
    else:
        assert form.bits is None and layer.weight.shape == (form.rows, form.cols), (name, form)
    assert (mask_of(layer) is not None) == (form.pattern is not None), (name, form)
    return encode(name, layer, form, checkpoint.layer_dtype(name))


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.get(name)
    assert tensor is not None, name
    return tensor
