"""What training may change in a compressed block, and what it must leave as it is.

Dense weights, factors, biases and norms are free. A pruned weight stays zero: after every step the
weight is multiplied with its mask. Of a quantized layer only the scales and the bias move, so that
every weight stays on the grid of its codes (as the scales in EfficientQAT, arXiv:2407.11062); of
nvfp4 and mxfp8 only the bias, since scales of 8 bits are too coarse to be trained, and where one
scale spans the layer, since others may share it.
"""

from __future__ import annotations

import math
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from optpipe import model
from optpipe.blockwise import one_scale
from optpipe.checkpoint import Checkpoint
from optpipe.family import Block
from optpipe.linear import BLOCKS, Layers, Quantized, mask_of, weight_of

HALF = torch.finfo(torch.float16)
LEAST_RMS = 1e-2
"""What is nearly zero, such as a new bias, moves as if it were of this size."""


class Adapter(nn.Module):
    """weight + mask * (B A): LoRA (arXiv:2106.09685) with the mask inside, B starting at zero."""

    def __init__(self, weight_RC: Tensor, mask_RC: Tensor | None, rank: int, seed: int) -> None:
        super().__init__()
        rows, cols = weight_RC.shape
        generator = torch.Generator().manual_seed(seed)
        # a change of B by x changes the weight by about x
        a_KC = torch.randn(rank, cols, generator=generator) / math.sqrt(rank)
        self.a_KC = nn.Parameter(a_KC.to(weight_RC.device))
        self.b_RK = nn.Parameter(torch.zeros(rows, rank, device=weight_RC.device))
        self.mask_RC: Tensor | None
        self.register_buffer("mask_RC", mask_RC)

    def forward(self, weight_RC: Tensor) -> Tensor:
        delta_RC = self.b_RK @ self.a_KC
        return weight_RC + (delta_RC if self.mask_RC is None else delta_RC * self.mask_RC)


class Tuning:
    """The tensors of a model that training may change, and the way back to what is stored.

    With a ``rank``, dense layers that are no factors are trained through an :class:`Adapter`.
    """

    def __init__(self, lm: PreTrainedModel, checkpoint: Checkpoint, rank: int = 0) -> None:
        self._lm, self._checkpoint, self._rank = lm, checkpoint, rank
        self._free: list[tuple[Tensor, float]] = []
        """What is trained, and a step of it in units of the rate."""
        self._stored: list[tuple[Tensor, torch.dtype]] = []
        self._scales: list[Tensor] = []
        self._masked: list[tuple[Tensor, Tensor]] = []
        self._adapted: list[tuple[nn.Linear, torch.dtype]] = []
        self._adam: torch.optim.Adam | None = None

    def add_block(self, block: Block) -> None:
        layers = tuple(f"{name}." for name in block.linears)
        for name, layer in model.block_linears(self._lm, block):
            self._add_layer(name, layer, self._checkpoint.layer_dtype(name))
        module = self._lm.get_submodule(block.name)
        for name, _ in module.named_parameters(prefix=block.name):
            if not name.startswith(layers):
                self.add_tensor(name)

    def add_tensor(self, name: str) -> None:
        """A norm, or whatever belongs to no layer."""
        self._add(self._lm.get_parameter(name), self._checkpoint.floating(name))

    def _add_layer(self, name: str, layer: nn.Module, dtype: torch.dtype) -> None:
        if isinstance(layer, Quantized):
            if layer.form.number not in BLOCKS and not one_scale(layer.form):
                layer.scales = layer.scales.float()
                self._scales.append(layer.scales)
                self._add(layer.scales, torch.float16)
        elif self._rank and not name.endswith((".left", ".right")):
            self._adapt(name, layer, dtype)
        else:
            weight = weight_of(layer)
            self._add(weight, dtype)
            if (mask := mask_of(layer)) is not None:
                self._masked.append((weight, mask))
        if isinstance(layer.bias, Tensor):
            self._add(layer.bias, dtype)

    def _add(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self._free.append((tensor, _size(tensor)))
        self._stored.append((tensor, dtype))

    def _adapt(self, name: str, layer: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(layer, nn.Linear)
        weight = layer.weight
        adapter = Adapter(weight, mask_of(layer), self._rank, crc32(name.encode()))
        parametrize.register_parametrization(layer, "weight", adapter)
        self._adapted.append((layer, dtype))
        self._free.append((adapter.a_KC, _size(adapter.a_KC)))
        self._free.append((adapter.b_RK, _size(weight)))

    def start(self) -> list[Tensor]:
        """Ask for gradients; returns the moments of Adam, two for each tensor."""
        groups = [{"params": [tensor.requires_grad_(True)]} for tensor, _ in self._free]
        self._adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        moments = []
        for tensor, _ in self._free:
            first, second = torch.zeros_like(tensor), torch.zeros_like(tensor)
            state = {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}
            self._adam.state[tensor] = state
            moments += [first, second]
        return moments

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """A step of Adam; ``rate`` is in units of the root mean square of each tensor."""
        assert self._adam is not None
        for group, (_, size) in zip(self._adam.param_groups, self._free, strict=True):
            group["lr"] = rate * size
        self._adam.step()
        self._adam.zero_grad()
        self._project()

    def _project(self) -> None:
        """Back to what the forms of the layers allow."""
        for weight, mask in self._masked:
            weight *= mask
        for scales in self._scales:  # runtimes want them above zero
            scales.clamp_(HALF.smallest_normal, HALF.max)

    @torch.no_grad()
    def settle(self) -> None:
        """Merge, round to what is stored, and stop asking for gradients."""
        self._adam = None
        for layer, dtype in self._adapted:
            merged = layer.weight
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            layer.weight.copy_(merged)
            self._stored.append((layer.weight, dtype))
        self._adapted.clear()
        for tensor, dtype in self._stored:
            tensor.requires_grad_(False)
            tensor.grad = None
            tensor.copy_(tensor.to(dtype))

    def state(self) -> list[Tensor]:
        """A copy of all that is stored; not while adapters are in place."""
        return [tensor.detach().clone() for tensor in self._all()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        for tensor, old in zip(self._all(), state, strict=True):
            tensor.copy_(old)

    def _all(self) -> list[Tensor]:
        assert not self._adapted
        return [tensor for tensor, _ in self._stored]


def _size(tensor: Tensor) -> float:
    return max(float(tensor.detach().square().mean().sqrt()), LEAST_RMS)


def check_tunable(layers: Layers) -> None:
    """Raise ValueError for a layer that rounds its inputs: no gradient comes through rounding."""
    for name, form in layers.items():
        if form.inputs is not None:
            raise ValueError(
                f"layer '{name}' rounds its inputs ({form.inputs}), through which no gradient "
                "comes; recover before that"
            )
