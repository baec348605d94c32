import pytest

from optpipe.bench.summary import crossover, recommendation


def cell(batch, low, high, scenario="batch", verdict=None):
    speedup = {"ratio": (low + high) / 2, "ci": [low, high], "verdict": verdict}
    if verdict:
        speedup["p_holm"] = 0.01
    return {
        "scenario": scenario,
        "batch": batch,
        "prompt_tokens": 8,
        "speedup": {"tokens_per_s": speedup},
    }


def test_the_crossover_is_the_first_batch_that_is_clearly_slower():
    sweep = [cell(8, 0.7, 0.8), cell(1, 1.2, 1.4), cell(4, 0.8, 0.95), cell(2, 0.9, 1.1)]
    found = crossover(sweep)
    assert (found["scenario"], found["batch"]) == ("batch", 4)
    found = crossover([cell(1, 1.2, 1.4), cell(2, 0.9, 1.1)])
    assert found["batch"] is None and "not shown to be slower" in found["reason"]
    dip = [cell(1, 0.97, 0.99), cell(4, 1.2, 1.3), cell(16, 1.4, 1.5)]
    assert crossover(dip)["batch"] is None  # slower at one batch, not from it on
    void = [cell(1, 1.2, 1.4), cell(2, 0.8, 0.9, verdict="INVALID"), cell(4, 0.7, 0.8)]
    found = crossover(void)
    assert (found["batch"], found["reason"]) == (
        4, "tokens/s: slower from here on; INVALID at batch 2"
    )  # fmt: skip
    found = crossover(void[:2])
    assert found["batch"] is None and found["reason"].endswith("; INVALID at batch 2")
    assert crossover([cell(1, 1.2, 1.4)])["reason"] == "no scenario has two batch sizes"
    assert crossover([])["batch"] is None


def artifact(name, low, verdict, tier, role="artifact"):
    return {
        "name": name,
        "role": role,
        "quality": {"tier": tier},
        "cells": [cell(4, low, low + 0.1, verdict=verdict)],
    }


@pytest.mark.parametrize(
    ("others", "best", "why"),
    [
        ([("a", 1.2, "FASTER", "near"), ("b", 1.5, "FASTER", "lossless")], "b", "1.50 times"),
        ([("a", 1.2, "FASTER", "near"), ("b", 1.5, "FASTER", "degraded")], "a", "near"),
        ([("a", 1.2, "FASTER", "near"), ("b", 1.5, "FASTER", "near", "endpoint")], "a", "near"),
        ([("a", 1.2, "FASTER", None), ("b", 0.5, "SLOWER", "near")], "base", "'a' (unknown)"),
        ([("a", 1.2, "INCONCLUSIVE", "near"), ("b", 0.5, "SLOWER", "near")], "base", "no artifact"),
    ],
)
def test_the_recommendation_is_the_fastest_that_is_good_enough(others, best, why):
    base = {
        "name": "base",
        "role": "baseline",
        "quality": {"tier": None},
        "cells": [cell(4, 1.0, 1.0)],
    }
    [found] = recommendation([base, *(artifact(*other) for other in others)])
    assert (found["scenario"], found["artifact"]) == ("batch", best)
    assert why in found["why"]


def test_two_cells_of_a_scenario_are_two_recommendations():
    base = {
        "name": "base",
        "role": "baseline",
        "quality": {},
        "cells": [cell(1, 1.0, 1.0), cell(4, 1.0, 1.0)],
    }
    quick = {**artifact("quick", 1.2, "FASTER", "near")}
    quick["cells"] = [cell(1, 1.2, 1.3, verdict="FASTER"), cell(4, 0.8, 0.9, verdict="SLOWER")]
    found = recommendation([base, quick])
    assert [(one["scenario"], one["artifact"]) for one in found] == [
        ("batch 1 x 8, tokens_per_s", "quick"), ("batch 4 x 8, tokens_per_s", "base"),
    ]  # fmt: skip


def test_without_verdicts_there_is_nothing_to_recommend():
    base = {"name": "base", "role": "baseline", "quality": {}, "cells": [cell(1, 1.0, 1.0)]}
    assert recommendation([base]) == []
