"""AWQ: what it searches for, what it folds, and where it is refused."""

import pytest
import torch

from optpipe import model
from optpipe.calibrate import Gram
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.fold import Fold
from optpipe.linear import Form, mask_of, weight_of
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.awq import Awq, output_loss
from optpipe.quant.clip import fit_output
from optpipe.quant.grid import fit
from optpipe.quant.rtn import Rtn

IDS = torch.randint(3, 288, (2, 30), generator=torch.Generator().manual_seed(0))
FOLD = Fold(readers=("layer",), writer="norm", norm=True, size=64)


def gram_of(x):
    gram = Gram(x.shape[1])
    gram.add(x.float())
    return gram


@torch.no_grad()
def logits(folder):
    return model.load(Checkpoint(folder))(IDS).logits.double()


def rounded(weight, bits):
    grid = fit(weight, Form(rows=32, cols=64, bits=bits, group_size=32))
    return grid.decode(grid.encode(weight))


@pytest.mark.parametrize("kind", ["white", "correlated", "outliers"])
@pytest.mark.parametrize("bits", [3, 4])
def test_scaling_is_no_worse_than_rounding_and_its_loss_is_that_of_the_output(
    kind, bits, layer, output_error
):
    stage, ratios = Awq(bits=bits, group_size=32), []
    for seed in range(8):
        weight, x = layer(kind, seed)
        exponent, factor = stage.scale([weight], gram_of(x), FOLD)
        scaled = weight * factor
        ours = output_error(rounded(scaled, bits) / factor - weight, x)
        plain = output_error(rounded(weight, bits) - weight, x)
        found = output_loss(weight, factor, gram_of(x).mean_CC.float(), stage._fit)
        assert found == pytest.approx(ours, rel=1e-4)
        assert ours <= plain * (1 + 1e-5) and 0 <= exponent <= 1
        ratios.append(ours / plain)
    assert sum(ratios) / 8 < {"white": 1.0, "correlated": 1.0, "outliers": 0.6}[kind]


def test_equally_strong_inputs_are_not_scaled(layer):
    weight, _ = layer("white", 0)
    signs = torch.randint(0, 2, (600, 64)) * 2.0 - 1  # every mean of |x| is exactly one
    exponent, factor = Awq(group_size=32).scale([weight], gram_of(signs), FOLD)
    assert exponent == 0 and torch.equal(factor, torch.ones(64))


def test_it_is_the_best_of_all_exponents(layer):
    weight, x = layer("outliers", 1)
    stage = Awq(group_size=32, exponents=10)
    exponent, _ = stage.scale([weight], gram_of(x), FOLD)
    losses = []
    for step in range(11):
        factor = x.abs().mean(0).float() ** (step / 10)
        factor = factor / (factor.max() * factor.min()).sqrt()
        difference = rounded(weight * factor, 4) / factor - weight
        losses.append(float((x @ difference.double().T).square().sum(1).mean()))
    assert losses.index(min(losses)) / 10 == exponent


def test_a_whole_model_of_every_family(family, run, tiny):
    """Norms take the factors; at 8 bits the model computes what it did, so nothing is misfolded."""
    made = run(Awq(bits=8, group_size=32, calib=run.calib), tiny(family))
    ours, theirs = logits(made.path), logits(tiny(family))
    rtn = logits(run(Rtn(bits=8, group_size=32), tiny(family)).path)
    assert (ours - theirs).norm() < 1.5 * (rtn - theirs).norm()
    before, after = Checkpoint(tiny(family)), Checkpoint(made.path)
    gated = before.decoder.gated
    assert len(made.stats["exponents"]) == 3 * (4 if gated else 3) and any(made.stats["exponents"])
    norms = [n for b in before.decoder.blocks for n in (b.attn_norm, b.mlp_norm)]
    assert any(not torch.equal(*(c.get(f"{n}.weight") for c in (before, after))) for n in norms)


def test_outliers_in_a_trained_like_model_lose_less(run, tiny, tmp_path):
    lm = model.load(Checkpoint(tiny()))
    for block in Checkpoint(tiny()).decoder.blocks:
        for norm in (block.attn_norm, block.mlp_norm):
            lm.get_submodule(norm).weight.data[[7, 21]] *= 30
    lm.save_pretrained(tmp_path / "outliers")
    exact = logits(tmp_path / "outliers")
    awq = Awq(bits=3, group_size=32, calib=run.calib)
    ours, plain = (
        (logits(run(stage, tmp_path / "outliers").path) - exact).norm()
        for stage in (awq, Rtn(bits=3, group_size=32))
    )
    assert ours < 0.7 * plain


def test_ranges_are_clipped_for_the_inputs_as_they_are_once_divided(run, tiny):
    """Hooks on the rounded model see what its first block feeds its layers."""
    before = Checkpoint(tiny())
    block, seen = before.decoder.blocks[0], []
    stage = Awq(group_size=32, bits=3, calib=run.calib, targets=["*.k_proj"])
    artifact = run(stage, tiny())
    made = Checkpoint(artifact.path)
    lm = model.load(made)
    lm.get_submodule(block.qkv[1]).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        lm(run.calib.ids(before))
    old, new = (c.get(f"{block.attn_norm}.weight") for c in (before, made))
    scaled = before.get(f"{block.qkv[1]}.weight") * (old / new)
    gram = gram_of(seen[0].flatten(0, 1)).mean_CC
    expected = fit_output(scaled, made.forms[block.qkv[1]], gram).scales_RG
    found = model.layer(block.qkv[1], made.forms, made).scales
    assert (found == expected).float().mean() > 0.95  # rounding in ties
    plain = gram_of(seen[0].flatten(0, 1) * (old / new))
    weight = before.get(f"{block.qkv[1]}.weight")  # q and v read the same, but are not rounded
    assert artifact.stats["exponents"][0] == stage.scale([weight], plain, FOLD)[0]
    assert (expected != fit(scaled, made.forms[block.qkv[1]]).scales_RG).float().mean() > 0.5


def test_masks_survive_and_low_rank_layers_are_scaled_too(run, tiny):
    pruned = run(Magnitude(sparsity=0.5, targets=["*q_proj", "*down_proj"]), tiny())
    thin = run(Svd(keep=0.9, rank_multiple=32, targets=["*gate_proj"]), pruned)
    made = run(Awq(bits=8, group_size=32, calib=run.calib), thin)
    assert (logits(made.path) - logits(thin.path)).norm() < 0.03 * logits(thin.path).norm()
    before, after = Checkpoint(pruned.path), Checkpoint(made.path)
    for name, form in before.forms.items():
        if form.pattern:
            old = mask_of(model.layer(name, before.forms, before))
            new = model.layer(name, after.forms, after)
            assert torch.equal(old, mask_of(new)) and not weight_of(new)[~old].any()


def test_where_nothing_can_be_scaled_it_is_refused(tiny):
    with pytest.raises(InputError, match="matches no layer of gpt2 whose inputs can be scaled"):
        Awq(targets=["*mlp.c_proj"]).inputs(Checkpoint(tiny("gpt2")))
    layers = Rtn(group_size=32, targets=["*q_proj"]).plan(model.layers(Checkpoint(tiny())))
    with pytest.raises(ValueError, match="is quantized already"):
        Awq(group_size=32, targets=["*up_proj"]).plan(layers)
    with pytest.raises(ValueError, match="exponents must be at least 1, got 0"):
        Awq(exponents=0)
