"""A report with its bottlenecks: classes of cells, remedies, and how much of them came true."""

import json
import math
from dataclasses import replace

import pytest

from optpipe.bench.bottlenecks import bottleneck
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.cost import Model, Product, cell_costs
from optpipe.bench.bottlenecks.realised import NO_RATIO, promised, realised
from optpipe.bench.bottlenecks.roofline import floor_s
from optpipe.bench.pages import bounds
from optpipe.bench.scenario import Cell

CEILINGS = Ceilings(bandwidth=((1e6, 1e11),), flops_per_s={"float32": 1e12, "int8": 4e12})
CELLS = [Cell("single", 1, 128, 33), Cell("batch", 4, 128, 33)]
ETA, HOST_S = 0.8, 1e-4


def model(bits=32, capacity=4096, layers=8, scratch=0):
    """``scratch`` is in bytes a weight."""
    count = 4096 * 4096
    layer = Product(
        rows=4096, cols=4096, bytes=count * bits / 8, dtype="float32", scratch=count * scratch
    )
    return Model(
        products=(layer,) * layers,
        vector_bytes=0.0,
        hidden=4096,
        tables=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        windows=(None,) * 8,
        dtype="float32",
        capacity=capacity,
        cache="in place",
    )


MODELS = {"baseline": model(), "quant": model(4.5), "quant+export+build": model(4.5)}
ETAS = {"baseline": ETA, "quant": ETA / 3, "quant+export+build": ETA}


def cell_entry(name, cell):
    cost = cell_costs(MODELS[name], cell)
    prefill, tpot = (floor_s(step, CEILINGS) / ETAS[name] for step in (cost.prefill, cost.decode))
    base = cell_costs(MODELS["baseline"], cell)
    ratios = [
        floor_s(step, CEILINGS) / ETA / own
        for step, own in ((base.prefill, prefill), (base.decode, tpot))
    ]
    e2e = prefill + 32 * tpot
    return {
        **cell._asdict(),
        "prefill_s": prefill,
        "ttft_s": prefill,
        "queue_s": 0.0,
        "tpot_s": tpot,
        "e2e_s": e2e,
        "cpu_s": 2 * e2e,
        "speedup": {m: {"ratio": r} for m, r in zip(("prefill_s", "tpot_s"), ratios, strict=True)},
        "reasons": {},
    }


@pytest.fixture
def report():
    """A baseline, its quantized torch model at a third of the roofline, and the engine of that."""
    artifacts = [
        {
            "name": name,
            "role": "baseline" if name == "baseline" else "artifact",
            "stage": name.rpartition("+")[2],
            "lineage": [] if name == "baseline" else name.split("+"),
            "format": "ort" if name.endswith("build") else "hf",
            "device": "cpu",
            "dtype": "float32",
            "decoding": "kernel by kernel",
            "stats": {"bits": 4} if name == "quant" else {},
            "cells": [cell_entry(name, cell) for cell in CELLS],
        }
        for name in MODELS
    ]
    return {"run": {}, "artifacts": artifacts}


COSTS = {(name, cell): cell_costs(MODELS[name], cell) for name in MODELS for cell in CELLS}


def attached(report, host_s=None, costs=COSTS):
    bottleneck.attach(report, costs, {"cpu": CEILINGS}, host_s)
    return [a["cells"][0]["bottleneck"] for a in report["artifacts"]]


def check_nulls(node):
    """Every null has a reason beside it."""
    if isinstance(node, dict):
        if "reasons" in node:
            assert {k for k, v in node.items() if v is None} <= node["reasons"].keys(), node
            assert all(node["reasons"].values()), node
        for value in node.values():
            check_nulls(value)
    elif isinstance(node, list):
        for item in node:
            check_nulls(item)


def test_every_cell_gets_a_class_by_three_votes_and_remedies_that_came_true_or_not(report):
    base, quant, engine = attached(report, {key: {"prefill": 0.0, "decode": 0.0} for key in COSTS})
    decode = base["phase"]["decode"]
    assert base["class"] == decode["class"] == "memory_bandwidth_weights"
    assert decode["votes"] == dict.fromkeys(("intensity", "utilisation", "elasticity"), "memory")
    assert decode["mbu"] == decode["eta"] == pytest.approx(ETA)
    assert base["phase"]["prefill"]["class"] == "compute"
    assert quant["phase"]["decode"]["class"] == "memory_bandwidth_weights"
    int4 = next(r for r in decode["remedies"] if r["name"] == "4-bit weights")
    assert int4["artifact"] == "quant", "what an engine adds is not the doing of int4"
    tpot = [report_time(report, name) for name in ("baseline", "quant")]
    assert int4["speedup"] == pytest.approx(tpot[0] / tpot[1])
    expected = math.log(int4["speedup"]) / math.log(int4["predicted_speedup"])
    assert int4["realised"] == pytest.approx(expected)
    promise = engine["phase"]["decode"]["roofline"]
    assert promise["realised"] == pytest.approx(1), "as efficient as the baseline"
    slow = quant["phase"]["decode"]["roofline"]
    assert slow["realised"] == pytest.approx(1 + math.log(1 / 3) / math.log(slow["ratio"]))
    assert slow["byte_ratio"] == pytest.approx(7, rel=0.1)
    check_nulls(report)
    json.dumps(report, allow_nan=False)
    assert report["run"]["invalid_reasons"] == []
    assert report["run"]["ceilings"]["cpu"]["int8"]["flops_per_s"] == 4e12


LAYERS = {"verified": {"layer_bits": {"a": 4, "b": 4}, "bits_per_quantized_weight": 4.125}}
MIXED = {"verified": {"layer_bits": {"a": 3, "b": 8}, "bits_per_quantized_weight": 5.5}}
ROUNDED = {"verified": {"layer_bits": {"a": 8}, "layer_inputs": ["int8_token"]}}


@pytest.mark.parametrize(
    ("stage", "stats", "name"),
    [
        ("prune", {"sparsity": 0.2, "pattern": "row"}, None),
        ("prune", {"sparsity": 0.5, "pattern": "2:4"}, "2:4 pruning with a sparse kernel"),
        ("structure", {"bits": 4}, None),
        ("structure", {}, "structured pruning, 25% of the weights"),
        ("lowrank", {"ranks": {"a": 3}}, "low-rank factors, 25% of the weights"),
        ("quant", {"bits": 4}, "4-bit weights"),
        ("quant", {"bits": 4, **LAYERS}, "4-bit weights"),
        ("quant", {"bits": 8, **MIXED}, "mixed-bit weights"),
        ("quant", {"bits": 8, **ROUNDED}, "8-bit weights, 8-bit inputs"),
        ("recover", {}, None),
    ],
)
def test_only_what_a_stage_did_alone_is_credited_to_it(report, stage, stats, name):
    """A model of two of eight layers has a quarter of the weights."""
    made = report["artifacts"][1]
    made["lineage"], made["stats"] = [stage], stats
    found = attached(
        report, costs=COSTS | {("quant", CELLS[0]): cell_costs(model(layers=2), CELLS[0])}
    )
    remedies = found[0]["phase"]["decode"]["remedies"]
    assert [r["name"] for r in remedies if r["artifact"] == "quant"] == ([name] if name else [])


def test_bits_are_those_that_are_stored(report):
    report["artifacts"][1]["stats"] = {"bits": 4, **LAYERS}
    decode = attached(report)[0]["phase"]["decode"]
    cost = COSTS["baseline", CELLS[0]].decode
    floor, rest = decode["floor_s"], decode["seconds"] - decode["floor_s"]
    shorter = floor - cost.traffic["weights"].bytes * (1 - 4.125 / bits_of(cost)) / 1e11
    assert named(decode, "4-bit weights")["predicted_speedup"] == (
        pytest.approx(decode["seconds"] / (rest + shorter))
    )


def bits_of(cost):
    return 8 * cost.traffic["weights"].bytes / cost.weights


def named(phase, name):
    return next(remedy for remedy in phase["remedies"] if remedy["name"] == name)


def test_another_runtime_is_no_remedy_of_the_weights(report):
    """The canonical graph of the codes also leaves torch."""
    report["artifacts"][2] |= {"format": "onnx", "lineage": ["quant", "export"]}
    decode = attached(report)[0]["phase"]["decode"]
    assert named(decode, "4-bit weights")["artifact"] == "quant"


def test_an_8_bit_cache_of_the_run_is_credited(report):
    """A cache of 16384 tokens is most of the bytes."""
    long = Cell("single", 1, 16384, 33)
    many = [cell_costs(replace(model(), kv_dtype=dtype), long) for dtype in (None, "int8")]
    base, made = report["artifacts"][:2]
    made["lineage"], made["stats"] = ["cache"], {"kv_cache": "int8"}
    for artifact, cost in zip((base, made), many, strict=True):
        artifact["cells"] = artifact["cells"][:1]
        artifact["cells"][0]["tpot_s"] = floor_s(cost.decode, CEILINGS) / ETA
        artifact["cells"][0]["prefill_s"] = floor_s(cost.prefill, CEILINGS) / ETA
    del report["artifacts"][2]
    ratio = base["cells"][0]["tpot_s"] / made["cells"][0]["tpot_s"]
    made["cells"][0]["speedup"]["tpot_s"]["ratio"] = ratio
    costs = {(a["name"], CELLS[0]): cost for a, cost in zip((base, made), many, strict=True)}
    found = attached(report, costs=costs)[0]["phase"]["decode"]
    assert found["class"] == "memory_bandwidth_kv"
    cache = named(found, "8-bit KV cache")
    assert (cache["artifact"], cache["speedup"]) == ("quant", pytest.approx(ratio))
    assert cache["executed_speedup"] == pytest.approx(cache["predicted_speedup"])


def test_the_baseline_in_half_precision_is_a_remedy_of_the_baseline(report):
    other = report["artifacts"][1]
    other |= {"role": "reference", "lineage": [], "stats": {}, "dtype": "bfloat16"}
    fast = Ceilings(bandwidth=((1e6, 1e11),), flops_per_s={"float32": 1e12, "bfloat16": 4e12})
    bottleneck.attach(report, COSTS, {"cpu": fast})
    prefill = report["artifacts"][0]["cells"][0]["bottleneck"]["phase"]["prefill"]
    assert named(prefill, "mixed precision: bfloat16")["artifact"] == "quant"


def test_what_a_runtime_executes_is_told_beside_what_the_remedy_promised(report):
    """Codes of 4 bits that are kept in bytes and become floats at every call."""
    slow = cell_costs(model(8.5, scratch=24), CELLS[0])
    found = attached(report, costs=COSTS | {("quant", CELLS[0]): slow})
    decode = found[0]["phase"]["decode"]
    int4 = named(decode, "4-bit weights")
    floor = floor_s(slow.decode, CEILINGS)
    after = decode["seconds"] - decode["floor_s"] + floor
    assert int4["executed_speedup"] == pytest.approx(decode["seconds"] / after) and after > floor
    assert int4["executed_speedup"] < 1 < int4["predicted_speedup"]


def report_time(report, name):
    return next(a for a in report["artifacts"] if a["name"] == name)["cells"][0]["tpot_s"]


def test_a_host_that_takes_the_time_is_what_binds(report):
    tpot = report["artifacts"][0]["cells"][0]["tpot_s"]
    found = attached(report, {("baseline", CELLS[0]): {"prefill": 0.0, "decode": 0.5 * tpot}})
    assert found[0]["class"] == "host"
    decode = found[0]["phase"]["decode"]
    assert decode["host_share"] == pytest.approx(0.5)
    engine = next(r for r in decode["remedies"] if r["name"] == "an engine")
    assert engine["predicted_speedup"] == pytest.approx(2)
    assert engine["artifact"] is None, "the engine of the run has other weights, too"
    key = ("quant", CELLS[0])
    found = attached(report, {key: {"prefill": 0.0, "decode": 0.5 * report_time(report, "quant")}})
    engine = next(r for r in found[1]["phase"]["decode"]["remedies"] if r["name"] == "an engine")
    assert engine["artifact"] == "quant+export+build"
    times = [report_time(report, name) for name in ("quant", "quant+export+build")]
    assert engine["speedup"] == pytest.approx(times[0] / times[1])
    assert engine["executed_speedup"] is None and engine["reasons"]["executed_speedup"]
    report["artifacts"][2]["dtype"] = "float16"
    found = attached(report, {key: {"prefill": 0.0, "decode": 0.5 * report_time(report, "quant")}})
    engine = next(r for r in found[1]["phase"]["decode"]["remedies"] if r["name"] == "an engine")
    assert engine["artifact"] is None, "half the bytes are not the doing of the engine"
    report["artifacts"][2] |= {"dtype": "float32", "format": "onnx"}
    found = attached(report, {key: {"prefill": 0.0, "decode": 0.5 * report_time(report, "quant")}})
    engine = next(r for r in found[1]["phase"]["decode"]["remedies"] if r["name"] == "an engine")
    assert engine["artifact"] is None, "a canonical graph is built for no runtime"


def test_a_runner_that_only_sleeps_is_bound_by_the_host(report):
    """T8b: no profile, hardly any CPU time."""
    cell = report["artifacts"][0]["cells"][0]
    cell["cpu_s"] = 0.01 * cell["e2e_s"]
    found = attached(report)[0]
    assert found["class"] == found["phase"]["decode"]["class"] == "host"


def test_a_step_that_waits_for_a_core_is_bound_by_nothing_that_a_remedy_could_lift(report):
    """On a crowded machine: its profile finds no host, and still not one core was busy."""
    cell = report["artifacts"][0]["cells"][0]
    for key in ("prefill_s", "tpot_s", "e2e_s"):
        cell[key] *= 14
    cell["cpu_s"] = 0.16 * cell["e2e_s"]
    idle = {("baseline", CELLS[0]): {"prefill": 0.0, "decode": 0.0}}
    decode = attached(report, idle)[0]["phase"]["decode"]
    assert decode["class"] is None and decode["remedies"] == []
    assert decode["reasons"]["class"] == bottleneck.CROWDED
    check_nulls(decode)
    cell["cpu_s"] = cell["e2e_s"]
    assert attached(report, idle)[0]["phase"]["decode"]["class"] == "kernel"


def test_a_step_faster_than_physics_has_no_class_and_makes_the_run_invalid(report):
    """T8d."""
    report["artifacts"][0]["cells"][0]["tpot_s"] *= ETA / 1.06
    found = attached(report)[0]
    assert found["class"] is None and "MBU 1.06 is above 1.05" in found["reasons"]["class"]
    (reason,) = report["run"]["invalid_reasons"]
    assert reason.startswith("baseline, single 1 x 128 + 33, decode: MBU 1.06")
    check_nulls(report)


def test_requests_that_wait_more_than_half_of_their_ttft_are_bound_by_the_queue(report):
    cell = report["artifacts"][0]["cells"][0]
    cell["queue_s"], cell["ttft_s"] = 3.0, 5.9
    assert attached(report)[0]["class"] != "queue", "one at a time, there is no queue"
    cell["arrivals"] = "poisson"
    found = attached(report)[0]
    cell["ttft_s"] = 6.1
    assert attached(report)[0]["class"] is None
    assert found["class"] == "queue"
    names = [remedy["name"] for remedy in found["remedies"]]
    assert "prefill-decode disaggregation" in names and "chunked prefill" in names


def test_a_cell_that_does_not_fit_its_cache_is_bound_by_capacity(report):
    small = cell_costs(model(capacity=100), CELLS[0])
    cell = report["artifacts"][0]["cells"][0]
    cell |= dict.fromkeys(("prefill_s", "ttft_s", "queue_s", "tpot_s", "e2e_s", "cpu_s"))
    cell["reasons"] = dict.fromkeys(("prefill_s", "tpot_s"), "it does not fit")
    found = attached(report, costs={**COSTS, ("baseline", CELLS[0]): small})[0]
    assert found["class"] == "capacity" and found["remedies"]
    assert found["phase"]["decode"]["reasons"]["mbu"] == "it does not fit"
    check_nulls(found)


def test_a_cell_that_was_not_counted_says_so(report):
    found = attached(report, costs={})[0]
    assert found["class"] is None and found["reasons"]["class"] == bottleneck.NO_COST


def test_the_tables_have_two_phases_an_artifact_and_what_came_true(report):
    attached(report)
    (title, rows), _ = bounds.limits(report)
    assert title == "single: 1 \u00d7 128 tokens in, 33 out" and len(rows) == 6
    assert all(len(row) == len(bounds.LIMIT) for row in rows)
    assert rows[1][:4] == ("1 baseline", "decode", "memory_bandwidth_weights", "0.80")
    (title, rows), _ = bounds.outcomes(report)
    assert title == "single: 1 \u00d7 128 tokens in, 33 out"
    assert all(len(row) == len(bounds.OUTCOME) for row in rows)
    decode = report["artifacts"][0]["cells"][0]["bottleneck"]["phase"]["decode"]
    int4 = named(decode, "4-bit weights")
    figures = [f"{int4[k]:.2f}" for k in ("predicted_speedup", "executed_speedup", "speedup")]
    row = ("1 baseline", "decode", "4-bit weights", "2 + quant", *figures)
    assert (*row, f"{int4['realised']:.0%}") in rows
    assert sum(row[2] == bounds.ALL for row in rows) == 4, "of two artifacts and two phases"


def test_of_an_invalid_ratio_nothing_came_true():
    tpot = {"ratio": 1.9, "verdict": "FASTER"}
    cell = {"speedup": {"tpot_s": tpot}}
    assert promised(2.0, 2.0, cell, "decode")["realised"] > 0.9
    tpot["verdict"] = "INVALID"
    found = promised(2.0, 2.0, cell, "decode")
    assert found["realised"] is None is found["byte_realised"]
    assert {*found["reasons"].values()} == {NO_RATIO}


def test_what_came_true_is_a_ratio_of_logs():
    assert realised(2.0, 4.0) == pytest.approx(0.5)
    assert realised(1.0, 4.0) == 0 and realised(0.5, 4.0) == pytest.approx(-0.5)
    assert realised(2.0, 1.09) is None is realised(0.5, 0.92) and realised(None, 2.0) is None
    assert realised(1.21, 1.11) == pytest.approx(math.log(1.21) / math.log(1.11))
