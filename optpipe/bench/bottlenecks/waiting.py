"""Remedies for a step that waits: for its host, for its kernels, in a queue, or for memory.

Two classes of benchmark.md are not here. No arm spans several devices, so that none is bound by
communication. None keeps weights or cache off its device: a step sends token ids there and brings
token ids back, which is part of the host's share, so that none is bound by transfers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from optpipe.bench.bottlenecks.whatif import Bound, Remedy, scaled

GOOD_ETA = 0.8
"""Of the roofline, what a well-made kernel reaches."""
NO_TIME = "what has no room takes no time that could be less"


def host(bound: Bound, _: Mapping[str, float]) -> Iterator[Remedy]:
    assert bound.host is not None
    why = f"nothing is computed in {bound.host:.0%} of the time"
    most = bound.wall_s / bound.found.seconds
    for name, does, apt in (
        ("an engine", "engine", not bound.engine),
        ("CUDA graphs", None, bound.launched),
    ):
        if apt:
            yield Remedy(name=name, why=f"{why}, at most all of it goes", predicted=most, does=does)
    yield Remedy(
        name="fused sampling", why=why, unknown="how much of the host's time is sampling is unknown"
    )
    yield Remedy(
        name="twice the batch",
        why="what the host does once a step serves more rows",
        predicted=bound.twice,
    )


def kernel(bound: Bound, _: Mapping[str, float]) -> Iterator[Remedy]:
    lost = bound.found.seconds - bound.found.floor_s / GOOD_ETA
    yield Remedy(
        name="better kernels: tactics, optimization level, profile of shapes"
        if bound.engine
        else "better kernels: an engine",
        why=f"the step reaches {bound.found.eta:.0%} of the roofline, good ones {GOOD_ETA:.0%}",
        predicted=bound.wall_s / (bound.wall_s - lost),
        does=None if bound.engine else "engine",
    )
    if bound.cost.traffic["scratch"].bytes:
        yield fused_dequantization(bound)
    yield Remedy(
        name="alignment, padding",
        why="a kernel runs whole tiles, also where a dimension fills only a part of the last",
        unknown="the model of bytes and FLOPs knows no tiles",
    )


def fused_dequantization(bound: Bound) -> Remedy:
    """An engine has it, and much else: what comes true there is not this alone."""
    return Remedy(
        name="a fused dequantization kernel",
        why="codes become floats in memory at every call",
        predicted=bound.faster(scaled(bound.cost, scratch=0)),
    )


def queue_remedies(ttft_s: float, queue_s: float) -> list[Remedy]:
    """``predicted`` is for TTFT, if nothing waited any more."""
    most = ttft_s / (ttft_s - queue_s)
    shortens = {
        "chunked prefill": "a long prompt no longer blocks others",
        "continuous batching": "requests join a running batch",
        "replicas": "each gets its share of the requests",
        "prefill-decode disaggregation": "prompts wait for prompts only",
    }
    return [
        Remedy(name=name, why=f"{why}; at most nothing waits any more", predicted=most)
        for name, why in shortens.items()
    ]


def capacity_remedies() -> list[Remedy]:
    makes_room = {
        "KV cache quantization": "twice the tokens in the same memory at 8 of 16 bits",
        "paged KV cache": "no memory for tokens that are not there",
        "local-window attention": "a cache that stops growing",
        "fewer KV heads (GQA)": "fewer bytes a token, of a model trained so",
        "offload": "a second, slower memory",
    }
    return [Remedy(name=name, why=why, unknown=NO_TIME) for name, why in makes_room.items()]
