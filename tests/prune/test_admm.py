"""ADMM: the error of a layer, the patterns, and the iteration against its own fixed point."""

import pytest
import torch
from layers import KINDS, Layer

from optpipe.calibrate import Gram
from optpipe.leastsquares import damped, refit
from optpipe.prune.admm import Admm, support
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.mask import follows, keep_mask
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.prune.wanda import Wanda


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_lowest_error_of_all_methods_on_every_layer(kind, pattern):
    """[M methods.md 9.2: 120 of 120]; refitted Wanda lies between on the mean."""
    errors = []
    for seed in range(5):
        layer = Layer(kind, seed)
        stages = Admm, SparseGpt, Wanda
        ours, sparsegpt, wanda = (
            s(pattern=pattern).pruned(layer.weight, layer.gram) for s in stages
        )
        refitted = Wanda(pattern=pattern, refit=True).pruned(layer.weight, layer.gram)
        gram = damped(layer.mean_CC, 0.01)
        solved = refit(sparsegpt[1], gram, layer.weight.double() @ gram)
        assert layer.error(solved, 0.01) < layer.error(sparsegpt[0], 0.01)
        errors.append([layer.error(w) for w, _ in (ours, refitted, sparsegpt, wanda)])
        assert errors[-1][0] < min(errors[-1][2:])
    ours, refitted, sparsegpt, wanda = torch.tensor(errors).mean(0)
    assert ours < refitted < wanda and sparsegpt < wanda


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["row", "layer", "1:4"])
def test_exactly_so_many_weights_go_and_no_other_weights_of_the_support_lose_less(kind, pattern):
    layer, stage = Layer(kind, 0), Admm(pattern=pattern, sparsity=0.5 if ":" in pattern else 0.3)
    weight, keep = stage.pruned(layer.weight, layer.gram)
    assert follows(keep, pattern) and not weight[~keep].any()
    share = 0.75 if ":" in pattern else 0.3
    gone = 24 * round(share * 64) if pattern != "layer" else round(share * 24 * 64)
    assert int((~keep).sum()) == gone
    nudge = 1e-2 * torch.randn(weight.shape) * keep
    for other in (layer.weight * keep, weight + nudge):
        assert layer.error(weight, 0.01) <= layer.error(other, 0.01) * (1 + 1e-6)


def test_the_share_that_goes_grows_in_the_first_half_and_n_of_m_go_at_once():
    score = torch.rand(3, 64)
    gone = [int((~Admm(pattern="row").mask(score, t)).sum()) for t in (0.0, 0.25, 0.5, 1.0)]
    assert gone == [0, 3 * round(32 * 0.5 ** (1 / 3)), 3 * 32, 3 * 32]
    assert follows(Admm(pattern="2:4").mask(score, 0.0), "2:4")


def test_a_diagonal_gram_matrix_leaves_the_largest_weights_as_they_are():
    """Nothing can make up for anything then: it is Wanda, and so magnitude for equal norms."""
    weight, gram = Layer("white", 0).weight, Gram(64)
    gram.add(torch.diag(torch.rand(64).double() + 0.1))
    found, keep = Admm(sparsity=0.4, pattern="row").pruned(weight, gram)
    damped_norm = damped(gram.mean_CC, 0.01).diagonal().sqrt().float()
    assert torch.equal(keep, keep_mask(weight.abs() * damped_norm, 0.4, "row"))
    torch.testing.assert_close(found, weight * keep)
    gram = Gram(64)
    gram.add(torch.eye(64).double())
    assert torch.equal(
        Admm(pattern="row").pruned(weight, gram)[1], Magnitude().pruned(weight, None)[1]
    )


def test_with_the_mask_held_it_converges_to_the_least_squares_weights():
    """The fixed point of the iteration is the refit: with B = Z, rho cancels."""
    layer = Layer("correlated", 1)
    gram = damped(layer.mean_CC, 0.01)
    keep = keep_mask(layer.weight.abs(), 0.5, "row")
    seen = []

    def held(score, progress):
        seen.append(score)
        return keep

    support(layer.weight.double(), gram, held, 3000, 0.1)
    found = seen[-1] * keep / gram.diagonal().sqrt()

    expected = refit(keep, gram, layer.weight.double() @ gram)
    torch.testing.assert_close(found, expected.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"steps": 1}, {"rho": 0.0}, {"damp": 0.0}, {"rho": float("inf")}]
)
def test_bad_fields_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Admm(**fields)
