"""Masks against their definition: how many weights go, and that they are the lowest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optpipe.prune.magnitude import Magnitude
from optpipe.prune.mask import keep_mask, parse_pattern


@given(sparsity=st.floats(0, 0.99), cols=st.integers(1, 70), seed=st.integers(0, 9))
def test_exactly_the_lowest_of_each_row_go(sparsity, cols, seed):
    score = torch.rand(3, cols, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(score, sparsity, "row")
    for row, kept in zip(score, keep, strict=True):
        assert int((~kept).sum()) == round(sparsity * cols)
        assert not kept.any() or kept.all() or row[~kept].max() <= row[kept].min()


@given(n_m=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5)]), groups=st.integers(1, 9))
def test_n_of_every_m_stay_and_pruning_again_changes_nothing(n_m, groups):
    n, m = n_m
    score = torch.rand(4, m * groups)
    keep = keep_mask(score, 0.0, f"{n}:{m}")
    assert (keep.reshape(4, groups, m).sum(-1) == n).all()
    assert torch.equal(keep_mask(score * keep, 0.0, f"{n}:{m}"), keep)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "2:4:8", "column", "2:", "-1:4"])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=pattern):
        parse_pattern(pattern)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_bad_sparsity_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity.*{sparsity}"):
        Magnitude(sparsity=sparsity)


def test_a_sparsity_that_contradicts_its_pattern_is_refused():
    assert Magnitude(pattern="2:4").sparsity == Magnitude(pattern="1:4").sparsity == 0.5
    Magnitude(pattern="1:4", sparsity=0.75)
    with pytest.raises(ValueError, match=r"pattern 1:4 means a sparsity of 0\.75, got 0\.9"):
        Magnitude(pattern="1:4", sparsity=0.9)


def test_sparsity_adds_up_over_stages(run, tiny):
    from optpipe import model
    from optpipe.checkpoint import Checkpoint

    first = run(Magnitude(targets=["*layers.0.*"]), tiny())
    both = run(Magnitude(sparsity=0.25, targets=["*layers.1.*"]), first)
    forms = model.layers(Checkpoint(both.path))
    masks = [
        model.layer(n, forms, Checkpoint(both.path)).mask for n, f in forms.items() if f.pattern
    ]
    gone, weights = (
        sum(int((~m).sum()) for m in masks),
        sum(f.rows * f.cols for f in forms.values()),
    )
    assert both.stats["sparsity"] == pytest.approx(gone / weights)
