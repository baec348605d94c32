import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optpipe.artifact import Artifact
from optpipe.bench import quality
from optpipe.bench.backend import open_backend
from optpipe.bench.quality import Compare, QualityConfig, Reference, Sums, Windows, cut, divergence
from optpipe.errors import InputError


def random_logits(positions, vocab, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(positions, vocab))).astype(np.float32)


def judged(workers, baseline="base", budget_s=60.0, count=3):
    rng = np.random.default_rng(0)
    ids_WS = rng.integers(0, 11, (count, 20))
    given = Windows(ids_WS=ids_WS, source={}, is_text=True)
    return quality.judge(workers, baseline, given, budget_s, lambda *_: None)


@pytest.mark.parametrize("positions", [1, 64, 150])
def test_sums_are_those_of_torch_in_float64(positions):
    p, q = random_logits(positions, 97, 0), random_logits(positions, 97, 1)
    targets = np.random.default_rng(2).integers(0, 97, positions)
    found = divergence(p, q, targets)
    left, right = (torch.from_numpy(x).double() for x in (p, q))
    log_p, log_q = left.log_softmax(-1), right.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    nll = torch.nn.functional.cross_entropy(right, torch.from_numpy(targets), reduction="sum")
    assert found.kl == pytest.approx(kl.item(), rel=1e-9)
    assert found.nll == pytest.approx(nll.item(), rel=1e-9)
    assert found.agreed == int((left.argmax(-1) == right.argmax(-1)).sum())
    assert found.positions == positions


def test_a_model_does_not_diverge_from_itself_even_with_extreme_logits():
    p = random_logits(70, 50, 0, scale=200.0)
    found = divergence(p, p.copy(), np.zeros(70, np.int64))
    assert found.kl == 0 and found.agreed == 70


@given(st.integers(0, 10_000), st.floats(0.01, 50))
def test_kl_is_never_negative_and_a_constant_does_not_matter(seed, scale):
    p, q = random_logits(5, 23, seed, scale), random_logits(5, 23, seed + 1, scale)
    targets = np.zeros(5, np.int64)
    found = divergence(p, q, targets)
    assert found.kl >= 0
    assert divergence(p + 64, q, targets).kl == pytest.approx(found.kl, rel=1e-3, abs=1e-4)


def test_more_noise_is_more_divergence_and_less_agreement(local):
    noises = [0.0, 0.1, 0.5, 2.0]
    workers = {"base": local("base")} | {str(n): local(str(n), noise=n) for n in noises}
    sums = judged(workers).sums
    kl = [sums[str(n)].kl for n in noises]
    agreed = [sums[str(n)].agreed for n in noises]
    assert kl[0] == 0 and kl == sorted(kl) and len(set(kl)) == 4
    assert agreed == sorted(agreed, reverse=True) and agreed[0] == 3 * 19


def test_all_arms_see_the_same_windows_when_time_runs_out(local):
    workers = {name: local(name) for name in ("base", "other")}
    found = judged(workers, budget_s=0.0)
    assert found.windows == 1
    assert {total.positions for total in found.sums.values()} == {19}


def test_an_arm_that_is_lost_has_a_reason_and_the_others_their_numbers(local):
    workers = {"base": local("base"), "a": local("a", fault="hang"), "b": local("b")}
    found = judged(workers)
    assert "'a' was ended" in found.missing["a"] and workers["a"].killed
    assert found.sums["b"].positions == 3 * 19


def test_without_the_baseline_there_is_no_comparison(local):
    workers = {"base": local("base", fault="hang"), "a": local("a")}
    assert judged(workers).missing.keys() == {"base", "a"}, "no stale reference"
    alone = judged({"a": local("a", noise=1.0)}, baseline=None)
    assert alone.sums["a"].positions == 3 * 19


def test_undefined_is_null_with_a_reason():
    total = Sums(nll=math.nan, kl=0.5, agreed=9, positions=10)
    found = quality.result(total, is_text=True, unpaired=None)
    assert found["perplexity"] is None and "finite" in found["reasons"]["perplexity"]
    assert (found["kl_mean"], found["top1_agreement"]) == (0.05, 0.9)
    found = quality.result(Sums(nll=10, positions=10), is_text=False, unpaired="no room")
    assert (found["perplexity"], found["kl_mean"], found["top1_agreement"]) == (None, None, None)
    assert found["reasons"].keys() == {"perplexity", "kl_mean", "top1_agreement"}
    overflow = quality.result(Sums(nll=1e9, positions=1), is_text=True, unpaired=None)
    assert overflow["perplexity"] is None


def test_perplexity_is_that_of_the_text_given_the_window_so_far(tiny, tmp_path):
    """Against the loss transformers computes itself."""
    from transformers import AutoModelForCausalLM

    folder = tiny()
    ids_S = np.random.default_rng(0).integers(0, 288, 100)
    file = tmp_path / "reference.npy"
    with open_backend(Artifact(path=folder, format="hf", key="k")) as backend:
        reference = Reference(ids_S=ids_S, file=file)(backend)
        again = Compare(ids_S=ids_S, file=file)(backend)
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(ids_S)[None]
    with torch.inference_mode():
        loss = lm(input_ids=ids, labels=ids).loss.item()
    assert reference.nll / reference.positions == pytest.approx(loss, rel=1e-5)
    assert again == reference and again.kl == 0 and again.agreed == again.positions == 99


def test_windows_are_spread_evenly_and_do_not_overlap():
    found = cut(list(range(100)), [], size=10, most=4)
    assert found[:, 0].tolist() == [0, 20, 50, 70] and found.shape == (4, 10)
    assert cut(list(range(35)), [7], size=11, most=9).tolist() == [
        [7, *range(10)], [7, *range(10, 20)], [7, *range(20, 30)],
    ]  # fmt: skip
    assert cut([1, 2, 3], [], size=10, most=4).tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match="1 tokens"):
        cut([1], [], size=10, most=4)


def test_the_bundled_text_in_the_tokens_of_the_demo_model():
    found = quality.windows(quality.BUNDLED.parent, QualityConfig(windows=3), 64, 4096, 0)
    assert found.ids_WS.shape == (3, 64) and found.is_text
    assert found.source["text"] == "heldout.txt" and len(found.source["text_sha256"]) == 64


def test_a_model_without_a_tokenizer_gets_random_ids(tiny):
    found = quality.windows(tiny(), QualityConfig(windows=2), 128, 288, 3)
    assert not found.is_text and found.ids_WS.shape == (2, 128)
    again = quality.windows(tiny(), QualityConfig(windows=2), 128, 288, 3)
    np.testing.assert_array_equal(found.ids_WS, again.ids_WS)


def test_bad_values_are_refused(tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("hm")
    binary.write_bytes(b"\xff" * 100)
    for fields, message in [
        ({"windows": 0}, "windows=0"),
        ({"max_perplexity_increase": -0.1}, "max_perplexity_increase=-0.1"),
        ({"text": str(tmp_path / "none.txt")}, "none.txt': No such file"),
        ({"text": str(short)}, "too short"),
        ({"text": str(binary)}, "not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message):
            QualityConfig(**fields)
