"""Whitened SVD against its theorem: it loses the discarded singular values of W S, and no factors
of that rank lose less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe.lowrank.factorize import truncated
from optpipe.lowrank.svdllm import whitened


def loss(weight, other, gram):
    difference = weight - other
    return float(torch.trace(difference @ gram @ difference.T))


def layer(kind, seed, rows=24, cols=40, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
        x = x * torch.arange(1, cols + 1) ** -1.0 @ mix
    elif kind == "outliers":
        x[:, :3] *= 30
    elif kind == "singular":
        x = x[:, :9] @ torch.randn(9, cols, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens


KINDS = ["white", "correlated", "outliers", "singular"]


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS[:3]), rank=st.integers(1, 23), seed=st.integers(0, 50))
def test_loss_is_the_sum_of_what_was_discarded(kind, rank, seed):
    weight, gram = layer(kind, seed)
    left, right = whitened(weight, gram, rank)
    # by Cholesky, another root of the same Gram matrix
    discarded = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))[rank:].square().sum()
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert abs(loss(weight, left @ right, gram) - float(discarded)) < 1e-9 * whole


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS), rank=st.integers(1, 23), seed=st.integers(0, 50))
def test_no_other_factors_of_the_rank_lose_less(kind, rank, seed):
    weight, gram = layer(kind, seed)
    left, right = whitened(weight, gram, rank)
    ours = loss(weight, left @ right, gram)
    plain = truncated(weight, rank)
    scale = gram.diagonal().sqrt().sqrt()
    asvd = truncated(weight * scale, rank)
    generator = torch.Generator().manual_seed(seed)
    nudge = 1e-3 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
    others = [plain[0] @ plain[1], asvd[0] @ asvd[1] / scale, (left + nudge) @ right]
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert all(ours <= loss(weight, other, gram) + 1e-9 * whole for other in others)


def test_white_inputs_make_it_plain_svd():
    weight = torch.randn(24, 40, dtype=torch.float64)
    left, right = whitened(weight, 3 * torch.eye(40, dtype=torch.float64), 8)
    expected = truncated(weight, 8)
    torch.testing.assert_close(left @ right, expected[0] @ expected[1])


def test_more_rank_than_live_inputs_loses_nothing():
    weight, gram = layer("singular", 0)
    left, right = whitened(weight, gram, 20)
    assert left.shape == (24, 20) and right.shape == (20, 40)
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert loss(weight, left @ right, gram) < 1e-12 * whole


@pytest.mark.parametrize("kind", ["correlated", "outliers"])
def test_far_better_than_plain_svd_where_inputs_are_not_white(kind):
    ratios = []
    for seed in range(8):
        weight, gram = layer(kind, seed)
        pairs = whitened(weight, gram, 8), truncated(weight, 8)
        ours, plain = (loss(weight, left @ right, gram) for left, right in pairs)
        ratios.append(ours / plain)
    assert sum(ratios) / len(ratios) < 0.5
