"""How much the loss of the model feels a change in a layer's output: the empirical Fisher.

To second order a change d of the output of a layer at one token adds (g . d)^2 / 2 to the loss,
with g the gradient of the summed loss there. With errors of the output that do not depend on its
gradient, tr(D H D^T G) / 2 a token for a change D of the weight, H = E[x x^T] of the inputs and
G = E[g g^T] (the factors of K-FAC, arXiv:1503.05671). With it errors of different layers can be
added up, which an allocation under one budget needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import model
from optpipe.calibrate import Gram
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.flow import call, inputs, start
from optpipe.linear import weight_of
from optpipe.stage import Progress

Felt = tuple[str, nn.Module, Gram, Gram]
"""(layer name, layer, Gram matrix of its inputs, and of the gradients of its outputs)."""


def felt(
    checkpoint: Checkpoint, ids_ST: Tensor, wanted: Collection[str], progress: Progress
) -> Iterator[Felt]:
    """Both Gram matrices of every wanted layer, from the last block to the first.

    With one block in memory at a time: the hidden states between blocks are kept, on the CPU, and
    each block is run again on its way back.
    """
    device, blocks = fastest(), checkpoint.decoder.blocks
    lm = model.skeleton(checkpoint)
    with torch.no_grad():
        flow = start(lm, blocks, ids_ST).to(device)
        between = [[hidden.cpu() for hidden in flow.hidden]]
        for index, block in enumerate(blocks):
            progress(f"{block.name} forward", index, 2 * len(blocks))
            module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
            sent = (call(module, flow, index, hidden.to(device)) for hidden in between[-1])
            between.append([hidden.cpu() for hidden in sent])
            model.drop(lm, block.name)
    gradients = [
        _end(lm, checkpoint, hidden, ids_T)
        for hidden, ids_T in zip(between.pop(), ids_ST, strict=True)
    ]
    lm = model.skeleton(checkpoint)  # a block that was dropped cannot be filled again
    for index, block in reversed([*enumerate(blocks)]):
        progress(f"{block.name} backward", 2 * len(blocks) - index, 2 * len(blocks))
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        layers = {name: m for name, m in model.block_linears(lm, block) if name in wanted}
        grams = {name: (Gram(inputs(m)), Gram(len(weight_of(m)))) for name, m in layers.items()}
        for name, layer in layers.items():
            layer.register_forward_hook(_collect(*grams[name]))
        for sample, hidden in enumerate(between.pop()):
            hidden = hidden.to(device).requires_grad_()
            call(module, flow, index, hidden).backward(gradients[sample])
            assert hidden.grad is not None
            gradients[sample] = hidden.grad
        for name, layer in layers.items():
            yield name, layer, *grams.pop(name)
        model.drop(lm, block.name)


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
