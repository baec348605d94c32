"""What passes the gate and what does not (T9): each broken artifact must fail, and say why."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe.artifact import Artifact
from optpipe.bench.fidelity import assess, gate, quality
from optpipe.bench.fidelity.divergence import compare, wilson
from optpipe.bench.fidelity.gate import tier
from optpipe.bench.fidelity.quality import Judged, QualityConfig, Windows
from optpipe.bench.fidelity.questions import Steadiness
from optpipe.bench.run import measure_arms
from optpipe.bench.scenario import Cell, Scenario
from optpipe.bench.timed.measure import BenchConfig
from optpipe.errors import GateError

VOCAB = 11
DEMO = quality.BUNDLED.parent


def judge(workers):
    ids_WS = np.random.default_rng(0).integers(0, VOCAB, (12, 40))
    given = Windows(ids_WS=ids_WS, source={}, is_text=True)
    return quality.judge(workers, "baseline", given, 60.0, lambda *_: None)


def context(*arms, **fields):
    references = [name for name in ("baseline", *arms) if name.startswith("baseline")]
    dtypes = dict.fromkeys(("baseline", *arms), "float32")
    known = {"references": references, "dtypes": dtypes, "is_text": True, "unpaired": None}
    return assess.Context(**(known | fields))


def assessed(judged, name="a", **fields):
    return assess.entry(name, judged, context(name, **fields))


def report(**qualities):
    """A report of a baseline and of these artifacts."""
    made = {"role": "artifact", "lineage": ["a"]}
    arms = [{**made, "name": name, "quality": q} for name, q in qualities.items()]
    base_quality = assess.without("not asked") | {"perplexity": 4.0}
    base = {"name": "baseline", "role": "baseline", "lineage": [], "quality": base_quality}
    return {"run": {"invalid_reasons": []}, "artifacts": [base, *arms]}


@pytest.fixture
def against(local):
    """against(**plan) -> what the gate knows of an arm 'a' of this plan, beside a baseline."""
    return lambda **plan: judge({"baseline": local("baseline"), "a": local("a", **plan)})


def test_a_copy_is_lossless_in_every_number(against):
    found = assessed(against())
    assert found["tier"] == "lossless" and found["failures"] == []
    assert (found["kl_mean"], found["top1_agreement"], found["flips"]) == (0, 1, 0)
    assert found["kl"]["ci"] == [0, 0] and found["kl"]["max"] == found["kl_topk_lower"] == 0
    assert found["ppl_ratio"] | {"reasons": {}} == {
        "ratio": 1, "ci": [1, 1], "ln": 0, "ln_ci": [0, 0], "se_ln": 0, "reasons": {},
    }  # fmt: skip
    assert found["serious_flips"] == found["delta_p"]["rms"] == found["excess"]["kl_mean"] == 0
    assert found["greedy_prefix"]["exact_share"] == found["top5_overlap"] == 1
    assert found["deterministic"] is True


def test_the_numbers_of_an_arm_are_those_of_their_definitions(against):
    judged = against(noise=0.5)
    found, windows = assessed(judged), judged.scored["a"]
    kl = np.concatenate([w.kl for w in windows])
    delta = np.array([w.nll - w.reference_nll for w in windows])
    margin, agrees = (
        np.concatenate([getattr(w, k) for w in windows]) for k in ("margin", "agrees")
    )
    assert found["kl_mean"] == pytest.approx(kl.mean()) and found["positions"] == 12 * 39
    assert found["kl"]["p99"] == pytest.approx(np.quantile(kl, 0.99))
    assert found["kl"]["p999"] is None and "2995" in found["kl"]["reasons"]["p999"]
    assert np.mean(found["kl"]["by_position"][:7]) == pytest.approx(
        kl.reshape(12, 39)[:, :35].mean()
    )
    assert found["ppl_ratio"]["ratio"] == pytest.approx(np.exp(delta.mean()))
    assert found["ppl_ratio"]["se_ln"] == pytest.approx(delta.mean(1).std(ddof=1) / 12**0.5)
    assert found["flips"] == pytest.approx((~agrees).mean()) and found["flips"] > 0
    assert found["serious_flips"] == pytest.approx((~agrees & (margin > 0.1)).mean())
    assert 0 < found["serious_flips"] < found["flips"]
    low, high = found["top1_ci"]
    assert low < found["top1_agreement"] < high


@pytest.mark.parametrize(
    ("kl", "top1", "ln_ppl", "floor", "want"),
    [
        (1e-3, 0.99, 0.001, 0, "lossless"),
        (1.1e-3, 0.99, 0.001, 0, "near"),
        (1.1e-3, 0.99, 0.001, 4e-4, "lossless"),
        (1e-3, 0.989, 0.001, 0, "near"),
        (1e-3, 0.99, 0.0011, 0, "near"),
        (0.01, 0.97, 0.01, 0, "near"),
        (0.011, 0.97, 0.01, 0, "compressed"),
        (0.01, 0.969, 0.01, 0, "compressed"),
        (0.1, 0.90, 0.05, 0, "compressed"),
        (0.101, 0.90, 0.05, 0, "degraded"),
        (0.1, 0.899, 0.05, 0, "degraded"),
        (0.1, 0.90, 0.051, 1, "degraded"),
        (0.0, 1.0, -0.5, 0, "lossless"),
    ],
)
def test_tiers_are_those_of_the_specification(kl, top1, ln_ppl, floor, want):
    assert tier(kl, top1, ln_ppl, floor) == want


def test_the_unfavourable_end_of_the_interval_decides(against):
    found = assessed(against(noise=0.02))
    assert found["kl_mean"] < 1e-3 and found["top1_agreement"] > 0.97
    assert found["top1_ci"][0] < 0.99 and found["tier"] != "lossless", "468 positions prove no 99 %"


@pytest.mark.parametrize(("windows", "tokens", "few"), [(4, 41, True), (10, 41, False)])
def test_too_few_positions_to_prove_a_tier_are_named(local, windows, tokens, few):
    """A copy: 160 positions without a miss bound top-1 at 97.7 %, 400 at 99.05 %; 381 at 99 %."""
    ids_WS = np.random.default_rng(0).integers(0, VOCAB, (windows, tokens))
    workers = {"baseline": local("baseline"), "a": local("a")}
    given = Windows(ids_WS=ids_WS, source={}, is_text=True)
    judged = quality.judge(workers, "baseline", given, 60.0, lambda *_: None)
    found = assessed(judged)
    assert found["tier"] == ("near" if few else "lossless")
    told = "160 positions cannot prove lossless: even without a difference it takes 381"
    assert found["reasons"].get("tier") == (told if few else None)
    enough = wilson(381, 381)[0], wilson(380, 380)[0]
    assert enough[0] >= 0.99 > enough[1]


def test_the_baseline_has_no_tier_of_its_own(against):
    found = assessed(against(), "baseline")
    assert found["tier"] is None and found["reasons"]["tier"] == assess.ITSELF
    assert found["kl_mean"] == 0 and found["failures"] == []


def test_a_tier_that_is_missed_is_not_blamed_on_the_number_of_positions(against):
    found = assessed(against(noise=0.3))
    assert found["tier"] == "degraded" and "tier" not in found["reasons"]


def test_one_window_has_no_interval_and_so_no_tier(against):
    judged = against()
    judged.scored = {name: windows[:1] for name, windows in judged.scored.items()}
    found = assessed(judged)
    assert found["tier"] is None and found["reasons"]["tier"] == assess.ONE_WINDOW
    with pytest.raises(GateError, match="no tier, 'compressed' is required: one window"):
        gate.check(report(a=found), QualityConfig(required="compressed"), [])


def logits_and_targets(folder, edit):
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    edit(lm)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 288, (6, 100)))
    with torch.inference_mode():
        return lm(input_ids=ids).logits[:, :-1].numpy(), ids[:, 1:].numpy()


def rounded(bits):
    """Fake quantization: every linear layer to the nearest of 2^bits levels, symmetric, by row."""

    def edit(lm):
        for module in lm.model.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data
                step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                module.weight.data = (weight / step).round() * step

    return edit


def broken(lm):
    """One matrix of one layer is noise of the same size."""
    weight = lm.model.layers[1].mlp.down_proj.weight.data
    torch.manual_seed(1)
    weight.copy_(torch.randn_like(weight) * weight.std())


def scored_as(folder, edit):
    """What the gate knows of the model after ``edit``, beside the model as it is."""
    reference, targets = logits_and_targets(folder, lambda lm: None)
    edited, _ = logits_and_targets(folder, edit)
    judged = Judged()
    for name, logits in (("baseline", reference), ("a", edited)):
        judged.scored[name] = [compare(*w) for w in zip(reference, logits, targets, strict=True)]
        judged.steady[name] = Steadiness(repeats=True, floor=judged.scored["baseline"][0])
    return judged


def test_fewer_bits_are_worse_in_every_measure(tiny):
    found = [assessed(scored_as(tiny(), rounded(bits))) for bits in (8, 6, 4, 3)]
    kl, agreement = ([f[k] for f in found] for k in ("kl_mean", "top1_agreement"))
    assert kl == sorted(kl) and len(set(kl)) == 4 and kl[0] > 0
    assert agreement == sorted(agreement, reverse=True) and len(set(agreement)) == 4
    assert kl[2] > 4 * kl[1] and kl[1] > 4 * kl[0], "two bits are 16 times the variance"


def test_a_broken_layer_fails(tiny):
    found = assessed(scored_as(tiny(), broken))
    assert found["tier"] == "degraded"
    with pytest.raises(GateError, match="'a' is degraded, 'compressed' is required: at the end"):
        gate.check(report(a=found), QualityConfig(required="compressed"), [])
    gate.check(report(a=found), QualityConfig(), [])


def test_a_tier_is_held_against_the_one_required(against):
    good = report(a=assessed(against()))
    for required in quality.TIERS:
        gate.check(good, QualityConfig(required=required), [])
    lost = report(a=assess.without("needs about 9 GB of memory"))
    with pytest.raises(GateError, match=r"'a' has no tier, 'near' is required: needs about 9 GB"):
        gate.check(lost, QualityConfig(required="near"), [])
    gate.check(lost, QualityConfig(), [])
    with pytest.raises(GateError, match="'a' has no perplexity"):
        gate.check(lost, QualityConfig(max_perplexity_increase=0.1), [])


def test_perplexity_is_held_against_its_limit(against):
    found = report(a=assessed(against()) | {"perplexity": 4.4001})
    with pytest.raises(GateError, match=r"perplexity 4.400, 10.0% over the baseline's 4.000"):
        gate.check(found, QualityConfig(max_perplexity_increase=0.1), [])
    gate.check(found, QualityConfig(max_perplexity_increase=0.101), [])


@pytest.mark.parametrize(
    ("fault", "why"), [("nan", assess.NOT_FINITE), ("moody", assess.NOT_REPEATED)]
)
def test_what_cannot_be_a_model_fails_whatever_is_required(against, fault, why):
    found = assessed(against(fault=fault))
    assert found["failures"][0] == why and found["tier"] is None
    with pytest.raises(GateError, match=f"'a' FAILS the quality gate: {why}"):
        gate.check(report(a=found), QualityConfig(), [])


def test_a_baseline_that_is_not_finite_is_named(local):
    judged = judge({"baseline": local("baseline", fault="nan"), "a": local("a")})
    assert assessed(judged)["failures"] == [assess.BASE_NOT_FINITE]
    assert assessed(judged, "baseline")["failures"] == [assess.NOT_FINITE]


def tokens(*lengths, steps=32, end=7):
    """Greedy tokens of as many prompts, the end token after so many."""
    made_NP = np.zeros((steps, len(lengths)), np.int64)
    for row, length in enumerate(lengths):
        made_NP[length - 1 :, row] = end
    return made_NP


LENGTHS = (20, 20, 24, 24, 20, 22, 24, 22)


@pytest.mark.parametrize(
    ("own", "ratio", "fails"),
    [
        (LENGTHS, 1.0, False),
        ((3, *LENGTHS[1:]), 0.903, False),  # one of eight ends early: no evidence yet
        (tuple(n // 2 for n in LENGTHS), 0.5, True),  # truncated
        ((32,) * 8, 1.455, True),  # it does not stop
    ],
)
def test_texts_of_another_length_fail(against, own, ratio, fails):
    judged = against()
    judged.greedy = {"baseline": tokens(*LENGTHS), "a": tokens(*own)}
    judged.stops = dict.fromkeys(judged.greedy, frozenset({7}))
    found = assessed(judged)
    assert found["output_length"]["ratio"] == pytest.approx(ratio, abs=1e-3)
    assert bool(found["failures"]) == fails and (found["tier"] is None) == fails
    assert fails == any("times as long" in why for why in found["failures"])


def test_without_an_end_there_is_no_length_to_compare(against):
    judged = against()
    found = assessed(judged)["output_length"]
    assert found["ratio"] is None and found["reasons"]["ratio"].startswith("no output ended")


def test_a_greedy_prefix_ends_at_the_first_other_token(against):
    judged, same = against(), np.arange(12).reshape(4, 3)
    other = same.copy()
    other[1, 0] = other[3, 0] = other[3, 2] = 99
    judged.greedy = {"baseline": same, "a": other}
    found = assessed(judged)["greedy_prefix"]
    assert found["mean"] == pytest.approx((1 + 4 + 3) / 3) and found["tokens"] == 4
    assert found["first_divergence"] == 1 and found["exact_share"] == pytest.approx(1 / 3)
    judged.greedy["a"] = same[:2]  # it ran out of time
    found = assessed(judged)["greedy_prefix"]
    assert found["tokens"] == 2 and found["first_divergence"] is None and found["exact_share"] == 1


def test_the_floor_is_the_batch_and_the_dtype_that_an_arm_uses(local):
    workers = {
        "baseline": local("baseline", batch_noise=0.1),
        "baseline-bfloat16": local("baseline-bfloat16", noise=0.2, batch_noise=0.05),
        "a": local("a"),
    }
    judged = judge(workers)
    base, low = (judged.steady[name].floor for name in ("baseline", "baseline-bfloat16"))
    assert base.kl.mean() > 1e-4
    floor = assessed(judged)["floor"]
    assert floor["kl_mean"] == base.kl.mean() and floor["top1_agreement"] == base.agrees.mean()
    arms = ("baseline", "baseline-bfloat16", "a")
    dtypes = dict(zip(arms, ("float32", "bfloat16", "bfloat16"), strict=True))
    known = context(*arms[1:], dtypes=dtypes, references=arms[:2])
    found = assess.entry("a", judged, known)
    apart = np.mean([w.kl.mean() for w in judged.scored["baseline-bfloat16"]])
    assert found["floor"]["kl_mean"] == pytest.approx(max(base.kl.mean(), low.kl.mean(), apart))
    assert found["floor"]["kl_mean"] >= low.kl.mean(), "never below the batch's effect in its dtype"
    assert found["excess"]["kl_mean"] == pytest.approx(found["kl_mean"] - found["floor"]["kl_mean"])
    alone = assess.entry("a", judged, context("a", dtypes=dtypes, references=arms[:1]))
    assert "no baseline in bfloat16" in alone["floor"]["reasons"]["dtype"]


@pytest.fixture
def copy(tmp_path):
    """A folder with the demo model's tokenizer and settings."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in DEMO.glob("*.json"):
        shutil.copy(file, folder)
    return folder


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_swapped_tokenizer_fails(copy):
    assert gate.file_faults(copy, DEMO) == []
    edit(copy / "tokenizer.json", lambda content: content.update(truncation=None))
    assert gate.file_faults(copy, DEMO) == [], "other bytes, the same tokens"

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    edit(copy / "tokenizer.json", swap)
    assert gate.file_faults(copy, DEMO) == ["its tokenizer makes other tokens than the baseline's"]
    (copy / "tokenizer.json").unlink()
    assert gate.file_faults(copy, DEMO) == ["it lost the tokenizer of the baseline"]


@pytest.mark.parametrize("engine", [False, True])
def test_a_wrong_end_of_text_fails(copy, engine):
    if engine:
        (copy / "engine.json").write_text('{"stop_tokens": [5]}')
    else:
        edit(copy / "generation_config.json", lambda content: content.update(eos_token_id=5))
    assert gate.file_faults(copy, DEMO) == ["its texts end at tokens [5], the baseline's at [0]"]


def test_faults_of_files_are_failures(against):
    judged = against()
    judged.faults["a"] = ["it lost the tokenizer of the baseline"]
    assert assessed(judged)["failures"] == judged.faults["a"]


def test_content_is_hashed_with_its_names(tmp_path):
    folder = tmp_path / "a"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "w").write_bytes(b"1")
    made = Artifact(path=folder, format="hf", key="k")
    first = gate.content_hash(made)
    assert gate.content_hash(made) == first and len(first) == 64
    (folder / "part" / "w").rename(folder / "part" / "v")
    assert gate.content_hash(made) != first


def test_what_is_edited_after_the_gate_is_not_what_was_judged(arm):
    given = [arm("baseline"), arm("a", hoards=True), arm("b")]
    bench = BenchConfig(blocks=1, processes=1, max_processes=1, warmup=2, warmup_s=0, budget_s=9)

    def progress(what, done, total):
        if what.startswith("benchmark: single"):
            (given[1].artifact.path / "weights").write_bytes(bytes(999) + b"1")

    scenarios = {"single": Scenario(prompt_tokens=[4], new_tokens=2)}
    found = measure_arms(given, bench, scenarios, progress)
    assert found.judged.scored.keys() == {"baseline", "a", "b"}
    peaks = {sample.peak_bytes for sample in found.measured.samples if sample.arm == "a"}
    assert peaks in ({1}, {None}), "scoring must not be in the memory of a timed process"
    assert found.judged.expected.keys() == {(a.name, found.cells[0]) for a in given}
    assert [*found.changed] == ["a"] and found.unlike == {}
    built = report(a=assessed(found.judged))
    with pytest.raises(GateError, match="INVALID: artifact_changed: 'a' was edited after the"):
        gate.check(built, QualityConfig(), [*found.changed.values()])
    gate.check(built, QualityConfig(), [])


def test_the_table_has_a_row_for_every_arm_and_a_dash_for_what_is_undefined(against):
    noisy, lost = assessed(against(noise=0.5)), assess.without("too large")
    broken = assessed(against(fault="nan"))
    rows = gate.rows(report(noisy=noisy, lost=lost, broken=broken))[1:]
    assert {len(row) for row in rows} == {len(gate.HEADER)}
    assert rows[0][:2] == ["noisy", "degraded"]
    assert rows[0][3].startswith(f"{noisy['kl_mean']:.2g} [{noisy['kl']['ci'][0]:.2g}, ")
    assert rows[1] == ["lost", *["-"] * 8] and rows[2] == ["broken", "FAIL", *["-"] * 7]


def test_timed_tokens_must_be_those_of_the_gate():
    one, two = Cell("single", 1, 4, 2), Cell("batch", 4, 4, 2)
    expected = {("a", one): "x", ("b", one): "y"}
    good = {("a", one, "x"), ("b", one, "y"), ("a", two, "z")}
    assert gate.audit(good, expected) == {}
    assert gate.audit(good | {("b", one, "x")}, expected) == {  # one of its processes
        "b": "other_answers: 'b' gave other tokens in 'single 1 x 4 + 2' than when it was judged"
    }
