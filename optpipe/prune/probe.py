"""The loss of the model as a function of each block's sparsity, measured end to end.

Where most weights go, errors of layers do not tell what the model loses. SparseGPT at 70 % costs
the bundled model +290 % of perplexity when uniform; one budget over errors of layers, as shares of
the outputs, made that +524 %, over errors times Fisher information +978 %. So the model is pruned
at the sparsity that is asked for, and one block at a time at others around it. There the losses of
blocks add up: five sparsities of each promised a loss of 2.701 nats, the model made of them had
2.699, and a perplexity of +196 %; a second round found nothing more. At 60 %, +58 % became +49 %.
That the loss of the whole model has to be looked at is what EvoPress (arXiv:2410.14649) says, which
searches by evolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model
from optpipe.allocate import Option, allocate, total
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.flow import advance, call, next_token_loss, observe, start
from optpipe.linear import dense
from optpipe.prune.mask import Prune
from optpipe.stage import Progress

SAMPLES = 16
"""Of the calibration text; so many hidden states are kept for every block and sparsity."""

Losses = Mapping[str, Mapping[float, float]]
"""Loss per token, nats, by block and by the sparsity of that block."""


@torch.no_grad()
def losses(
    method: Prune,
    checkpoint: Checkpoint,
    chosen: frozenset[str],
    others: Sequence[float],
    progress: Progress,
) -> Losses:
    """Of the model with all chosen layers at ``method.sparsity``, those of one block at another.

    In one pass: a model in which a block differs shares all before that with the others.
    """
    device, decoder = fastest(), checkpoint.decoder
    lm, observation = model.skeleton(checkpoint), method.observation(checkpoint, chosen)
    assert observation is not None
    flow = start(lm, decoder.blocks, observation.ids_ST).to(device)
    states: dict[tuple[str, float], list[Tensor]] = {}
    for index, block in enumerate(decoder.blocks):
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        seen = observe(lm, block, index, flow, observation)
        layers = {name: m for name, m in model.block_linears(lm, block) if name in seen}
        made: dict[tuple[str, float], list[Tensor]] = {}
        for share in others if layers else ():
            progress(f"{block.name} at {share:.2f}", index, len(decoder.blocks))
            _prune(lm, layers, seen, method.at(share))
            made[block.name, share] = [
                call(module, flow, index, hidden) for hidden in flow.hidden[:SAMPLES]
            ]
        _prune(lm, layers, seen, method.at(method.sparsity))
        for state in states.values():
            state[:] = [call(module, flow, index, hidden) for hidden in state]
        advance(module, flow, index)
        states |= made
        model.drop(lm, block.name)
    ids_ST = observation.ids_ST[:SAMPLES]
    here = next_token_loss(lm, decoder, flow.hidden[:SAMPLES], ids_ST)
    found: dict[str, dict[float, float]] = {}
    for (name, share), state in states.items():
        of_block = found.setdefault(name, {method.sparsity: here})
        of_block[share] = next_token_loss(lm, decoder, state, ids_ST)
    return found


def _prune(
    lm: PreTrainedModel, layers: Mapping[str, nn.Module], seen: Mapping[str, Any], method: Prune
) -> None:
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        weight, mask = method.pruned(layer.weight, seen[name])
        lm.set_submodule(name, dense(weight, layer.bias, mask))


def spread(found: Losses, sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Sparsities of blocks that drop ``sparsity`` of all weights and lose least together."""
    shares = {name: sorted(options) for name, options in found.items()}
    curves = {
        name: [Option((1 - share) * sizes[name], found[name][share]) for share in options]
        for name, options in shares.items()
    }
    whole = sum(sizes[name] for name in found)
    budget = (1 - sparsity) * whole
    taken = allocate(curves, budget * (1 + 1e-9))
    spare = (budget - total(curves, taken).cost) / whole  # blocks of several sizes leave some
    return {name: shares[name][place] - spare for name, place in taken.items()}
