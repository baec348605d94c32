"""Truncated SVD: the best factors in the unweighted norm."""

import pytest
import torch

from optpipe.linear import Form
from optpipe.lowrank.factorize import truncated
from optpipe.lowrank.svd import Svd


def test_error_is_the_discarded_singular_values():
    weight = torch.randn(24, 40, dtype=torch.float64)
    singular = torch.linalg.svdvals(weight)
    for rank in (1, 7, 24):
        left, right = truncated(weight, rank)
        lost = (weight - left @ right).square().sum()
        torch.testing.assert_close(lost, singular[rank:].square().sum(), atol=1e-20, rtol=1e-10)


def test_rank_is_the_share_of_parameters_rounded_down():
    stage = Svd(keep=0.8, rank_multiple=16)
    assert stage.rank(Form(rows=256, cols=768)) == 144  # 153.6 -> 153 -> 144
    assert Svd(keep=0.5, rank_multiple=1).rank(Form(rows=100, cols=100)) == 25


@pytest.mark.parametrize("fields", [{"keep": 0.0}, {"keep": 1.0}, {"rank_multiple": 0}])
def test_bad_fields_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Svd(**fields)


def test_a_rank_of_nothing_is_refused():
    layers = {"blocks.0.x": Form(rows=64, cols=64)}
    with pytest.raises(ValueError, match=r"keep=0.5 .* no rank .* 32"):
        Svd(keep=0.5).plan(layers)
