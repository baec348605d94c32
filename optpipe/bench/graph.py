"""Decoding in torch as one CUDA graph a step.

A graph replays the same kernels on the same addresses, so nothing in a step may depend on how many
tokens there are but values on the device: the cache lies in rings, see rings.py.

Shapes: B rows, S new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from optpipe.bench.backend import Ids
from optpipe.bench.rings import Pass, Rings

MOVING = ("dynamic", "longrope")
"""Rotary tables that transformers computes anew from the length, on the host."""


def moving(lm: PreTrainedModel) -> str | None:
    """The kind of a rotary table that no graph can replay; None: the model has none."""
    for module in lm.modules():
        kinds = getattr(module, "rope_type", None)  # of rotary modules alone
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in MOVING:
                return str(kind)
    return None


def packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """torch's fused attention; a step of one token under a mask reads every key once.

    The queries of a group, which share their keys, become the rows of one matrix, as in
    transformers 5.24; 5.17 copies keys and values for each of them instead.
    """
    rows, heads, tokens, size = query.shape
    if tokens > 1 or mask is None or heads == key.shape[1]:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, size)
    mixed = functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling")
    )
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register("packed_sdpa", packed)
AttentionMaskInterface.register("packed_sdpa", sdpa_mask)


class Steps:
    """Steps of one token of a model, one graph for each room; on a CPU, the step itself."""

    def __init__(self, lm: PreTrainedModel, cache_argument: str, cache: Rings) -> None:
        self._lm, self._argument, self.cache = lm, cache_argument, cache
        self._device, self._dtype = lm.device, lm.dtype
        self._replays: dict[tuple[int, ...], Callable[[], Tensor]] = {}
        self._rows = 0
        self.pool_bytes = 0
        """Taken by the graphs for themselves."""

    def begin(self, pad_B: Ids, tokens: int) -> None:
        """Before a prompt of so many tokens, of which ``pad_B`` in front are none."""
        if self._lm.config._attn_implementation == "sdpa":
            self._lm.set_attn_implementation("packed_sdpa")
        if len(pad_B) != self._rows:
            self._rows = len(pad_B)
            self.cache = Rings([ring.window for ring in self.cache.rings])
            self._forget()
            self._inputs = torch.zeros(2 * self._rows + 1, dtype=torch.int64, device=self._device)
            self._staged = torch.zeros_like(
                self._inputs, device="cpu", pin_memory=self._device.type == "cuda"
            )
        self._staged[self._rows : -1] = torch.from_numpy(pad_B)
        if self.cache.empty(tokens + 1):
            self._forget()

    def more(self, new: int) -> Pass:
        """Before S tokens on top of the prompt, not as a step: arguments of the model for them."""
        self.grow(new)
        pad_B = self._staged[self._rows : -1].to(self._device)
        return self.cache.sees(pad_B, new, self._dtype)

    def grow(self, new: int) -> None:
        """Make room for so many more tokens."""
        if self.cache.resize(self.cache.depth + new):
            self._forget()

    def ready(self, tokens_B: Ids) -> Callable[[], Tensor]:
        """A call that feeds these tokens and returns logits (B, 1, V), valid until the next one."""
        depth, slots = self.cache.depth, [ring.slots for ring in self.cache.rings]
        if depth >= max(slots):
            self.grow(1)
        self._staged[: self._rows] = torch.from_numpy(tokens_B)
        self._staged[-1] = depth
        self._inputs.copy_(self._staged, non_blocking=True)
        key = tuple(ring.slots for ring in self.cache.rings)
        if key not in self._replays:
            self._replays[key] = self._captured()
        replay = self._replays[key]

        def call() -> Tensor:
            logits_B1V = replay()
            for ring in self.cache.rings:
                ring.depth += 1
            return logits_B1V

        return call

    def _step(self) -> Tensor:
        rows, at_1 = self._rows, self._inputs[-1:]
        for ring in self.cache.rings:
            ring.at_1 = at_1
        given = {self._argument: self.cache, "use_cache": True, "logits_to_keep": 1}
        given |= self.cache.steps(self._inputs[rows:-1], at_1, self._dtype)
        logits_B1V: Tensor = self._lm(input_ids=self._inputs[:rows, None], **given).logits
        for ring in self.cache.rings:
            ring.at_1 = None
        return logits_B1V

    def _captured(self) -> Callable[[], Tensor]:
        """A replay of the step with the room that there is now.

        The run before it writes the token where the replay that follows writes it again.
        """
        if self._device.type != "cuda":
            return self._step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are loaded and workspaces taken outside of a graph
            self._step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_B1V = self._step()
        self.pool_bytes += max(0, torch.cuda.memory_reserved() - reserved)

        def replay() -> Tensor:
            graph.replay()
            return logits_B1V

        return replay

    def _forget(self) -> None:
        """Drop the graphs of tensors that are no longer there."""
        self._replays.clear()
        self.pool_bytes = 0
