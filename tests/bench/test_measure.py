import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from optpipe.bench.evidence.statistics import fewest_pairs
from optpipe.bench.fidelity.quality import QualityConfig
from optpipe.bench.scenario import Cell, hash_ids, prompt_seed, prompts
from optpipe.bench.timed import blocks as blocks_module
from optpipe.bench.timed import timing as module
from optpipe.bench.timed.measure import BenchConfig, Measured, Session, measure
from optpipe.bench.timed.timing import WARM
from optpipe.bench.worker import Iterate
from optpipe.config import typed
from optpipe.errors import InputError

CONF = sorted((Path(__file__).parents[2] / "conf" / "bench").glob("*.yaml"))

CELL, ONE = Cell("single", 2, 8, 3), Cell("single", 1, 8, 1)
QUICK = {
    "blocks": 6, "warmup": 2, "warmup_s": 0, "seed": 5, "iteration_limit_s": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(blocks_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(module, "TURN_S", 0.0)


def timings(workers, cells=(CELL,), budget_s=60.0, **given):
    session = Session(
        number=0,
        workers=workers,
        loaded={n: replace(w.loaded, gpu=getattr(w, "gpu", None)) for n, w in workers.items()},
        budget_s=budget_s,
        meter=lambda: None,
    )
    found, said = Measured(), []
    config = BenchConfig(**(QUICK | given))
    measure(session, cells, config, found, lambda *what: said.append(what))
    return found, said


def blocks(found, reason=None):
    """(block -> arms in the order they ran)"""
    by_block = {}
    for sample in sorted(found.samples, key=lambda s: s.submit_ns):
        if sample.reason == reason and sample.iteration == 0:
            by_block.setdefault(sample.block, []).append(sample.arm)
    return by_block


def test_every_block_runs_every_arm_once_in_an_order_that_varies_with_the_seed(local):
    def order(seed):
        found, _ = timings(
            {name: local(name) for name in "abc"},
            seed=seed,
            blocks=60,
            processes=1,
            max_processes=1,
        )
        return blocks(found)

    first = order(1)
    assert [*first] == [*range(60)]
    assert all(sorted(arms) == ["a", "b", "c"] for arms in first.values())
    assert len({tuple(arms) for arms in first.values()}) == 6, "all orders of three occur"
    assert min(Counter(arms[0] for arms in first.values()).values()) >= 10
    assert first == order(1) != order(2)


def test_positions_are_the_order_within_a_block(local):
    found, _ = timings({name: local(name) for name in "abc"})
    for block, arms in blocks(found).items():
        placed = {s.position: s.arm for s in found.samples if s.block == block and not s.reason}
        assert [placed[i] for i in range(3)] == arms


def test_warm_up_comes_first_and_is_kept_apart(local):
    found, _ = timings({name: local(name) for name in "ab"}, warmup=3)
    assert Counter(s.reason for s in found.samples) == {"warmup": 6, None: 12}
    assert [s.reason for s in found.samples[:6]] == ["warmup"] * 6
    assert {s.block for s in found.samples[:6]} == {-3, -2, -1}


def test_all_arms_get_the_same_fresh_token_ids_and_two_blocks_share_them(local):
    workers = {name: local(name) for name in "ab"}
    found, _ = timings(workers)
    asked = {
        name: [c.ids_BS for c in worker.asked if isinstance(c, Iterate)]
        for name, worker in workers.items()
    }
    numbers = [0, 1, WARM, WARM, WARM + 1, WARM + 1, WARM + 2, WARM + 2]
    expected = [prompts(CELL, 11, prompt_seed(5, number)) for number in numbers]
    for given in asked.values():
        np.testing.assert_array_equal(given, expected)
    assert found.prompts[CELL] == {
        number: hash_ids(ids) for number, ids in zip(numbers, expected, strict=True)
    }
    answers = {(s.prompt, s.tokens_hash) for s in found.samples}
    assert len(answers) == 5, "equal arms answer alike"


def test_a_turn_repeats_short_iterations_on_further_prompts(local, monkeypatch):
    monkeypatch.setattr(module, "TURN_S", 0.012)
    found, _ = timings({name: local(name, prefill_s=0.005) for name in "ab"})
    counts = Counter((s.arm, s.block) for s in found.samples if s.reason is None)
    assert set(counts.values()) == {3} or set(counts.values()) == {2}
    assert {s.prompt for s in found.samples if s.block in (0, 1)} == {
        WARM + i for i in range(counts["a", 0])
    }


def test_a_gpu_makes_turns_longer_and_a_slow_arm_keeps_them_short(local, monkeypatch):
    """A GPU needs some 100 ms until its clock keeps within its power limit."""
    monkeypatch.setattr(module, "GPU_TURN_S", 0.1)
    for gpu, wanted in ((None, {1}), ("GPU-7", {*range(2, 21)})):  # fewer on a busy machine
        workers = {name: local(name, prefill_s=0.005) for name in "ab"}
        workers["a"].gpu = gpu
        found, _ = timings(workers, (ONE,), blocks=1, processes=1, max_processes=1)
        counts = Counter(s.arm for s in found.samples if s.reason is None)
        assert set(counts.values()) <= wanted, (gpu, counts)
    assert module.repeats([0.1, 0.2], 0.5) == 5, "as the quickest needs"
    assert module.repeats([0.1, 0.06], 0.5) == 9, "which may be another"
    assert module.repeats([0.3, 0.04], 0.25) == 1, "but not one that is far from the baseline"
    assert module.repeats([0.3, 0.04], 0.25, math.inf) == 7, "unless clocks hang on long turns"
    assert module.repeats([0.1, 5.0], 0.5) == 2, "no arm longer than twenty turns"
    assert module.repeats([9.0], 0.05) == 1 and module.repeats([0.01, 0.02], 0.5) == 50


def test_an_arm_is_warmed_again_before_its_turn_where_there_are_others(local):
    workers = {name: local(name) for name in "ab"}
    timings(workers)
    kinds = [type(command).__name__ for command in workers["a"].asked]
    assert kinds == ["Rewarm", "Iterate"] * 8
    alone = local("c")
    timings({"c": alone})
    assert {type(command).__name__ for command in alone.asked} == {"Iterate"}


def test_an_arm_that_is_too_slow_leaves_the_cell_with_the_reason(local):
    workers = {"base": local("base"), "slow": local("slow", prefill_s=0.03)}
    found, _ = timings(workers, iteration_limit_s=0.02)
    assert "more than bench.iteration_limit_s=0.02" in found.dropped["slow", CELL]
    assert "for 1 of 3 tokens" in found.dropped["slow", CELL]
    assert all(arms == ["base"] for arms in blocks(found).values())
    assert not workers["slow"].killed


def test_one_slow_warm_up_iteration_is_noted_and_costs_nothing(local):
    """Such as one that compiles; the baseline too would be lost by it."""
    workers = {"base": local("base", first_s=0.05), "other": local("other")}
    found, _ = timings(workers, iteration_limit_s=0.04)
    assert found.dropped == {} and len(blocks(found)) == 6
    assert "the one after it did not" in found.slow_starts["base", CELL]
    assert [*found.slow_starts] == [("base", CELL)]


def test_an_arm_that_breaks_costs_itself_only_and_says_why(local):
    workers = {"base": local("base"), "bad": local("bad", fault="raise")}
    found, _ = timings(workers)
    assert "the kernel is unhappy" in found.dead["bad"] and workers["bad"].killed
    assert {arm for arms in blocks(found).values() for arm in arms} == {"base"}
    assert len(blocks(found)) == 6


def test_an_arm_that_never_answers_is_ended_and_leaves_all_cells(local):
    workers = {"base": local("base"), "stuck": local("stuck", fault="hang")}
    found, _ = timings(workers, cells=[CELL, CELL._replace(batch=1)])
    assert workers["stuck"].killed
    assert "no answer within 15 s" in found.dead["stuck"]
    assert {arm for arms in blocks(found).values() for arm in arms} == {"base"}


def test_a_cell_that_does_not_fit_the_cache_of_an_arm_is_not_run_there(local):
    workers = {"base": local("base"), "small": local("small", capacity=10)}
    found, _ = timings(workers)
    why = "not measured: 11 tokens do not fit in its KV cache of 10"
    assert found.dropped == {("small", CELL): why}
    assert workers["small"].asked == []


def test_more_rows_than_an_arm_takes_cost_it_that_cell_and_no_other(local):
    """An engine built for one row, beside one that takes any number."""
    alone = CELL._replace(batch=1)
    workers = {"base": local("base"), "small": local("small", max_batch=1)}
    found, _ = timings(workers, cells=[CELL, alone])
    why = "not measured: 2 rows at once are more than the 1 it was built for"
    assert found.dropped == {("small", CELL): why} and not found.dead
    counts = Counter((s.arm, s.cell) for s in found.samples if s.reason is None)
    assert counts == {("base", CELL): 6, ("base", alone): 6, ("small", alone): 6}


def test_the_budget_ends_a_cell_after_a_whole_block_but_not_before_the_first(local):
    workers = {name: local(name, prefill_s=0.001) for name in "ab"}
    found, _ = timings(workers, budget_s=0.0)
    assert blocks(found).keys() == {0}
    assert found.stopped[CELL].endswith("after 1 of 6 blocks of a process")


def test_the_budget_covers_the_warm_up(local):
    """Two iterations of every arm at least, but not as long as warmup_s allows."""
    worker = local("a")
    found, _ = timings({"a": worker}, budget_s=0.0, warmup_s=1e6)
    assert Counter(s.reason for s in found.samples) == {"warmup": 2, None: 1}


def test_limits_do_not_reach_into_timed_iterations(local):
    worker = local("a")
    timings({"a": worker})
    limits = [command.limit_ns for command in worker.asked if isinstance(command, Iterate)]
    assert limits == [5_000_000_000] * 2 + [None] * 6


def test_progress_counts_up_to_its_total(local):
    cells = [CELL, CELL._replace(batch=1)]
    _, said = timings({"a": local("a")}, cells=cells)
    counts = [done for _, done, _ in said]
    assert counts == sorted(counts) and {total for *_, total in said} == {200}
    assert counts[-1] == 200
    assert said[0][0] == "benchmark: single 1 x 8 + 3", "short cells come first"


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_option_gives_every_value_and_enough_blocks_for_an_interval(path):
    content = OmegaConf.create({"store": "store", "bench": OmegaConf.load(path)}).bench
    policy = typed(content, BenchConfig, "bench")
    assert policy.blocks >= fewest_pairs(policy.level)
    assert set(content) == {field.name for field in fields(BenchConfig)}
    assert set(content.quality) == {field.name for field in fields(QualityConfig)}


def test_there_is_a_quick_and_a_full_option():
    assert {"quick", "full"} <= {path.stem for path in CONF}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"blocks": 0}, "bench.blocks=0"),
        ({"warmup": 1}, "bench.warmup=1"),
        ({"max_processes": 1}, "bench.max_processes=1: at least 2"),
        ({"delta": 0.0}, "bench.delta=0.0: between 0 and 1"),
        ({"threads": 0}, "bench.threads=0: 1 to"),
        ({"threads": 9999}, "bench.threads=9999: 1 to"),
        ({"dtypes": []}, r"bench.dtypes=\[\]"),
        ({"dtypes": ["float32", "float32"]}, "each once"),
        ({"dtypes": ["int3"]}, "'int3' is not one of float32, float16, bfloat16"),
    ],
)
def test_bad_values_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**given)
