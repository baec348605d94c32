"""SmoothQuant: exact before rounding, and what it is for: activations that are easier to round."""

from dataclasses import replace

import pytest
import torch

from optpipe import model
from optpipe.calibrate import Peak
from optpipe.checkpoint import Checkpoint
from optpipe.linear import mask_of, weight_of
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.rtn import Rtn
from optpipe.transform.smoothquant import SmoothQuant

IDS = torch.randint(3, 288, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder):
    return model.load(Checkpoint(folder))(IDS).logits.double()


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("linears", [False, True])
def test_the_model_computes_what_it_did(family, linears, run, tiny):
    made = run(SmoothQuant(linears=linears, calib=run.calib), tiny(family))
    assert relative(logits(made.path), logits(tiny(family))) < 1e-4
    before, after = Checkpoint(tiny(family)), Checkpoint(made.path)
    block = before.decoder.blocks[1]
    for norm in (block.attn_norm, block.mlp_norm):
        assert not torch.equal(before.get(f"{norm}.weight"), after.get(f"{norm}.weight"))
    old, new = (model.layer(block.mlp_out, c.forms or {}, c).weight for c in (before, after))
    assert torch.equal(old, new) == (not linears or not before.decoder.gated)


def test_eq_4():
    stage = SmoothQuant(alpha=0.75)
    found = stage.factor(torch.tensor([16.0, 0.0, 3.0]), torch.tensor([0.0625, 1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([16.0**0.75 / 0.0625**0.25, 1.0, 1.0]))


def test_with_alpha_a_half_inputs_and_weights_share_the_difficulty(run, tiny):
    """max|X_j| / s_j = max|W_j| s_j = sqrt(max|X_j| max|W_j|) for every input."""
    calib = replace(run.calib, samples=2)
    made = run(SmoothQuant(calib=calib), tiny())
    checkpoint = Checkpoint(made.path)
    block = checkpoint.decoder.blocks[0]
    lm, peak = model.load(checkpoint), Peak(64)
    gate = lm.get_submodule(block.mlp_in[0])
    gate.register_forward_pre_hook(lambda _, args: peak.add(args[0].reshape(-1, 64)))
    with torch.no_grad():
        lm(calib.ids(Checkpoint(tiny())))
    weights = torch.stack([lm.get_submodule(n).weight.abs().amax(0) for n in block.mlp_in]).amax(0)
    torch.testing.assert_close(peak.max_C, weights, rtol=1e-4, atol=1e-6)


def test_outliers_become_easier_to_round(run, tiny, tmp_path):
    """int8 rounding per tensor of the inputs; two channels are made 50 times the others."""
    lm = model.load(Checkpoint(tiny()))
    decoder = Checkpoint(tiny()).decoder
    for block in decoder.blocks:
        lm.get_submodule(block.mlp_norm).weight.data[[7, 21]] *= 50
        for name in block.mlp_in:
            lm.get_submodule(name).weight.data[:, [7, 21]] /= 50
    lm.save_pretrained(tmp_path / "outliers")
    smoothed = run(SmoothQuant(calib=run.calib), tmp_path / "outliers").path

    @torch.no_grad()
    def rounded(folder):
        lm = model.load(Checkpoint(folder))
        for block in decoder.blocks:
            for name in block.mlp_in:
                lm.get_submodule(name).register_forward_pre_hook(int8)
        return lm(IDS).logits.double()

    def int8(_, args):
        scale = args[0].abs().max() / 127
        return ((args[0] / scale).round() * scale,)

    exact = logits(tmp_path / "outliers")
    plain, ours = ((rounded(f) - exact).norm() for f in (tmp_path / "outliers", smoothed))
    assert ours < 0.2 * plain


def test_masks_stay_and_low_rank_layers_are_smoothed_too(run, tiny):
    pruned = run(Magnitude(sparsity=0.5, targets=["*q_proj", "*down_proj"]), tiny())
    thin = run(Svd(keep=0.9, rank_multiple=4, targets=["*gate_proj", "*o_proj"]), pruned)
    made = run(SmoothQuant(linears=True, calib=run.calib), thin)
    assert relative(logits(made.path), logits(thin.path)) < 1e-4
    before, after = Checkpoint(thin.path), Checkpoint(made.path)
    assert before.forms == after.forms
    for name, form in after.forms.items():
        if form.pattern:
            old, new = (model.layer(name, c.forms, c) for c in (before, after))
            assert torch.equal(mask_of(old), mask_of(new))
            assert not torch.equal(weight_of(old), weight_of(new))


def test_quantized_layers_are_refused(tiny):
    layers = Rtn(group_size=32).plan(model.layers(Checkpoint(tiny())))
    with pytest.raises(ValueError, match=r"q_proj' is quantized already, to 4 bits; fold before"):
        SmoothQuant().plan(layers)
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, got 1.5"):
        SmoothQuant(alpha=1.5)
