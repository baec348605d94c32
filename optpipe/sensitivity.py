"""How much the loss of the model feels a change in a layer's output: the empirical Fisher.

To second order a change d of the output of a layer at one token adds (g . d)^2 / 2 to the loss,
with g the gradient of the summed loss there. With errors of the output that do not depend on its
gradient, tr(D H D^T G) / 2 a token for a change D of the weight, H = E[x x^T] of the inputs and
G = E[g g^T] (the factors of K-FAC, arXiv:1503.05671). With it errors of different layers can be
added up, which an allocation under one budget needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import model
from optpipe.calibrate import Gram
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.flow import Flow, call, inputs, start
from optpipe.linear import weight_of
from optpipe.stage import Progress

T = TypeVar("T")
Layers = dict[str, nn.Module]
Felt = tuple[str, nn.Module, Gram, Gram]
"""(layer name, layer, Gram matrix of its inputs, and of the gradients of its outputs)."""


def felt(
    checkpoint: Checkpoint, ids_ST: Tensor, wanted: Collection[str], progress: Progress
) -> Iterator[Felt]:
    """Both Gram matrices of every wanted layer, from the last block to the first."""

    def watch(layers: Layers) -> dict[str, tuple[Gram, Gram]]:
        grams = {name: (Gram(inputs(m)), Gram(len(weight_of(m)))) for name, m in layers.items()}
        for name, layer in layers.items():
            layer.register_forward_hook(_collect(*grams[name]))
        return grams

    for layers, grams in backward(checkpoint, ids_ST, wanted, watch, progress):
        for name, layer in layers.items():
            yield name, layer, *grams.pop(name)


def backward(
    checkpoint: Checkpoint,
    ids_ST: Tensor,
    wanted: Collection[str],
    watch: Callable[[Layers], T],
    progress: Progress,
) -> Iterator[tuple[Layers, T]]:
    """The wanted layers of every block, from the last to the first, after all gradients came by.

    The loss is that of the next tokens, summed. ``watch`` is shown the layers before. With one
    block in memory at a time: the hidden states between blocks are kept, on the CPU, and each block
    is run again on its way back.
    """
    device, blocks = fastest(), checkpoint.decoder.blocks
    flow, between = _forward(checkpoint, ids_ST, progress)
    lm = model.skeleton(checkpoint)
    with torch.enable_grad():
        ends = zip(between.pop(), ids_ST, strict=True)
        gradients = [_end(lm, checkpoint, hidden, ids_T) for hidden, ids_T in ends]
    for index, block in reversed([*enumerate(blocks)]):
        progress(f"{block.name} backward", 2 * len(blocks) - index, 2 * len(blocks))
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        layers = {name: m for name, m in model.block_linears(lm, block) if name in wanted}
        seen = watch(layers)
        for sample, fed in enumerate(between.pop()):
            with torch.enable_grad():
                hidden = fed.to(device).requires_grad_()
                call(module, flow, index, hidden).backward(gradients[sample])
            assert hidden.grad is not None
            gradients[sample] = hidden.grad
        yield layers, seen
        model.drop(lm, block.name)


@torch.no_grad()
def _forward(
    checkpoint: Checkpoint, ids_ST: Tensor, progress: Progress
) -> tuple[Flow, list[list[Tensor]]]:
    """What blocks are called with, and the hidden states before each and behind the last."""
    device, blocks = fastest(), checkpoint.decoder.blocks
    lm = model.skeleton(checkpoint)  # a block that was dropped cannot be filled again
    flow = start(lm, blocks, ids_ST).to(device)
    between = [[hidden.cpu() for hidden in flow.hidden]]
    for index, block in enumerate(blocks):
        progress(f"{block.name} forward", index, 2 * len(blocks))
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        sent = (call(module, flow, index, hidden.to(device)) for hidden in between[-1])
        between.append([hidden.cpu() for hidden in sent])
        model.drop(lm, block.name)
    return flow, between


def _end(lm: nn.Module, checkpoint: Checkpoint, hidden: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of the summed loss of the next tokens by the last hidden states."""
    decoder = checkpoint.decoder
    hidden = hidden.requires_grad_()
    logits = lm.get_submodule(decoder.head)(lm.get_submodule(decoder.final_norm)(hidden))
    if decoder.logit_softcap:
        logits = decoder.logit_softcap * torch.tanh(logits / decoder.logit_softcap)
    functional.cross_entropy(logits[0, :-1], ids_T[1:], reduction="sum").backward()
    assert hidden.grad is not None
    return hidden.grad.to(fastest())


def _collect(fed: Gram, gradients: Gram) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        fed.add(args[0].detach().flatten(0, -2))
        output.register_hook(lambda gradient: gradients.add(gradient.flatten(0, -2)))

    return hook
