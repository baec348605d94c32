"""The gate's arithmetic against torch, scipy and simulation (T9)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import binomtest

from optpipe.bench.fidelity.divergence import clustered, compare, concatenate, quantile, wilson


def random_logits(positions, vocab, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(positions, vocab))).astype(np.float32)


def vendors(p_NV, q_NV):
    """The wrong formula of compute_kl_divergence.py:119: absolute differences of the logs."""
    log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p_NV, q_NV))
    return (log_p.exp() * (log_p - log_q).abs()).sum(-1).numpy()


def ours(p_NV, q_NV):
    return compare(p_NV, q_NV, np.zeros(len(p_NV), np.int64)).kl


def against_other_libraries(kl):
    """The test of a KL: torch and scipy to 1e-9, whatever the scale."""
    for scale in (0.1, 3.0, 20.0):
        p, q = random_logits(70, 97, 0, scale), random_logits(70, 97, 1, scale)
        log_p, log_q = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
        want = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        np.testing.assert_allclose(kl(p, q), want.numpy(), rtol=1e-9, atol=1e-9)
        entropy = rel_entr(log_p.exp().numpy(), log_q.exp().numpy()).sum(-1)
        np.testing.assert_allclose(kl(p, q), entropy, rtol=1e-9, atol=1e-9)


def test_kl_is_that_of_torch_and_scipy_and_not_the_vendors():
    against_other_libraries(ours)
    with pytest.raises(AssertionError):
        against_other_libraries(vendors)


@pytest.mark.parametrize("positions", [1, 64, 150])
def test_the_rest_is_that_of_torch_in_float64(positions):
    p, q = random_logits(positions, 97, 0), random_logits(positions, 97, 1)
    targets = np.random.default_rng(2).integers(0, 97, positions)
    found = compare(p, q, targets)
    left, right = (torch.from_numpy(x).double() for x in (p, q))
    for logits, nll in ((left, found.reference_nll), (right, found.nll)):
        want = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(targets), reduction="none"
        )
        np.testing.assert_allclose(nll, want.numpy(), rtol=1e-9)
    assert found.agrees.tolist() == (left.argmax(-1) == right.argmax(-1)).tolist()
    best = left.softmax(-1).topk(2).values
    np.testing.assert_allclose(found.margin, (best[:, 0] - best[:, 1]).numpy(), rtol=1e-9)
    fives = zip(left.topk(5).indices.tolist(), right.topk(5).indices.tolist(), strict=True)
    shared = [len({*mine} & {*theirs}) / 5 for mine, theirs in fives]
    np.testing.assert_allclose(found.top5, shared)


def test_a_model_does_not_diverge_from_itself_even_with_extreme_logits():
    p = random_logits(70, 50, 0, scale=200.0)
    found = compare(p, p.copy(), np.zeros(70, np.int64))
    assert (found.kl == 0).all() and (found.kl_topk == 0).all()
    assert found.agrees.all() and (found.top5 == 1).all()
    assert (found.nll == found.reference_nll).all()


@given(st.integers(0, 10_000), st.floats(0.01, 50))
def test_kl_is_never_negative_and_the_top_tokens_bound_it_from_below(seed, scale):
    p, q = random_logits(5, 43, seed, scale), random_logits(5, 43, seed + 1, scale)
    found = compare(p, q, np.zeros(5, np.int64))
    assert (found.kl >= 0).all()
    assert (found.kl_topk >= 0).all() and (found.kl_topk <= found.kl + 1e-12).all()
    shifted = compare(p + 64, q, np.zeros(5, np.int64))
    np.testing.assert_allclose(shifted.kl, found.kl, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_logit_that_is_not_finite_leaves_nothing_to_judge(bad):
    p, q = random_logits(70, 30, 0), random_logits(70, 30, 1)
    q[69, 3] = bad
    assert not compare(p, q, np.zeros(70, np.int64)).finite
    assert not compare(q, p, np.zeros(70, np.int64)).finite
    assert compare(p[:64], q[:64], np.zeros(64, np.int64)).finite


def correlated(rng, windows, tokens, trials):
    """Tokens that share half of their variance within a window, and half with their neighbours."""
    noise = rng.normal(size=(trials, windows, tokens + 20))
    smooth = np.cumsum(noise, axis=-1)
    local = (smooth[..., 20:] - smooth[..., :-20]) / math.sqrt(20)
    return 0.3 + local + 0.3 * rng.normal(size=(trials, windows, 1))


@pytest.mark.parametrize("windows", [4, 12])
def test_the_clustered_interval_covers_what_it_promises_where_the_naive_one_does_not(windows):
    trials = 2000
    samples = correlated(np.random.default_rng(7), windows, 60, trials)
    intervals = np.array([clustered(list(sample)).ci for sample in samples])
    covered = ((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)).mean()
    assert 0.93 <= covered <= 0.97
    flat = samples.reshape(trials, -1)
    half = 1.96 * flat.std(1, ddof=1) / math.sqrt(flat.shape[1])
    assert (np.abs(flat.mean(1) - 0.3) <= half).mean() < 0.6, "the test could not fail"


def test_the_clustered_error_is_the_textbook_one_for_equal_windows():
    sample = list(np.random.default_rng(0).normal(size=(9, 30)))
    found, means = clustered(sample), [window.mean() for window in sample]
    assert found.value == pytest.approx(np.mean(means))
    assert found.error == pytest.approx(np.std(means, ddof=1) / 3)
    low, high = found.ci
    assert (high - low) / 2 == pytest.approx(2.3060041 * found.error)  # t with 8 degrees
    assert clustered(sample[:1]).ci is None and clustered(sample[:1]).error is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 9), (7, 10), (870, 1000), (50, 50)])
def test_shares_have_the_interval_of_scipy(successes, trials):
    want = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((want.low, want.high), abs=1e-12)


def test_percentiles_need_the_sample_that_bounds_them():
    assert quantile(np.arange(298.0), 0.99) is None
    assert quantile(np.arange(299.0), 0.99) == pytest.approx(0.99 * 298)


def test_chunks_do_not_matter():
    p, q = random_logits(150, 20, 0), random_logits(150, 20, 1)
    targets = np.arange(150) % 20
    whole = compare(p, q, targets)
    parts = [compare(p[s], q[s], targets[s]) for s in (slice(0, 70), slice(70, 150))]
    np.testing.assert_array_equal(concatenate(parts).kl, whole.kl)
