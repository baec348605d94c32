"""Wanda against the definition of its score, and against magnitude where inputs matter."""

import pytest
import torch
from layers import Layer

from optpipe.calibrate import Squares
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.mask import keep_mask
from optpipe.prune.wanda import Wanda


def squares(x):
    statistic = Squares(x.shape[1])
    for part in x.split(7):
        statistic.add(part)
    return statistic


def test_score_is_weight_times_input_norm():
    weight, x = torch.randn(5, 12), torch.randn(50, 12)
    expected = weight.abs() * torch.linalg.vector_norm(x, dim=0)
    torch.testing.assert_close(Wanda().score(weight, squares(x)), expected)


def test_equal_inputs_make_it_magnitude():
    weight, x = torch.randn(6, 16), torch.ones(10, 16)
    same = [keep_mask(s, 0.5, "row") for s in (Wanda().score(weight, squares(x)), weight.abs())]
    assert torch.equal(*same)


def test_outlier_inputs_make_it_better_than_magnitude():
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        weight, x = torch.randn(32, 64), torch.randn(256, 64)
        x[:, :4] *= 30
        scores = Wanda().score(weight, squares(x)), weight.abs()
        pruned = [weight * keep_mask(score, 0.5, "row") for score in scores]
        errors.append([float((x @ (weight - p).T).square().sum()) for p in pruned])
    ours, magnitude = torch.tensor(errors).mean(0)
    assert ours < 0.2 * magnitude


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_the_model_is_pruned_by_the_inputs_its_layers_really_get(run, tiny, pattern):
    """Hooks on the transformers model itself see the first block's inputs."""
    from optpipe import model
    from optpipe.checkpoint import Checkpoint
    from optpipe.linear import mask_of

    stage = Wanda(sparsity=0.5, pattern=pattern, calib=run.calib, targets=["*layers.0.*"])
    made = Checkpoint(run(stage, tiny()).path)
    lm = model.load(Checkpoint(tiny()))
    name = "model.layers.0.mlp.down_proj"
    seen = []
    lm.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in run.calib.ids(made):
            lm(ids[None])
    norm = torch.cat(seen).double().square().sum(0).sqrt().float()
    score = lm.get_submodule(name).weight.abs() * norm
    found = mask_of(model.layer(name, made.forms, made))
    assert (found == keep_mask(score, 0.5, pattern)).float().mean() > 0.999  # rounding in ties


def test_magnitude_and_wanda_differ(run, tiny):
    from optpipe.checkpoint import Checkpoint

    a, b = (run(s, tiny()).path for s in (Magnitude(), Wanda(calib=run.calib)))
    name = "model.layers.1.mlp.down_proj.mask"
    assert not torch.equal(Checkpoint(a).get(name), Checkpoint(b).get(name))


@pytest.mark.parametrize("kind", ["white", "correlated", "outliers"])
def test_a_refit_keeps_the_mask_and_is_never_worse(kind):
    for seed in range(4):
        layer = Layer(kind, seed)
        plain, mask = Wanda().pruned(layer.weight, layer.gram)
        refitted, same = Wanda(refit=True).pruned(layer.weight, layer.gram)
        assert torch.equal(mask, same) and not refitted[~mask].any()
        assert layer.error(refitted, 0.01) < layer.error(plain, 0.01)
