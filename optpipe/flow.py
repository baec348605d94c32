"""Hidden states on their way through the decoder blocks of a model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from optpipe import model
from optpipe.calibrate import Cross, Observation, Statistic
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.family import Block, Decoder
from optpipe.linear import Quantized


@dataclass
class Flow:
    """Hidden states of all samples on their way through the blocks."""

    hidden: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """What the model hands each block besides the hidden state: masks and rotations."""
    before: list[Tensor] = field(default_factory=list)
    """Hidden states of the model as it was, for statistics that compare; else empty."""

    def to(self, device: torch.device) -> Flow:
        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        parts = self.hidden, self.calls, self.before
        return Flow(*(tree_map(moved, part) for part in parts))


def start(lm: PreTrainedModel, blocks: tuple[Block, ...], ids_ST: Tensor) -> Flow:
    """The input of the first block for each sample, and the other arguments of every block.

    The blocks, still without weights, are made to note what they are called with.
    """
    flow = Flow([], [])
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


def call(module: nn.Module, flow: Flow, index: int, hidden: Tensor) -> Tensor:
    args, kwargs = flow.calls[index]
    result = module(hidden, *args, **kwargs)
    assert isinstance(result, Tensor), type(result)
    return result


def advance(module: nn.Module, flow: Flow, index: int) -> None:
    """Send all samples through a block, in place: two sets of hidden states never coexist."""
    for sample, hidden in enumerate(flow.hidden):
        flow.hidden[sample] = call(module, flow, index, hidden)


def ending(lm: PreTrainedModel, decoder: Decoder) -> nn.ModuleList:
    """What makes logits of hidden states: the last norm and the head."""
    return nn.ModuleList(lm.get_submodule(name) for name in (decoder.final_norm, decoder.head))


def logits(lm: PreTrainedModel, decoder: Decoder, hidden: Tensor) -> Tensor:
    """What a model says, (.., V), given the hidden states behind its last block, (.., H)."""
    normed = lm.get_submodule(decoder.final_norm)(hidden)
    found: Tensor = lm.get_submodule(decoder.head)(normed)
    cap = decoder.logit_softcap
    return cap * torch.tanh(found / cap) if cap else found


def next_token_loss(
    lm: PreTrainedModel, decoder: Decoder, hidden: list[Tensor], ids_ST: Tensor
) -> float:
    """The mean over all samples and tokens, nats, from the hidden states behind the last block."""
    ending(lm, decoder).to(hidden[0].device)
    losses = []
    for state, ids_T in zip(hidden, ids_ST, strict=True):
        logits_TV = logits(lm, decoder, state)[0, :-1]
        losses.append(functional.cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device)).double())
    return float(torch.stack(losses).mean())


def observe(
    lm: PreTrainedModel, block: Block, index: int, flow: Flow, observation: Observation
) -> dict[str, Statistic]:
    """Run the block on every sample and collect what its wanted layers are fed."""
    if observation.statistic is Cross:
        return _compare(lm, block, index, flow, observation)
    seen: dict[str, Statistic] = {}
    hooks = []
    for name, layer in model.block_linears(lm, block):
        if name in observation.wanted:
            seen[name] = observation.statistic(inputs(layer))
            hooks.append(layer.register_forward_pre_hook(_feed(seen[name])))
    if hooks:
        for hidden in flow.hidden:
            call(lm.get_submodule(block.name), flow, index, hidden)
    for hook in hooks:
        hook.remove()
    return seen


def observe_head(
    lm: PreTrainedModel, decoder: Decoder, flow: Flow, observation: Observation
) -> Statistic:
    """What the head is fed: the hidden states behind the last block, after their norm."""
    head, norm = lm.get_submodule(decoder.head), lm.get_submodule(decoder.final_norm)
    statistic = observation.statistic(inputs(head))
    for hidden in flow.hidden:
        normed = norm.to(hidden.device)(hidden)
        statistic.add(normed.reshape(-1, normed.shape[-1]))
    return statistic


@torch.no_grad()
def observed(
    checkpoint: Checkpoint, observation: Observation
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every wanted layer of a model as it is, with the statistic of its inputs, block by block."""
    device, decoder = fastest(), checkpoint.decoder
    lm = model.skeleton(checkpoint)
    flow = start(lm, decoder.blocks, observation.ids_ST).to(device)
    for index, block in enumerate(decoder.blocks):
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        seen = observe(lm, block, index, flow, observation)
        for name, layer in model.block_linears(lm, block):
            if name in seen:
                yield name, layer, seen.pop(name)
        advance(module, flow, index)
        model.drop(lm, block.name)
    if decoder.head in observation.wanted:
        statistic = observe_head(lm, decoder, flow, observation)
        yield decoder.head, lm.get_submodule(decoder.head).to(device), statistic


def _compare(
    lm: PreTrainedModel, block: Block, index: int, flow: Flow, observation: Observation
) -> dict[str, Statistic]:
    """What layers are fed beside what they are fed in the model as it was, sample by sample."""
    layers = {n: m for n, m in model.block_linears(lm, block) if n in observation.wanted}
    seen = {name: Cross(inputs(layer)) for name, layer in layers.items()}
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            caught[name] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    hooks = [layer.register_forward_pre_hook(catch(name)) for name, layer in layers.items()]
    module = lm.get_submodule(block.name)
    flow.before = flow.before or list(flow.hidden)  # the first block is fed the same in both
    for sample, hidden in enumerate(flow.before):
        call(module, flow, index, flow.hidden[sample])
        now = dict(caught)
        flow.before[sample] = call(module, flow, index, hidden)
        for name, statistic in seen.items():
            statistic.pair(now[name], caught[name])
    for added in hooks:
        added.remove()
    return dict(seen)


def _feed(statistic: Statistic) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(_: nn.Module, args: tuple[Tensor]) -> None:  # what a hook returns becomes the input
        statistic.add(args[0].reshape(-1, args[0].shape[-1]))

    return hook


def inputs(layer: nn.Module) -> int:
    if isinstance(layer, Quantized):
        return layer.form.cols
    assert isinstance(layer, nn.Linear)
    return layer.in_features
