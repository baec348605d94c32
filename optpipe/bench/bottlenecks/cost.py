"""Bytes and FLOPs of one prefill and of one decode step, counted from the artifact and its runner.

What is counted is what is executed: dense zeros are read and multiplied, a low-rank layer is its
two factors, torch makes floats of integer codes at every call, and a static cache is read whole
where a graph masks it. With B rows, S tokens of a call, L tokens seen, w the window of a layer and
k = 2 * KV heads * head size * bytes of an element:

    decode   bytes  weights + B * sum over layers of (min(L, w) + 1) * k + activations
             FLOPs  B * (2 * weights + sum over layers of 4 * heads * head size * min(L, w))
    prefill  bytes  weights + B * S * layers * k + activations
             FLOPs  B * (2 * weights * S + the same sum over every query), half of S^2 if causal

The output projection counts for positions whose logits are wanted, tied weights once, embeddings
by their rows. Activations are what the products read and write; what else a runner does with them,
such as norms, is left out, so that the sum is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optpipe.bench.scenario import Cell

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
PARTS = ("weights", "kv", "activations", "scratch")


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product of a model: R outputs, C inputs."""

    rows: int
    cols: int
    bytes: float
    """Of its weight as the runner holds it, scales and zero points included."""
    dtype: str
    """What is multiplied: 'float32', 'float16', 'bfloat16' or 'int8'."""
    scratch: float = 0.0
    """Bytes that every call moves through temporaries to make floats of the codes."""
    head: bool = False
    """Whether it runs only where logits are wanted."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes moved, and the size of the memory they keep coming from."""

    bytes: float = 0.0
    working_set: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """One step: a whole prefill, or one decode step at the mean depth of a cell."""

    traffic: Mapping[str, Traffic]
    """By PARTS."""
    flops: Mapping[str, float]
    """By the dtype that is multiplied."""
    attention_flops: float
    """Those of ``flops`` that grow with the tokens seen."""
    weights: float
    """Weights that are multiplied, in elements."""
    kv_item: int
    """Bytes of an element of the KV cache."""
    kv_in_place: float
    """Bytes of the KV cache that such a step has to move: in place, up to what is filled."""

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.traffic.values())

    @property
    def all_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True, kw_only=True)
class PhaseCosts:
    """What one iteration of a cell costs one artifact."""

    prefill: PhaseCost
    decode: PhaseCost | None
    """None where the prompt is followed by one token only: there is no decode step."""
    capacity: int
    """Tokens that a row of its KV cache holds."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An artifact as its runner executes it."""

    products: tuple[Product, ...]
    vector_bytes: float
    """Norms and biases."""
    hidden: int
    tables: int
    """Embedding tables that each token reads a row of."""
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """Of each layer, in tokens; None: it sees all."""
    dtype: str
    """Of activations and attention."""
    capacity: int
    cache: str
    """How a step treats the cache: 'in place', 'concatenated' anew (torch's DynamicCache), or read
    'whole', up to its capacity (canonical graphs, which mask what is not there)."""

    kv_dtype: str | None = None
    """Of what the cache holds; None: that of activations."""

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def kv_item(self) -> int:
        return ITEM_BYTES[self.kv_dtype or self.dtype]

    def step(self, batch: int, tokens: int, depth: float) -> PhaseCost:
        """``tokens`` a row, one of them with logits, on top of ``depth`` tokens in the cache."""
        fed = batch * tokens
        flops: dict[str, float] = {}
        for p in self.products:
            count = batch if p.head else fed
            flops[p.dtype] = flops.get(p.dtype, 0.0) + 2.0 * count * p.rows * p.cols
        pairs = sum(self._pairs(window, tokens, depth) for window in self.windows)
        attention = 4.0 * batch * self.heads * self.head_dim * pairs
        flops[self.dtype] = flops.get(self.dtype, 0.0) + attention
        return PhaseCost(
            traffic=self._traffic(batch, tokens, depth),
            flops=flops,
            attention_flops=attention,
            weights=sum(p.rows * p.cols for p in self.products),
            kv_item=self.kv_item,
            kv_in_place=batch * self._kappa * sum(in_place(w, tokens, depth) for w in self.windows),
        )

    @property
    def _kappa(self) -> int:
        """Bytes of a token in the cache of one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_item

    def _traffic(self, batch: int, tokens: int, depth: float) -> dict[str, Traffic]:
        streamed = sum(p.bytes for p in self.products) + self.vector_bytes
        rows = batch * tokens * self.tables * self.hidden * self.item
        kappa = self._kappa
        kv = batch * kappa * sum(self._kv_tokens(w, tokens, depth) for w in self.windows)
        widths = [(p.rows + p.cols) * (batch if p.head else batch * tokens) for p in self.products]
        scratch = [p.scratch for p in self.products]
        held = streamed + batch * kappa * sum(self._held(w, tokens, depth) for w in self.windows)
        return {
            "weights": Traffic(bytes=streamed + rows, working_set=held),
            "kv": Traffic(bytes=kv, working_set=held),
            "activations": Traffic(
                bytes=self.item * sum(widths), working_set=self.item * max(widths)
            ),
            # of the six passes over a temporary, two temporaries are alive at a time
            "scratch": Traffic(bytes=sum(scratch), working_set=max(scratch) / 3),
        }

    def _held(self, window: int | None, tokens: int, depth: float) -> float:
        """Tokens of the cache that a layer keeps coming back to."""
        return self.capacity if self.cache == "whole" else _seen(depth + tokens, window)

    def _kv_tokens(self, window: int | None, tokens: int, depth: float) -> float:
        """Keys and values that one row moves in one layer, in tokens."""
        if self.cache == "whole":
            return self.capacity + tokens
        moved = in_place(window, tokens, depth)
        if self.cache == "concatenated":
            moved += 2 * (_seen(depth + 1, window) - 1 if depth else 0.0)
        return moved

    def _pairs(self, window: int | None, tokens: int, depth: float) -> float:
        """Query-key pairs that one head of one row multiplies."""
        if self.cache == "whole":
            return float(tokens) * self.capacity
        return causal_pairs(tokens, depth, window)


def cell_costs(model: Model, cell: Cell) -> PhaseCosts:
    """A decode step is taken at the mean depth of the steps of the cell."""
    depth = cell.prompt_tokens + (cell.new_tokens - 2) / 2  # tokens in the cache before the step
    return PhaseCosts(
        prefill=model.step(cell.batch, cell.prompt_tokens, 0),
        decode=model.step(cell.batch, 1, depth) if cell.new_tokens > 1 else None,
        capacity=model.capacity,
    )


def in_place(window: int | None, tokens: int, depth: float) -> float:
    """Tokens of the cache that one row has to move in one layer: new ones written, seen ones read;
    of a prompt attention reads what was just made."""
    return tokens + (_seen(depth + tokens, window) if depth else 0.0)


def causal_pairs(tokens: int, depth: float, window: int | None) -> float:
    """Sum over queries i of min(depth + i, window), i = 1 .. tokens."""
    if window is None or depth + tokens <= window:
        return tokens * depth + tokens * (tokens + 1) / 2
    ramp = int(max(0, window - depth))
    return ramp * depth + ramp * (ramp + 1) / 2 + (tokens - ramp) * window


def _seen(tokens: float, window: int | None) -> float:
    return tokens if window is None else min(tokens, window)
