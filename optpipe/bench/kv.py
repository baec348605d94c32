"""Room for sequences: what a token takes in the KV cache of an artifact, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tensor(Protocol):
    """As numpy and torch have it."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """How a runtime stores keys and values."""

    layers: tuple[tuple[int, int | None], ...]
    """(bytes of a token, most tokens of a row that it keeps; None: all) of every layer."""
    fixed: bool = False
    """Whether a row takes as much from its first token on as it ever may."""
    pool_tokens: int | None = None
    """Tokens of all rows together that were given memory at loading; None: rows take it as they
    come."""

    @classmethod
    def of(
        cls, windows: Sequence[int | None], heads: int, head_dim: int, item: int, **more: Any
    ) -> KvCache:
        """Keys and values of so many KV heads in elements of ``item`` bytes, layer by layer."""
        size = 2 * heads * head_dim * item
        return cls(layers=tuple((size, window) for window in windows), **more)

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor], rows: int | None = None) -> KvCache:
        """Of keys or values (.., heads, tokens, size) that are there whatever a row holds.

        ``rows``: how many rows they were made for; None: as many as come.
        """
        given = [(*tensor.shape[-3:], tensor.dtype.itemsize) for tensor in tensors]
        return cls(
            layers=tuple((heads * size * item, tokens) for heads, tokens, size, item in given),
            fixed=True,
            pool_tokens=None if rows is None else rows * max(tokens for _, tokens, *_ in given),
        )

    @property
    def token_bytes(self) -> int:
        """Of one token of one row, while no window is full."""
        return sum(size for size, _ in self.layers)

    def row_bytes(self, tokens: int) -> int:
        """Of a row of so many tokens."""
        return sum(size * self._kept(tokens, most) for size, most in self.layers)

    def capacity_tokens(self, room_bytes: int) -> int:
        """Tokens of all rows together, in a pool or in so much free memory."""
        pool = self.pool_tokens
        return max(room_bytes, 0) // self.token_bytes if pool is None else pool

    def sequences(self, tokens: int, room_bytes: int, most: int | None = None) -> int:
        """Rows of so many tokens at once; ``most``: what the runtime takes at most."""
        if self.pool_tokens is None:
            rows = max(room_bytes, 0) // self.row_bytes(tokens)
        else:
            rows = self.pool_tokens // max(self._kept(tokens, keeps) for _, keeps in self.layers)
        return rows if most is None else min(rows, most)

    def _kept(self, tokens: int, most: int | None) -> int:
        if most is None:
            return tokens
        return most if self.fixed else min(tokens, most)
