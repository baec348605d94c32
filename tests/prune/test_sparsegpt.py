"""SparseGPT against the slow recursion it abbreviates, and against methods that move no weight."""

import pytest
import torch

from optpipe.linear import mask_of, weight_of
from optpipe.prune.mask import follows, keep_mask
from optpipe.prune.sparsegpt import Dropping, SparseGpt


class Inputs:
    """A layer's inputs, (N, C), as the stage hands them on."""

    def __init__(self, kind, cols, seed, tokens=600):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
        if kind == "correlated":
            mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
            x = x * torch.arange(1, cols + 1, dtype=torch.float64) ** -0.8 @ torch.linalg.qr(mix)[0]
        if kind == "outliers":
            x[:, 5] *= 30
        self.mean_CC = x.T @ x / tokens if kind != "white" else torch.eye(cols).double()

    def error(self, weight, pruned):
        difference = (weight - pruned).double()
        return float(torch.trace(difference @ self.mean_CC @ difference.T))


def weights(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 100))


def slow(weight, gram, drop, width):
    """Algorithm 1 with an inverse for every column: per row, ``drop`` of each ``width`` columns."""
    work, cols = weight.double().clone(), weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(cols):
        if j % width == 0:
            cost = torch.stack([
                work[:, i].square() / torch.linalg.inv(gram[i:, i:])[0, 0]
                for i in range(j, j + width)
            ], 1)  # fmt: skip
            keep[:, j : j + width] = cost >= cost.sort(1).values[:, drop, None]
        inverse = torch.linalg.inv(gram[j:, j:])
        fixed = work[:, j] * keep[:, j]
        work[:, j:] -= ((work[:, j] - fixed) / inverse[0, 0])[:, None] * inverse[0]
        work[:, j] = fixed
    return work, keep


@pytest.mark.parametrize("pattern, drop, width", [("2:4", 2, 4), ("3:5", 2, 5), ("row", 24, 60)])
def test_equals_the_slow_recursion(pattern, drop, width):
    weight, x = weights(6, 60), Inputs("correlated", 60, 0)
    stage = SparseGpt(sparsity=drop / width, pattern=pattern, damp=1e-12)
    found, keep = stage.pruned(weight, x)
    expected, expected_keep = slow(weight, x.mean_CC, drop, width)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
def test_white_inputs_make_it_magnitude(pattern):
    weight = weights(8, 64)
    found, keep = SparseGpt(pattern=pattern).pruned(weight, Inputs("white", 64, 0))
    assert torch.equal(keep, keep_mask(weight.abs(), 0.5, pattern))
    torch.testing.assert_close(found, weight * keep)


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4", "4:8"])
@pytest.mark.parametrize("cols", [96, 200, 256])
def test_as_many_weights_go_as_claimed(pattern, cols):
    """Also where the last of the blocks of 128 columns is not whole, and 0.3 does not divide it."""
    stage = SparseGpt(sparsity=0.5 if ":" in pattern else 0.3, pattern=pattern)
    weight = weights(5, cols)
    found, keep = stage.pruned(weight, Inputs("correlated", cols, 1))
    from optpipe.linear import Form

    assert int((~keep).sum()) == stage.dropped(Form(rows=5, cols=cols))
    assert follows(keep, pattern) and not found[~keep].any() and found[keep].all()


@pytest.mark.parametrize("kind, limits", [("correlated", (0.45, 1.02)), ("outliers", (1.0, 0.7))])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_loses_less_than_wanda_and_that_less_than_magnitude(kind, limits, pattern):
    """Means over layers; SparseGPT's share of Wanda's loss, and Wanda's of magnitude's."""
    losses = []
    for seed in range(10):
        weight, x = weights(32, 64, seed), Inputs(kind, 64, seed)
        moved, _ = SparseGpt(pattern=pattern).pruned(weight, x)
        wanda = weight.abs() * x.mean_CC.diagonal().sqrt().float()
        others = [weight * keep_mask(score, 0.5, pattern) for score in (wanda, weight.abs())]
        losses.append([x.error(weight, pruned) for pruned in (moved, *others)])
    ours, wanda, magnitude = torch.tensor(losses).mean(0).tolist()
    assert ours < limits[0] * wanda and wanda < limits[1] * magnitude


def test_an_input_that_never_comes_loses_its_weights_first():
    weight, x = weights(4, 64), Inputs("correlated", 64, 0)
    x.mean_CC[10] = x.mean_CC[:, 10] = 0
    found, keep = SparseGpt(pattern="row").pruned(weight, x)
    assert torch.isfinite(found).all() and not keep[:, 10].any()


def test_blocks_of_a_layer_add_up():
    dropping = Dropping(torch.zeros(3, 300), 0.5, "layer")
    for start in range(0, 300, 128):
        dropping.decide(torch.rand(3, min(128, 300 - start)), torch.ones(1), start)
    assert int((~dropping.keep_RC).sum()) == 450


def test_kept_weights_of_a_model_move(run, tiny):
    from optpipe import model
    from optpipe.checkpoint import Checkpoint

    made = run(SparseGpt(calib=run.calib), tiny())
    before, after = Checkpoint(tiny()), Checkpoint(made.path)
    name = "model.layers.1.mlp.down_proj"
    old, new = (model.layer(name, c.forms or {}, c) for c in (before, after))
    mask = mask_of(new)
    assert not torch.equal(weight_of(new)[mask], weight_of(old)[mask])
    assert made.stats["sparsity"] == pytest.approx(1 / 2, abs=0.2)


@pytest.mark.parametrize("damp", [0.0, float("inf")])
def test_bad_damping_is_refused(damp):
    with pytest.raises(ValueError, match=f"damp must be above 0 and finite, got {damp}"):
        SparseGpt(damp=damp)
