"""What would lift each bound, and by how much: the remedies of each class of a step.

Those for waiting, of the host, of kernels, in a queue or for memory, are in `waiting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from types import MappingProxyType

from optpipe.bench.bottlenecks import roofline, waiting
from optpipe.bench.bottlenecks.cost import ITEM_BYTES, PhaseCost
from optpipe.bench.bottlenecks.whatif import Bound, Remedy, scaled

Tried = Mapping[str, float]
"""What later artifacts did, as Remedy.does names it, and how much: bits a weight, share kept."""
NOTHING: Tried = MappingProxyType({})
SCALE_BITS = 0.5
"""What a 16-bit scale for each 32 weights adds to each."""
LEVELS = {"8-bit weights": 8 + SCALE_BITS, "4-bit weights": 4 + SCALE_BITS}
"""Bits that a step reads for each weight, scales included."""
INTEGERS = "8-bit weights, 8-bit inputs"
WORTH = 0.95
"""A change that keeps more of what it shrinks than this is none."""
KEEP = 0.8
"""Weights that a low-rank or structured pruning remedy keeps."""
MOST = 0.6
"""A part of the bytes that is more leaves nothing to gain from the other, weights or KV cache."""
ATTENTION_SHARE = 0.4
DRAFTED = 4
"""Tokens that speculative decoding checks in one step, beside the one that is sure."""
MODEL, DEVICE, SERVER = "a model trained so", "a second device", "a server with other requests"


def remedies(bound: Bound, tried: Tried = NOTHING) -> list[Remedy]:
    """For the class of a step, those that predict most first; what needs what is not here, last.

    A remedy that was ``tried`` is predicted for as much of it as was done. One that is none of this
    class comes after all that are: a prediction of no gain can be false, too.
    """
    by_kind = {
        roofline.WEIGHTS: _memory,
        roofline.KV: _memory,
        roofline.COMPUTE: _compute,
        roofline.HOST: waiting.host,
        roofline.KERNEL: waiting.kernel,
    }
    found = [*by_kind[bound.kind](bound, tried)]
    listed = {remedy.does for remedy in found}
    every = chain(_weights(bound, tried), _kv(bound), _mixed_precision(bound))
    others = [r for r in every if r.does in tried and r.does not in listed]
    return [*_ranked(found), *_ranked(others)]


def _ranked(found: Iterable[Remedy]) -> list[Remedy]:
    return sorted(found, key=lambda remedy: (bool(remedy.needs), -(remedy.predicted or 0.0)))


def _memory(bound: Bound, tried: Tried) -> Iterator[Remedy]:
    """For weights, for the cache, or, where neither is most of the bytes, for both."""
    if _share(bound.cost, "kv") <= MOST:
        yield from _weights(bound, tried)
    if _share(bound.cost, "weights") <= MOST:
        yield from _kv(bound)
    yield _two_devices(bound)


def _weights(bound: Bound, tried: Tried) -> Iterator[Remedy]:
    why = f"weights are {_share(bound.cost, 'weights'):.0%} of the bytes of a step"
    if bound.cost.traffic["scratch"].bytes:
        yield waiting.fused_dequantization(bound)  # before that, fewer bits save nothing
    else:
        yield from _quantization(bound, tried, why)
    if (bits := _bits(bound.cost)) >= 16:
        pruned = scaled(bound.cost, weights=0.5 + 1 / bits)  # half, and 2 bits each for where
        yield Remedy(
            name="2:4 pruning with a sparse kernel",
            why=why,
            predicted=bound.faster(pruned),
            does="pattern 2:4",
        )
    yield from _smaller(bound, tried, why)
    yield Remedy(
        name="twice the batch", why="the same weights serve more rows", predicted=bound.twice
    )
    if bound.phase == "decode":
        yield _speculation(bound)


def _quantization(bound: Bound, tried: Tried, why: str) -> Iterator[Remedy]:
    levels = LEVELS | {does: bits for does, bits in tried.items() if "-bit weights" in does}
    for name, bits in levels.items():
        if (factor := bits / _bits(bound.cost)) < WORTH:
            yield Remedy(
                name=name,
                why=f"{why}, {bits:.3g} bits each then",
                predicted=bound.faster(scaled(bound.cost, weights=factor)),
                does=name,
            )


def _smaller(bound: Bound, tried: Tried, why: str) -> Iterator[Remedy]:
    """The products shrink, attention does not."""
    products = 1 - bound.cost.attention_flops / bound.cost.all_flops
    for does, name in (("ranks", "low-rank factors"), ("structure", "structured pruning")):
        keep = tried.get(does, KEEP)
        flops = 1 - (1 - keep) * products
        yield Remedy(
            name=f"{name}, {keep:.0%} of the weights",
            why=why,
            predicted=bound.faster(scaled(bound.cost, weights=keep, scratch=keep, flops=flops)),
            does=does,
        )


def _speculation(bound: Bound) -> Remedy:
    checked = scaled(bound.cost, activations=1 + DRAFTED, flops=1 + DRAFTED)
    return Remedy(
        name="speculative decoding",
        why=f"to check {DRAFTED} drafted tokens takes {1 / bound.faster(checked):.2f} steps",
        unknown="how many drafted tokens are accepted depends on the draft model and on the text",
    )


def _kv(bound: Bound) -> Iterator[Remedy]:
    cost = bound.cost
    why = f"the KV cache is {_share(cost, 'kv'):.0%} of the bytes of a step"
    in_place = cost.kv_in_place / cost.traffic["kv"].bytes
    for name, factor, does, needs in (
        ("8-bit KV cache", 1 / cost.kv_item, "cache", ""),
        ("KV cache kept in place, read up to what is filled", in_place, None, ""),
        ("eviction of half of the KV cache", 0.5, None, ""),
        ("local-window or sparse attention over half of the tokens", 0.5, None, MODEL),
        ("half of the KV heads (GQA), or a latent cache of that size (MLA)", 0.5, None, MODEL),
        ("linear attention, at most: its state is not counted", 0.0, None, MODEL),
    ):
        if factor < WORTH:
            predicted = bound.faster(scaled(cost, kv=factor))
            yield Remedy(name=name, why=why, predicted=predicted, does=does, needs=needs)


def _compute(bound: Bound, tried: Tried) -> Iterator[Remedy]:
    yield from _mixed_precision(bound)
    yield from _smaller(bound, tried, "fewer FLOPs a token")
    if (share := bound.cost.attention_flops / bound.cost.all_flops) > ATTENTION_SHARE:
        yield Remedy(
            name="local-window attention over half of the tokens, or linear attention",
            why=f"attention is {share:.0%} of the FLOPs",
            predicted=bound.faster(scaled(bound.cost, flops=1 - share / 2)),
            needs=MODEL,
        )
    yield _two_devices(bound)
    if bound.phase == "prefill":
        apart = "a prompt takes as long: what it does is for other requests"
        for name, why in (
            ("chunked prefill", "others decode between the chunks"),
            ("prefill-decode disaggregation", "prompts and answers do not wait for each other"),
        ):
            yield Remedy(name=name, why=why, unknown=apart, needs=SERVER)


def _mixed_precision(bound: Bound) -> Iterator[Remedy]:
    """The products in what this machine multiplies faster; attention stays in what it is in."""
    cost, rates = bound.cost, bound.ceilings.flops_per_s
    slow = min(cost.flops, key=lambda dtype: rates[dtype])
    for dtype in ("bfloat16", "float16", "int8"):
        if rates[slow] >= WORTH * rates.get(dtype, 0.0):
            continue
        attention = cost.attention_flops
        flops = {slow: attention, dtype: cost.all_flops - attention}
        bits = LEVELS["8-bit weights"] if dtype == "int8" else 8 * ITEM_BYTES[dtype]
        changed = scaled(cost, weights=min(1.0, bits / _bits(cost)), scratch=0)
        yield Remedy(
            name=f"mixed precision: {INTEGERS if dtype == 'int8' else dtype}",
            why=f"this machine multiplies {dtype} {rates[dtype] / rates[slow]:.1f} times as fast",
            predicted=bound.faster(replace(changed, flops=flops)),
            does=INTEGERS if dtype == "int8" else dtype,
        )


def _two_devices(bound: Bound) -> Remedy:
    halves = scaled(bound.cost, weights=0.5, kv=0.5, activations=0.5, scratch=0.5, flops=0.5)
    return Remedy(
        name="tensor parallelism over two devices",
        why="each moves and multiplies half, communication not counted; a pipeline over both "
        "serves twice the requests and makes none faster",
        predicted=bound.faster(halves),
        needs=DEVICE,
    )


def _share(cost: PhaseCost, part: str) -> float:
    """Of the bytes of a step."""
    return cost.traffic[part].bytes / cost.bytes


def _bits(cost: PhaseCost) -> float:
    """Bits that a step reads for each weight."""
    return 8 * cost.traffic["weights"].bytes / cost.weights
