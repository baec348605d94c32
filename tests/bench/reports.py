"""A report with every field there is, made from a few numbers; no clock, no randomness."""

import gzip
import json
import math

WHY = "one output token: there is no gap between tokens to time"
STAGES = ["prune", "lowrank", "quant", "export", "build"]
CELLS = [("single", 1, 128, 32), ("batch", 1, 128, 16), ("batch", 4, 128, 16),
         ("batch", 16, 128, 16), ("one_token", 1, 512, 1)]  # fmt: skip
LATENCIES = ("ttft_s", "prefill_s", "tpot_s", "e2e_s")


def speedup(ratio, half=0.06):
    """A ratio with its interval and the verdict that follows."""
    ci = interval(ratio, half)["ci"]
    verdict = "FASTER" if ci[0] > 1 else "SLOWER" if ci[1] < 1 else "INCONCLUSIVE"
    return {
        "ratio": ratio, "ci": ci, "verdict": verdict, "reason": None, "p_holm": 0.0078,
        "blocks_needed": 40 if verdict == "INCONCLUSIVE" else None, "mde": 0.03,
        "reasons": {} if verdict == "INCONCLUSIVE" else {"blocks_needed": "it is decided"},
    }  # fmt: skip


def interval(ratio, half=0.06):
    return {"ratio": ratio, "ci": [ratio * math.exp(-half), ratio * math.exp(half)], "reasons": {}}


def nothing(why):
    return {"ratio": None, "ci": None, "verdict": None, "reason": "secondary metric",
            "p_holm": None, "blocks_needed": None, "mde": None,
            "reasons": {"ratio": why, "ci": why}}  # fmt: skip


def phase(seconds, flops, size, remedies=()):
    return {
        "class": "memory_bandwidth_weights", "remedies": [*remedies], "bytes": size, "flops": flops,
        "intensity": flops / size, "ridge": 6.0,
        "mbu": size / seconds / 2e10, "mfu": flops / seconds / 1.2e11, "eta": 0.6,
        "votes": {"intensity": "memory", "utilisation": "memory", "elasticity": None},
        "roofline": {"byte_ratio": 1.0, "byte_realised": None, "ratio": 1.0, "realised": None,
                     "reasons": dict.fromkeys(("byte_realised", "realised"), "nothing promised")},
        "reasons": {"elasticity": "one batch size only"},
    }  # fmt: skip


def bottleneck(cell, size):
    tried = {
        "name": "4-bit weights",
        "why": "weights are 92 % of the bytes",
        "predicted_speedup": 2.6,
        "executed_speedup": 0.8,
        "artifact": "prune+lowrank+quant",
        "speedup": 1.5,
        "realised": 0.42,
    }
    nothing = dict.fromkeys(("executed_speedup", "artifact", "speedup", "realised"))
    untried = {**tried, "name": "2:4 sparsity", **nothing,
               "reasons": dict.fromkeys(nothing, "not in this run")}  # fmt: skip
    phases = {"prefill": phase(cell["prefill_s"], 1.5e9, size * 1.3), "decode": None,
              "reasons": {"decode": WHY}}  # fmt: skip
    if cell["tpot_s"]:
        decode = phase(cell["tpot_s"], 1.5e7, size, (tried, untried))
        phases = {**phases, "decode": decode, "reasons": {}}
    return {"class": "memory_bandwidth_weights", "phase": phases, "remedies": [], "reasons": {}}


def cell(point, gain, size):
    scenario, batch, prompt, new = point
    gain = gain / batch**0.15 if gain > 1 else gain
    values = {"ttft_s": 0.0002 * prompt / gain**0.3, "queue_s": 0.0005}
    values["prefill_s"] = values["ttft_s"] - 0.0005
    values["tpot_s"] = 0.0034 * batch**0.3 / gain if new > 1 else None
    values["e2e_s"] = values["ttft_s"] + (new - 1) * (values["tpot_s"] or 0)
    found = {
        "scenario": scenario, "batch": batch, "prompt_tokens": prompt, "new_tokens": new, **values,
        "tokens_per_s": batch * new / values["e2e_s"], "peak_bytes": 200_000_000 + int(size),
        "blocks": 8, "cpu_s": values["e2e_s"] * 1.9,
        "percentiles": {"itl_s": {"p50": values["tpot_s"], "p95": None, "p99": None, "reasons": {
            "p50": WHY, "p95": "59 samples are needed", "p99": "459 samples are needed"}}},
        "reasons": {} if new > 1 else {"tpot_s": WHY},
    }  # fmt: skip
    if new > 1:
        del found["percentiles"]["itl_s"]["reasons"]["p50"]
    ratios = {"ttft_s": gain**0.3, "prefill_s": gain**0.3, "tpot_s": gain, "e2e_s": gain**0.8}
    primary = {"single": "tpot_s", "batch": "tokens_per_s", "one_token": "ttft_s"}[scenario]
    ratios["tokens_per_s"] = gain**0.8
    found["speedup"] = {
        key: speedup(ratio) if key == primary else {**nothing(WHY), **interval(ratio)}
        for key, ratio in ratios.items()
    }
    found["speedup"]["queue_s"] = nothing("one request at a time never queues")
    if new == 1:
        found["speedup"]["tpot_s"] = nothing(WHY)
    found["bottleneck"] = bottleneck(found, size)
    return found


def quality(kl):
    return {
        "perplexity": 4.84 * math.exp(kl * 0.8), "kl_mean": kl, "top1_agreement": 1 - kl * 2,
        "positions": 12276, "kl": {"p50": kl / 3, "p99": kl * 9, "p999": kl * 30, "max": kl * 80,
                                   "ci": [kl * 0.9, kl * 1.1]},
        "ppl_ratio": {"ratio": math.exp(kl * 0.8), "ci": [math.exp(kl * 0.7), math.exp(kl * 0.9)]},
        "top1_ci": [1 - kl * 2.1, 1 - kl * 1.9], "flips": kl * 2, "serious_flips": kl / 10,
        "greedy_prefix": {"mean": 27.5, "tokens": 32},
        "floor": {"kl_mean": 2e-5, "top1_agreement": 0.996},
        "tier": "lossless" if kl < 1e-3 else "near" if kl < 0.01 else "compressed", "failures": [],
        "reasons": {},
    }  # fmt: skip


def artifact(lineage, gain, kl, size, name=None, key=None):
    return {
        "name": name or "+".join(lineage) or "baseline",
        "stage": lineage[-1] if lineage else "baseline",
        "role": "artifact" if lineage else "reference" if name else "baseline",
        "lineage": list(lineage), "format": "hf", "key": key or f"{hash_of(lineage):012x}",
        "bytes": int(size), "load_s": 0.2, "weight_bytes": int(size), "dtype": "float32",
        "device": "cpu", "stats": {}, "quality": quality(kl),
        "cells": [cell(point, gain, size) for point in CELLS],
        "crossover": {"scenario": "batch", "batch": None,
                      "reason": "faster at every batch size measured"}, "reasons": {},
    }  # fmt: skip


def hash_of(lineage):
    return int.from_bytes("+".join(lineage).encode().ljust(6, b"b")[-6:], "big")


def report(artifacts=None, cells=None):
    """The report of a run of five stages, or of these artifacts, in the first cells."""
    made = artifacts or [
        artifact([], 1, 0.0, 29e6),
        artifact([], 0.93, 2e-4, 29e6, "baseline-bfloat16"),
        *(
            artifact(STAGES[: n + 1], gain, kl, size)
            for n, (gain, kl, size) in enumerate(
                [(1.02, 0.004, 29e6), (1.1, 0.011, 27e6), (0.58, 0.02, 8e6), (4.1, 0.02, 8.7e6),
                 (6.8, 0.02, 8.7e6)]
            )
        ),
    ]  # fmt: skip
    points = [dict(zip(("scenario", "batch", "prompt_tokens", "new_tokens"), point, strict=True))
              for point in CELLS]  # fmt: skip
    for each in made:
        each["cells"] = each["cells"][:cells]
    made[-1]["crossover"] = {"scenario": "batch", "batch": 16, "reason": None}
    itself = {"ratio": 1.001, "ci": [0.99, 1.012], "half_width": 0.011, "reasons": {}}
    return {
        "schema": "optpipe.report/1",
        "run": {
            "command": ["python", "-m", "optpipe", "recipe=int4_ort", "quant.bits=4"],
            "overrides": ["quant.bits=4"], "recipe": "int4_ort", "stages": STAGES,
            "started": "2026-01-02T03:04:05+00:00", "duration_s": 61.0, "seed": 0, "threads": 2,
            "versions": {"optpipe": "0.1.0", "torch": "2.13.0"},
            "machine": {"cpu": "abacus", "cores": 2, "cores_usable": 2, "isa": ["avx2"],
                        "memory_bytes": 8_000_000_000, "memory_available_bytes": 4_000_000_000,
                        "os": "Linux", "python": "3.11.7", "load": [0.1, 0.2, 0.3]},
            "bench": {"blocks": 8, "threads": None}, "scenarios": {},
            "design": {
                "timing": "paired blocks", "sessions": [[a["name"] for a in made]],
                "prompts": [{**point, "ids_hash": "f"} for point in points],
                "quality": {"windows": 1, "window": 11, "text": "held.txt", "dtype": "float64",
                            "reasons": {}},
                "interval": "95%, Hodges-Lehmann",
                "resolution": [
                    {**point, **dict.fromkeys((*LATENCIES, "tokens_per_s", "peak_bytes"), itself)}
                    for point in points
                ],
                "instrument": {"ttft_error": 0.002, "tpot_error": 0.0001, "e2e_error": 0.0005},
            },
            "ceilings": {"cpu": {"float32": {"bytes_per_s": 2e10, "flops_per_s": 1.2e11}}},
            "invalid_reasons": [],
        },
        "artifacts": made,
        "recommendation": [{"scenario": "single", "artifact": made[-1]["name"],
                            "why": "the fastest within its tier"}],
    }  # fmt: skip


def samples(found):
    """Raw timings of every arm and cell: two warm-ups, eight blocks, one of them tainted."""
    for artifact in found["artifacts"]:
        for point in (cell for cell in artifact["cells"] if cell["e2e_s"]):
            for block in range(-2, 9):
                drift = (1 + 0.03 * math.sin(block / 2)) * (1.6 if block == -2 else 1)
                taken = int(1e9 * point["e2e_s"] * (drift + (0.5 if block == 4 else 0)))
                yield {
                    "arm": artifact["name"], "session": 0, "block": block, "position": 0,
                    "cell": {key: point[key] for key in
                             ("scenario", "batch", "prompt_tokens", "new_tokens")},
                    "reason": "warmup" if block < 0 else "tainted" if block == 4 else None,
                    "submit_ns": 0, "start_ns": 1, "token_ns": [taken], "cpu_s": 0.1,
                    "peak_bytes": 1, "tokens_hash": "f",
                }  # fmt: skip


def save(found, folder):
    """report.json and samples.jsonl.gz as a run leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(found))
    with gzip.open(folder / "samples.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(sample) + "\n" for sample in samples(found))
    return folder
