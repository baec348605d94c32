"""A KV cache whose tensors stay where they are, for steps that are CUDA graphs.

Keys and values lie in rings, the one of position p in slot p modulo the slots; a mask hides slots
that are empty, padding or beyond the window. A ring has room for the tokens of a request rounded up
(`room`), so that few graphs serve all of its steps.

Shapes: B rows, S new tokens, W slots, K keys, D head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

UNIT = 128
"""Room comes in steps of so many tokens, or of an eighth of the power of two below them."""
Pass = dict[str, Any]
"""Arguments of a model beside tokens and cache."""


def room(tokens: int) -> int:
    """Slots for so many tokens.

    >>> [room(tokens) for tokens in (1, 129, 1025, 2049, 4096, 4097)]
    [128, 256, 1152, 2304, 4096, 4608]
    """
    unit = max(UNIT, 1 << max((tokens - 1).bit_length() - 4, 0))
    return -(-tokens // unit) * unit


class Ring(CacheLayerMixin):
    """The last keys and values of one layer, as transformers' models ask for them."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.slots, self.depth = window, 0, 0
        self.is_sliding = window is not None
        self.at_1: Tensor | None = None
        """Position of the token of a step, on the device; None: a pass of S tokens at ``depth``."""
        self._stored: tuple[Tensor, Tensor] | None = None

    def resize(self, tokens: int) -> bool:
        """Make room for so many tokens; whether that moved what is stored."""
        self.slots = tokens if self.window is None else min(tokens, self.window)
        if self._stored is None or (had := self._stored[0].shape[2]) >= self.slots:
            self._view()
            return False
        rows, heads, _, _ = self._stored[0].shape
        larger = [s.new_zeros(rows, heads, self.slots, s.shape[3]) for s in self._stored]
        for old, new in zip(self._stored, larger, strict=True):
            new[:, :, :had] = old
        self._stored = larger[0], larger[1]
        self._view()
        return True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads = key_states.shape[:2]
        key, value = (
            s.new_zeros(rows, heads, self.slots, s.shape[3]) for s in (key_states, value_states)
        )
        self._stored, self.is_initialized = (key, value), True
        self._view()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, S, D); those that the S tokens may see, old ones first."""
        if self._stored is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.at_1 is not None:
            slot_1 = self.at_1 % self.slots
            self.keys.index_copy_(2, slot_1, key_states)
            self.values.index_copy_(2, slot_1, value_states)
            return self.keys, self.values
        seen = key_states, value_states
        if self.depth:
            seen = torch.cat((self.keys, seen[0]), 2), torch.cat((self.values, seen[1]), 2)
        new = key_states.shape[2]
        skip = max(new - self.slots, 0)  # they would be overwritten at once
        places = torch.arange(self.depth + skip, self.depth + new, device=key_states.device)
        self.keys.index_copy_(2, places % self.slots, key_states[:, :, skip:])
        self.values.index_copy_(2, places % self.slots, value_states[:, :, skip:])
        self.depth += new
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert not self.depth, "only an empty cache leaves the mask to transformers"
        return query_length, 0

    def get_seq_length(self) -> int:
        return self.depth

    def get_max_length(self) -> int:
        return -1  # it grows

    def positions(self, last: int | Tensor, device: torch.device) -> Tensor:
        """(W) the position in each slot where ``last`` is the last one stored; negative: empty."""
        slots_W = torch.arange(self.slots, device=device)
        return last - (last - slots_W) % self.slots

    def _view(self) -> None:
        if self._stored is not None:
            self.keys, self.values = (s[:, :, : self.slots] for s in self._stored)


class Rings(Cache):
    """The KV cache of a model; ``windows``: of each layer, None where it sees all tokens."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        assert len({*windows} - {None}) <= 1, "transformers' models have one mask for all windows"
        self.rings = [Ring(window) for window in windows]
        super().__init__(layers=list(self.rings))

    @property
    def depth(self) -> int:
        return self.rings[0].depth

    def empty(self, tokens: int) -> bool:
        """Forget all tokens, make room for so many; whether that moved anything."""
        for ring in self.rings:
            ring.depth = 0
        return self.resize(tokens)

    def resize(self, tokens: int) -> bool:
        return any([ring.resize(room(tokens)) for ring in self.rings])  # all of them

    def sees(self, pad_B: Tensor, new: int, dtype: torch.dtype) -> Pass:
        """Masks and positions of S more tokens of a filled cache, as arguments of the model."""
        query_S = torch.arange(self.depth, self.depth + new, device=pad_B.device)

        def keys(ring: Ring) -> Tensor:
            return torch.cat((ring.positions(self.depth - 1, pad_B.device), query_S))

        return self._pass(keys, query_S, pad_B, dtype)

    def steps(self, pad_B: Tensor, at_1: Tensor, dtype: torch.dtype) -> Pass:
        """The same of a step of one token, whose position only the device knows."""
        return self._pass(lambda ring: ring.positions(at_1, pad_B.device), at_1, pad_B, dtype)

    def _pass(
        self, keys: Callable[[Ring], Tensor], query_S: Tensor, pad_B: Tensor, dtype: torch.dtype
    ) -> Pass:
        masks = {
            "full_attention" if ring.window is None else "sliding_attention": _mask(
                keys(ring), query_S, pad_B, ring.window, dtype
            )
            for ring in {ring.window: ring for ring in self.rings}.values()
        }
        only = next(iter(masks.values())) if len(masks) == 1 else masks
        return {"attention_mask": only, "position_ids": query_S - pad_B[:, None]}


def _mask(
    key_K: Tensor, query_S: Tensor, pad_B: Tensor, window: int | None, dtype: torch.dtype
) -> Tensor:
    """(B, 1, S, K) what is added to scores, from the positions of keys and queries."""
    visible_BSK = (key_K >= pad_B[:, None, None]) & (key_K <= query_S[:, None])
    if window is not None:
        visible_BSK = visible_BSK & (key_K > query_S[:, None] - window)
    hidden = torch.finfo(dtype).min
    mask_BSK = torch.zeros(visible_BSK.shape, dtype=dtype, device=pad_B.device)
    return mask_BSK.masked_fill(~visible_BSK, hidden)[:, None]
