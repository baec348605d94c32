"""How much the loss of the model feels a change in a layer's output: the empirical Fisher.

To second order a change d of the output of a layer at one token adds (g . d)^2 / 2 to the loss,
with g the gradient of the summed loss there; if d has no preferred direction, |g|^2 |d|^2 / (2 R)
for R outputs (the output factor of K-FAC, arXiv:1503.05671, reduced to its trace). With it errors
of different layers can be added up, which an allocation under one budget needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.flow import call, start
from optpipe.stage import Progress

SAMPLES = 8
"""Samples that are looked at; one number a layer needs no more."""


def sensitivities(checkpoint: Checkpoint, ids_ST: Tensor, progress: Progress) -> dict[str, float]:
    """|g|^2 / (2 R) of every layer in the blocks, the mean over tokens.

    With one block in memory at a time: the hidden states between blocks are kept, each block is run
    again on its way back.
    """
    device, blocks = fastest(), checkpoint.decoder.blocks
    lm = model.skeleton(checkpoint)
    with torch.no_grad():
        flow = start(lm, blocks, ids_ST[:SAMPLES]).to(device)
        between = [flow.hidden]
        for index, block in enumerate(blocks):
            progress(f"{block.name} forward", index, 2 * len(blocks))
            module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
            between.append([call(module, flow, index, hidden) for hidden in between[-1]])
            model.drop(lm, block.name)
    gradients = [
        _end(lm, checkpoint, hidden, ids_T)
        for hidden, ids_T in zip(between.pop(), ids_ST, strict=False)
    ]
    lm = model.skeleton(checkpoint)  # a block that was dropped cannot be filled again
    found: dict[str, float] = {}
    for index, block in reversed([*enumerate(blocks)]):
        progress(f"{block.name} backward", 2 * len(blocks) - index, 2 * len(blocks))
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        for name, layer in model.block_linears(lm, block):
            found[name] = 0.0
            layer.register_forward_hook(_collect(found, name))
        for sample, hidden in enumerate(between.pop()):
            hidden.requires_grad_()
            call(module, flow, index, hidden).backward(gradients[sample])
            assert hidden.grad is not None
            gradients[sample] = hidden.grad
        model.drop(lm, block.name)
    tokens = ids_ST[:SAMPLES].numel()
    return {name: value / tokens for name, value in found.items()}


def _end(lm: nn.Module, checkpoint: Checkpoint, hidden: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of the summed loss of the next tokens by the last hidden states."""
    decoder = checkpoint.decoder
    hidden = hidden.detach().cpu().requires_grad_()
    logits = lm.get_submodule(decoder.head)(lm.get_submodule(decoder.final_norm)(hidden))
    if decoder.logit_softcap:
        logits = decoder.logit_softcap * torch.tanh(logits / decoder.logit_softcap)
    functional.cross_entropy(logits[0, :-1], ids_T[1:], reduction="sum").backward()
    assert hidden.grad is not None
    return hidden.grad.to(fastest())


def _collect(found: dict[str, float], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            found[name] += float(gradient.square().sum()) / (2 * gradient.shape[-1])

        output.register_hook(add)

    return hook
