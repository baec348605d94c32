"""What each remedy predicts, against sums done by hand, and what each class lists.

10 GB a step at 100 GB/s are a floor of 100 ms; the step takes 125 ms, so 25 ms stay.
"""

from dataclasses import replace

import pytest
from test_roofline import model

from optpipe.bench.bottlenecks import roofline
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import PhaseCost, Traffic
from optpipe.bench.bottlenecks.remedies import LEVELS, remedies
from optpipe.bench.bottlenecks.waiting import capacity_remedies, queue_remedies
from optpipe.bench.bottlenecks.whatif import Bound

RATES = {"float16": 1e14, "bfloat16": 1e14, "float32": 5e13, "int8": 2e14}
CEILINGS = Ceilings(bandwidth=((1e6, 1e11),), flops_per_s=RATES)
GB = 1e9


def cost(flops=1e9, attention=0.0, kv_in_place=None, **gigabytes):
    """4e9 weights; parts in GB."""
    parts = {name: gigabytes.get(name, 0.0) * GB for name in
             ("weights", "kv", "activations", "scratch")}  # fmt: skip
    return PhaseCost(
        traffic={name: Traffic(bytes=size, working_set=size) for name, size in parts.items()},
        flops={"float16": flops},
        attention_flops=attention,
        weights=4e9,
        kv_item=2,
        kv_in_place=parts["kv"] if kv_in_place is None else kv_in_place * GB,
    )


def bound(kind, of, seconds=0.125, host=None, phase="decode", **about):
    found = roofline.use(of, seconds, CEILINGS)
    about |= {"kind": kind, "phase": phase, "cost": of, "found": found, "host": host}
    return Bound(**about, ceilings=CEILINGS)


def predicted(given, tried=None):
    return {remedy.name: remedy.predicted for remedy in remedies(given, tried or {})}


WEIGHTS = cost(weights=8, kv=1.5, activations=0.5)
BOTH = cost(weights=5, kv=3, activations=2, kv_in_place=1)


def test_remedies_for_weights_by_hand():
    """16 bits become 8.5, 4.5 and, of 2:4, 9; or four fifths; or another row joins."""
    found = predicted(bound(roofline.WEIGHTS, WEIGHTS))
    assert found == pytest.approx({
        "4-bit weights": 125 / (25 + 42.5),
        "twice the batch": 2 * 125 / (25 + 120),
        "8-bit weights": 125 / (25 + 62.5),
        "2:4 pruning with a sparse kernel": 125 / (25 + 65),
        "low-rank factors, 80% of the weights": 125 / (25 + 84),
        "structured pruning, 80% of the weights": 125 / (25 + 84),
        "speculative decoding": None,
        "tensor parallelism over two devices": 125 / (25 + 50),
    })  # fmt: skip
    assert [*found][:2] == ["4-bit weights", "twice the batch"], "what predicts most, first"
    prompt = predicted(bound(roofline.WEIGHTS, WEIGHTS, phase="prefill"))
    assert found.keys() - prompt.keys() == {"speculative decoding"}
    assert [*found][-1] == "tensor parallelism over two devices", "which is not here, last"
    drafts = next(r for r in remedies(bound(roofline.WEIGHTS, WEIGHTS)) if "speculat" in r.name)
    assert "takes 1.16 steps" in drafts.why and "accepted" in drafts.unknown  # 145 of 125 ms


def test_remedies_for_the_cache_by_hand():
    """Of 3 GB of cache int8 halves what float16 is; in place, one would be moved."""
    found = predicted(bound(roofline.WEIGHTS, BOTH))
    half = 125 / (25 + 85)
    assert {name: found[name] for name in found if "KV" in name or "attention" in name} == (
        pytest.approx({
            "KV cache kept in place, read up to what is filled": 125 / (25 + 80),
            "8-bit KV cache": half,
            "eviction of half of the KV cache": half,
            "linear attention, at most: its state is not counted": 125 / (25 + 70),
            "local-window or sparse attention over half of the tokens": half,
            "half of the KV heads (GQA), or a latent cache of that size (MLA)": half,
        })
    )  # fmt: skip
    quarter = remedies(bound(roofline.KV, replace(BOTH, kv_item=4)))
    assert named(quarter, "8-bit KV").predicted == pytest.approx(125 / (25 + 77.5))
    assert not any(
        "8-bit KV" in r.name for r in remedies(bound(roofline.KV, replace(BOTH, kv_item=1)))
    )


@pytest.mark.parametrize(
    ("weights", "kv", "for_weights", "for_kv"),
    [(7, 3, True, False), (6.2, 3, True, False), (3, 6.2, False, True), (3, 7, False, True),
     (5, 3, True, True), (3, 3, True, True), (5, 5, True, True), (5.5, 4.5, True, True)],
)  # fmt: skip
def test_remedies_are_for_what_takes_the_bytes(weights, kv, for_weights, for_kv):
    """Weights above 60 %: theirs; the cache above 40 %: its; neither: both."""
    of = cost(weights=weights, kv=kv, activations=10 - weights - kv)
    found = predicted(bound(roofline.bandwidth_of(of), of))
    assert ("4-bit weights" in found, "8-bit KV cache" in found) == (for_weights, for_kv)


PROMPT = {"weights": 0.8, "kv": 0.1, "activations": 0.1}


def test_remedies_for_compute_by_hand():
    """8e12 FLOPs at 1e14 a second are 80 of 100 ms; a quarter of them is attention."""
    of = cost(flops=8e12, attention=2e12, **PROMPT)
    found = predicted(bound(roofline.COMPUTE, of, 0.1, phase="prefill"))
    assert found == pytest.approx({
        "mixed precision: 8-bit weights, 8-bit inputs": 100 / (20 + 20 + 30),
        "low-rank factors, 80% of the weights": 100 / (20 + 20 + 48),
        "structured pruning, 80% of the weights": 100 / (20 + 20 + 48),
        "tensor parallelism over two devices": 100 / (20 + 40),
        "chunked prefill": None,
        "prefill-decode disaggregation": None,
    })  # fmt: skip
    long = bound(roofline.COMPUTE, cost(flops=8e12, attention=4e12, **PROMPT), 0.1)
    assert named(remedies(long), "local-window").predicted == pytest.approx(100 / (20 + 60))
    assert not any("chunked" in name for name in predicted(long)), "of a decode step"
    floats = replace(of, flops={"float32": 2e12})
    found = predicted(bound(roofline.COMPUTE, replace(floats, attention_flops=0.0), 0.05))
    assert found["mixed precision: bfloat16"] == pytest.approx(50 / (10 + 20))
    assert found["mixed precision: 8-bit weights, 8-bit inputs"] == pytest.approx(50 / (10 + 10))


def test_integers_are_also_fewer_bytes():
    """84 ms of products, 80 of bytes: 42, and 10 beside 42.5 at 8.5 of 14 bits."""
    found = predicted(bound(roofline.COMPUTE, cost(flops=8.4e12, weights=7, kv=1), 0.1))
    assert found["mixed precision: 8-bit weights, 8-bit inputs"] == pytest.approx(100 / (16 + 52.5))


def test_a_host_that_waits_by_hand():
    """250 ms, in half of which something is computed."""
    found = predicted(bound(roofline.HOST, WEIGHTS, host=0.5, launched=True))
    assert found == pytest.approx({
        "an engine": 2,
        "CUDA graphs": 2,
        "twice the batch": 2 * 250 / (150 + 120),
        "fused sampling": None,
    })  # fmt: skip
    assert predicted(bound(roofline.HOST, WEIGHTS, host=0.5, engine=True)).keys() == {
        "twice the batch",
        "fused sampling",
    }, "a CPU has no graphs, an engine is one already"


def test_what_is_there_already_is_not_advised():
    codes = replace(WEIGHTS, traffic={**WEIGHTS.traffic, "weights": Traffic(bytes=2.25 * GB)})
    found = predicted(bound(roofline.WEIGHTS, codes))
    assert not any("-bit weights" in name or "2:4" in name for name in found)


def test_fewer_bytes_may_come_from_a_faster_memory():
    """8 GB of weights and a cache of 2 are 10 together; 4.25 and 2 fit where a GB takes 5 ms."""
    fast = Ceilings(bandwidth=((7e9, 2e11), (8e9, 1e11)), flops_per_s=RATES)
    shared = {name: Traffic(bytes=size, working_set=10 * GB)
              for name, size in (("weights", 8 * GB), ("kv", 2 * GB))}  # fmt: skip
    of = replace(WEIGHTS, traffic={**WEIGHTS.traffic, **shared, "activations": Traffic()})
    found = predicted(replace(bound(roofline.WEIGHTS, of), ceilings=fast))
    assert found["8-bit weights"] == pytest.approx(125 / (25 + 6.25 * 5))


def test_what_the_host_takes_is_not_made_faster():
    """Of 156.25 ms 31.25 are the host's: 56.25 stay."""
    found = predicted(bound(roofline.WEIGHTS, WEIGHTS, host=0.2))
    assert found["4-bit weights"] == pytest.approx(156.25 / (56.25 + 42.5))


def test_poor_kernels_by_hand():
    """500 ms at a fifth of the roofline; of good ones it takes 125."""
    found = predicted(bound(roofline.KERNEL, WEIGHTS, 0.5))
    assert found == pytest.approx({"better kernels: an engine": 4, "alignment, padding": None})
    hosted = remedies(bound(roofline.KERNEL, WEIGHTS, 0.5, host=0.2, engine=True))
    assert named(hosted, "tactics").predicted == pytest.approx(625 / (125 + 125))
    assert named(hosted, "tactics").does is None, "what it runs on is an engine"
    codes = replace(WEIGHTS, traffic={**WEIGHTS.traffic, "scratch": Traffic(bytes=10 * GB)})
    fused = named(remedies(bound(roofline.KERNEL, codes, 1.0)), "fused dequantization")
    assert fused.predicted == pytest.approx(1000 / (800 + 100))


def test_codes_that_become_floats_at_every_call_need_a_kernel_before_fewer_bits():
    codes = replace(WEIGHTS, traffic={**WEIGHTS.traffic, "scratch": Traffic(bytes=10 * GB)})
    found = predicted(bound(roofline.WEIGHTS, codes, 0.25))
    assert found["a fused dequantization kernel"] == pytest.approx(250 / (50 + 100))
    smaller = found["structured pruning, 80% of the weights"]
    assert smaller == pytest.approx(250 / (50 + 84 + 80)), "fewer codes, fewer floats"
    assert not found.keys() & LEVELS.keys()


@pytest.mark.parametrize(
    ("does", "amount", "name", "gigabytes"),
    [
        ("4-bit weights", 4.125, "4-bit weights", 4.0625),
        ("3-bit weights", 3.5, "3-bit weights", 3.75),
        ("mixed-bit weights", 5.0, "mixed-bit weights", 4.5),
        ("8-bit weights, 8-bit inputs", 8.0, "8-bit weights, 8-bit inputs", 6.0),
        ("ranks", 0.5, "low-rank factors, 50% of the weights", 6.0),
        ("structure", 0.75, "structured pruning, 75% of the weights", 8.0),
    ],
)
def test_what_was_tried_is_predicted_for_as_much_of_it_as_was_done(does, amount, name, gigabytes):
    found = remedies(bound(roofline.WEIGHTS, WEIGHTS), {does: amount})
    (remedy,) = (r for r in found if r.does == does)
    assert remedy.name == name
    assert remedy.predicted == pytest.approx(125 / (25 + 10 * gigabytes))


def test_what_was_tried_is_predicted_where_it_is_no_remedy_too():
    """An 8-bit cache saves 7.5 of 125 ms of a step for weights; 4-bit weights save no product."""
    *rest, last = remedies(bound(roofline.WEIGHTS, WEIGHTS), {"cache": 1.0})
    assert last.name == "8-bit KV cache" and last.predicted == pytest.approx(125 / 117.5)
    assert "two devices" in rest[-1].name, "after all that are"
    given = bound(roofline.COMPUTE, cost(flops=9e12, weights=7, kv=1), 0.1, phase="prefill")
    tried = {"4-bit weights": 4.5, "structure": 0.8}
    names = [remedy.name for remedy in remedies(given, tried)]
    assert names[-1] == "4-bit weights" and len({*names}) == len(names)
    assert remedies(given, tried)[-1].predicted == pytest.approx(1)


def named(found, name):
    return next(remedy for remedy in found if name in remedy.name)


LISTED = {
    roofline.HOST: ["CUDA graphs", "engine", "fused sampling", "batch"],
    roofline.WEIGHTS: ["8-bit weights", "4-bit weights", "2:4", "low-rank", "batch", "speculative",
                       "structured pruning", "two devices"],
    roofline.KV: ["8-bit KV", "local-window or sparse", "GQA", "MLA", "linear attention",
                  "eviction", "two devices"],
    roofline.COMPUTE: ["chunked prefill", "mixed precision", "structured pruning", "low-rank",
                       "local-window", "linear attention", "disaggregation", "two devices"],
    roofline.KERNEL: ["tactics", "optimization level", "profile", "alignment", "padding",
                      "fused dequantization"],
    "queue": ["chunked prefill", "continuous batching", "replicas", "disaggregation"],
    "capacity": ["KV cache quantization", "paged", "window", "GQA", "offload"],
}  # fmt: skip


def listed(kind):
    if kind == "queue":
        return queue_remedies(ttft_s=1.0, queue_s=0.75)
    if kind == "capacity":
        return capacity_remedies()
    of = {
        roofline.KV: cost(weights=3, kv=7),
        roofline.COMPUTE: cost(flops=8e12, attention=4e12, **PROMPT),
        roofline.KERNEL: replace(WEIGHTS, traffic={**WEIGHTS.traffic,
                                                   "scratch": Traffic(bytes=GB)}),
    }.get(kind, WEIGHTS)  # fmt: skip
    host = 0.5 if kind == roofline.HOST else None
    phase = "prefill" if kind == roofline.COMPUTE else "decode"
    about = {"launched": True, "engine": kind == roofline.KERNEL}
    return remedies(bound(kind, of, host=host, phase=phase, **about))


@pytest.mark.parametrize("kind", LISTED)
def test_a_class_lists_what_the_design_lists_each_with_a_number_or_why_there_is_none(kind):
    found = listed(kind)
    names = " | ".join(remedy.name for remedy in found)
    assert [name for name in LISTED[kind] if name not in names] == []
    assert all((remedy.predicted is None) == bool(remedy.unknown) for remedy in found)
    assert all(remedy.why for remedy in found)


def test_a_queue_that_goes_leaves_what_is_no_waiting():
    """Of one second of TTFT three quarters were spent in the queue."""
    assert [remedy.predicted for remedy in listed("queue")] == pytest.approx([4] * 4)


def test_predictions_come_true_where_others_measured_them():
    """Llama-2-7B on an A100 by gpt-fast: eta 0.69; int8 came to 1.48 times, int4 to 1.88."""
    step = model().step(1, 1, 0)
    found = predicted(bound(roofline.WEIGHTS, step, roofline.floor_s(step, CEILINGS) / 0.69))
    assert found["8-bit weights"] == pytest.approx(1.48, rel=0.02)
    assert found["4-bit weights"] == pytest.approx(1.88, rel=0.08)
