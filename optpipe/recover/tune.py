"""What training may change in a compressed block, and what it must leave as it is.

Dense weights, factors, biases and norms are free. A pruned weight stays zero: after every step the
weight is multiplied with its mask. Of a quantized layer only the scales and the bias move, so that
every weight stays on the grid of its codes (as the scales in EfficientQAT, arXiv:2407.11062).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.family import Block
from optpipe.linear import Layers, Quantized, mask_of

HALF = torch.finfo(torch.float16)
LEAST_RMS = 1e-2
"""What is nearly zero, such as a new bias, moves as if it were of this size."""
WARM_UP = 0.1


class Tuning:
    """The tensors of some blocks that training may change, and the way back to what is stored."""

    def __init__(self, lm: PreTrainedModel, blocks: list[Block], checkpoint: Checkpoint) -> None:
        self._quantized: list[Quantized] = []
        self._masked: list[tuple[Tensor, Tensor]] = []
        self._stored: list[tuple[Tensor, torch.dtype]] = []
        for block in blocks:
            self._add_block(lm, block, checkpoint)

    def _add_block(self, lm: PreTrainedModel, block: Block, checkpoint: Checkpoint) -> None:
        module, inside = lm.get_submodule(block.name), set()
        for name, layer in model.block_linears(lm, block):
            dtype = checkpoint.layer_dtype(name)
            if isinstance(layer, Quantized):
                layer.scales = layer.scales.float()
                self._quantized.append(layer)
            else:
                assert isinstance(layer, nn.Linear)
                self._stored.append((layer.weight, dtype))
                if (mask := mask_of(layer)) is not None:
                    self._masked.append((layer.weight, mask))
            if isinstance(layer.bias, Tensor):
                self._stored.append((layer.bias, dtype))
            inside |= {id(parameter) for parameter in layer.parameters()}
        for name, parameter in module.named_parameters(prefix=block.name):
            if id(parameter) not in inside:
                self._stored.append((parameter, checkpoint.floating(name)))

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._stored] + [q.scales for q in self._quantized]

    def optimizer(self, rate: float) -> torch.optim.Adam:
        """Adam; ``rate`` is in units of the root mean square of each tensor."""
        groups = []
        for tensor in self.tensors():
            tensor.requires_grad_(True)
            size = max(float(tensor.detach().square().mean().sqrt()), LEAST_RMS)
            groups.append({"params": [tensor], "lr": rate * size})
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    @torch.no_grad()
    def project(self) -> None:
        """Back to what the forms of the layers allow; after every step."""
        for weight, mask in self._masked:
            weight *= mask
        for layer in self._quantized:  # runtimes want scales above zero
            layer.scales.clamp_(HALF.smallest_normal, HALF.max)

    @torch.no_grad()
    def settle(self) -> None:
        """Round to what is stored, and stop asking for gradients."""
        for tensor, dtype in self._stored:
            tensor.requires_grad_(False)
            tensor.grad = None
            tensor.copy_(tensor.to(dtype))
        for layer in self._quantized:
            layer.scales = layer.scales.detach().half()

    def state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        for tensor, old in zip(self.tensors(), state, strict=True):
            tensor.copy_(old)


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate at a step: a short rise, then half a cosine down to zero."""
    rise = max(round(WARM_UP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def batches(samples: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Sample numbers of each step; all come equally often, in an order that is never the same."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batch:
            waiting += torch.randperm(samples, generator=generator).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield chosen


def check_training(tokens: int, rate: float, batch: int) -> None:
    """Raise ValueError for a budget, a rate or a batch that cannot be."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be above 0 and below 1, got {rate}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def check_tunable(layers: Layers) -> None:
    """Raise ValueError for a layer that rounds its inputs: no gradient comes through rounding."""
    for name, form in layers.items():
        if form.inputs is not None:
            raise ValueError(
                f"layer '{name}' rounds its inputs ({form.inputs}), through which no gradient "
                "comes; recover before that"
            )
