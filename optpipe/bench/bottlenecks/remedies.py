"""What would lift each bound, and how much: Amdahl's law on the bytes and FLOPs of a step.

A step takes its floor and a rest. A remedy changes the floor; the rest stays:

    predicted = tokens' / tokens * t / (t - floor_s + floor_s')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from optpipe.bench.bottlenecks import roofline
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import PhaseCost, Traffic

GROUP_BITS = 0.5
"""What a 16-bit scale for each 32 weights adds to each."""
WORTH = 0.95
"""A change that keeps more of what it shrinks than this is none."""
KEEP = 0.8
"""Parameters that a low-rank or structured pruning remedy keeps."""
TWO_FOUR = 0.5625
"""Bytes of 2:4 sparse 16-bit weights and their indices, of the dense ones."""
GOOD_ETA = 0.8
"""Of the roofline, what a well-made kernel reaches."""
ATTENTION_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One advice for one step."""

    name: str
    why: str
    predicted: float | None = None
    """Times faster, per token; None: ``why`` says what it does instead."""
    does: str | None = None
    """How an artifact shows that it is this remedy: 'bits 4', 'ranks', 'sparsity', 'engine'."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A step whose class is known."""

    kind: str
    cost: PhaseCost
    found: roofline.Use
    host: float | None
    ceilings: Ceilings

    def faster(self, changed: PhaseCost, tokens: float = 1.0) -> float:
        """The prediction for a step of another cost and ``tokens`` times the tokens."""
        after = self.found.seconds - self.found.floor_s + roofline.floor_s(changed, self.ceilings)
        return tokens * self.found.seconds / after


def remedies(bound: Bound) -> list[Remedy]:
    """For the class of a step, the ones that predict most first."""
    by_kind = {
        roofline.WEIGHTS: _weights,
        roofline.KV: _kv,
        roofline.COMPUTE: _compute,
        roofline.HOST: _host,
        roofline.KERNEL: _kernel,
    }
    found = by_kind[bound.kind](bound) if bound.kind in by_kind else iter(())
    return sorted(found, key=lambda remedy: -(remedy.predicted or 0.0))


def queue_remedies(ttft_s: float, queue_s: float) -> list[Remedy]:
    """``predicted`` is for TTFT, if nothing waited any more."""
    most = ttft_s / (ttft_s - queue_s)
    return [
        Remedy(name="chunked prefill", why="a long prompt no longer blocks others", predicted=most),
        Remedy(name="continuous batching", why="requests join a running batch", predicted=most),
        Remedy(
            name="prefill-decode disaggregation",
            why="prompts wait for prompts only",
            predicted=most,
        ),
    ]


def capacity_remedies() -> list[Remedy]:
    makes_room = {
        "KV cache quantization": "twice the tokens in the same memory at 8 of 16 bits",
        "paged KV cache": "no memory for tokens that are not there",
        "local-window attention": "a cache that stops growing",
        "offload": "a second, slower memory",
    }
    return [Remedy(name=name, why=why) for name, why in makes_room.items()]


def _weights(bound: Bound) -> Iterator[Remedy]:
    share = bound.cost.traffic["weights"].bytes / bound.cost.bytes
    why = f"weights are {share:.0%} of the bytes of a step"
    yield from _quantization(bound, why)
    kept = scaled(bound.cost, weights=KEEP, scratch=KEEP, flops=KEEP)
    yield Remedy(
        name=f"low-rank factors, {KEEP:.0%} of the weights",
        why=why,
        predicted=bound.faster(kept),
        does="ranks",
    )
    if _bits(bound.cost) >= 16:
        pruned = scaled(bound.cost, weights=TWO_FOUR)
        yield Remedy(
            name="2:4 pruning with a sparse kernel",
            why=why,
            predicted=bound.faster(pruned),
            does="pattern 2:4",
        )
    twice = scaled(bound.cost, kv=2, activations=2, flops=2)
    yield Remedy(name="twice the batch", why="the same weights serve more rows",
                 predicted=bound.faster(twice, tokens=2))  # fmt: skip
    yield from _distribution(bound)


def _quantization(bound: Bound, why: str) -> Iterator[Remedy]:
    now = _bits(bound.cost)
    for bits in (8, 4):
        if (factor := (bits + GROUP_BITS) / now) < WORTH:
            changed = scaled(bound.cost, weights=factor, scratch=0)
            yield Remedy(
                name=f"int{bits} weights",
                why=why,
                predicted=bound.faster(changed),
                does=f"bits {bits}",
            )


def _kv(bound: Bound) -> Iterator[Remedy]:
    share = bound.cost.traffic["kv"].bytes / bound.cost.bytes
    why = f"the KV cache is {share:.0%} of the bytes of a step"
    changes = {
        "int8 KV cache": 1 / bound.cost.kv_item,
        "KV cache read up to what is filled, or half of it evicted": 0.5,
        "local-window attention over half of the tokens": 0.5,
    }
    for name, factor in changes.items():
        if factor < WORTH:
            yield Remedy(name=name, why=why, predicted=bound.faster(scaled(bound.cost, kv=factor)))
    weights = bound.cost.traffic["weights"].bytes / bound.cost.bytes
    yield from _quantization(bound, f"weights are {weights:.0%} of the bytes of a step")
    yield from _distribution(bound)


def _compute(bound: Bound) -> Iterator[Remedy]:
    rates = bound.ceilings.flops_per_s
    slowest = min(bound.cost.flops, key=lambda dtype: rates[dtype])
    best = max(rates, key=lambda dtype: rates[dtype])
    if rates[slowest] < WORTH * rates[best]:
        changed = replace(bound.cost, flops={best: bound.cost.all_flops})
        why = f"this machine multiplies {best} {rates[best] / rates[slowest]:.1f} times as fast"
        yield Remedy(name="mixed precision", why=why, predicted=bound.faster(changed))
    kept = scaled(bound.cost, weights=KEEP, scratch=KEEP, flops=KEEP)
    yield Remedy(
        name=f"structured pruning, {KEEP:.0%} of the weights",
        why="fewer FLOPs a token",
        predicted=bound.faster(kept),
    )
    yield Remedy(
        name=f"low-rank factors, {KEEP:.0%} of the weights",
        why="fewer FLOPs a token",
        predicted=bound.faster(kept),
        does="ranks",
    )
    if bound.cost.attention_flops > ATTENTION_SHARE * bound.cost.all_flops:
        half = 1 - bound.cost.attention_flops / bound.cost.all_flops / 2
        yield Remedy(
            name="local-window attention over half of the tokens",
            why=f"attention is more than {ATTENTION_SHARE:.0%} of the FLOPs",
            predicted=bound.faster(scaled(bound.cost, flops=half)),
        )
    yield from _distribution(bound)
    yield Remedy(
        name="chunked prefill", why="no faster by itself, but others decode between the chunks"
    )


def _host(bound: Bound) -> Iterator[Remedy]:
    assert bound.host is not None
    why = f"nothing is computed in {bound.host:.0%} of the time"
    most = 1 / max(1 - bound.host, 1e-3)
    yield Remedy(name="an engine", why=why, predicted=most, does="engine")
    yield Remedy(name="CUDA graphs", why=why, predicted=most)
    # all of the wall time but the computing stays the same, and serves twice the rows
    share = 1 - bound.host
    yield Remedy(name="twice the batch", why=why, predicted=2 / (bound.host + 2 * share))


def _kernel(bound: Bound) -> Iterator[Remedy]:
    why = f"the step reaches {bound.found.eta:.0%} of the roofline"
    yield Remedy(
        name="better kernels: tactics, fusion, an engine",
        why=why,
        predicted=GOOD_ETA / bound.found.eta,
        does="engine",
    )
    if bound.cost.traffic["scratch"].bytes:
        yield Remedy(
            name="a fused dequantization kernel",
            why="codes become floats in memory at every call",
            predicted=bound.faster(scaled(bound.cost, scratch=0)),
        )  # an engine has it, and much else: what comes true there is not this alone


def _distribution(bound: Bound) -> Iterator[Remedy]:
    halves = scaled(bound.cost, weights=0.5, kv=0.5, activations=0.5, scratch=0.5, flops=0.5)
    yield Remedy(
        name="tensor parallelism over two devices",
        why="each moves and multiplies half; communication is not counted",
        predicted=bound.faster(halves),
    )


def scaled(cost: PhaseCost, flops: float = 1.0, **parts: float) -> PhaseCost:
    """The same step with its FLOPs and the named parts of its bytes multiplied.

    The memory that weights and cache come from shrinks with them, perhaps into a faster one.
    """
    moved = {name: part.bytes * parts.get(name, 1.0) for name, part in cost.traffic.items()}
    before = cost.traffic["weights"].bytes + cost.traffic["kv"].bytes
    smaller = (moved["weights"] + moved["kv"]) / before
    changed = {
        name: Traffic(
            bytes=moved[name],
            working_set=part.working_set * (smaller if name in ("weights", "kv") else 1.0),
        )
        for name, part in cost.traffic.items()
    }
    by_dtype: Mapping[str, float] = {name: f * flops for name, f in cost.flops.items()}
    return replace(cost, traffic=changed, flops=by_dtype)


def _bits(cost: PhaseCost) -> float:
    """Bits that a step reads for each weight."""
    return 8 * cost.traffic["weights"].bytes / cost.weights
