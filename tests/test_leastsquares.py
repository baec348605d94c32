"""Masked least squares, against numpy row by row and against any other weights of the support."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe import leastsquares
from optpipe.leastsquares import damped, loss, refit


def problem(seed, rows=7, cols=20, tokens=80):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, cols, generator=generator) < torch.rand(rows, 1, generator=generator)
    return x, weight, keep


def solved(x, weight, keep):
    gram = x.T @ x / len(x)
    return refit(keep, gram, weight @ gram), gram


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500))
def test_every_row_is_what_numpy_finds(seed):
    """Rows of every support size, none and all among them."""
    x, weight, keep = problem(seed)
    keep[0], keep[1] = False, True
    found, _ = solved(x, weight, keep)
    assert not found[~keep].any()
    for row, mask, original in zip(found, keep, weight, strict=True):
        expected = np.linalg.lstsq(x[:, mask].numpy(), (x @ original).numpy(), rcond=None)[0]
        np.testing.assert_allclose(row[mask].numpy(), expected, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500), st.floats(1e-4, 1.0))
def test_no_other_weights_of_the_support_lose_less(seed, step):
    x, weight, keep = problem(seed)
    found, gram = solved(x, weight, keep)
    nudge = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).double()
    for other in (weight * keep, found + step * nudge * keep):
        assert loss(found - weight, gram) <= loss(other - weight, gram) * (1 + 1e-12)


def test_loss_is_the_mean_square_of_what_changes_in_the_output():
    x, weight, _ = problem(0)
    expected = float((x @ weight.T).square().sum() / len(x))
    assert loss(weight, x.T @ x / len(x)) == pytest.approx(expected, rel=1e-12)


def test_dropping_one_weight_costs_what_optimal_brain_surgeon_says():
    """w^2 / (H^-1)_jj for every weight of a row (Hassibi and Stork 1993)."""
    x, weight, _ = problem(3, rows=1)
    weight = weight.expand(20, 20)
    keep = ~torch.eye(20, dtype=torch.bool)
    found, gram = solved(x, weight, keep)
    cost = ((found - weight) @ gram * (found - weight)).sum(1)
    expected = weight[0].square() / torch.linalg.inv(gram).diagonal()
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=0)


def test_few_rows_at_a_time_give_the_same(monkeypatch):
    x, weight, keep = problem(1)
    whole, _ = solved(x, weight, keep)
    monkeypatch.setattr(leastsquares, "ELEMENTS", 1)
    torch.testing.assert_close(solved(x, weight, keep)[0], whole)


def test_damping_adds_to_the_diagonal_and_makes_dead_inputs_regular():
    gram = torch.diag(torch.tensor([3.0, 0.0, 6.0]))
    assert torch.equal(damped(gram, 0.5).diagonal(), torch.tensor([4.5, 1.5, 7.5]).double())
    assert torch.equal(damped(gram, 0.0).diagonal(), torch.tensor([3.0, 1.0, 6.0]).double())
    assert gram[1, 1] == 0 and damped(gram, 0.5).dtype == torch.float64
