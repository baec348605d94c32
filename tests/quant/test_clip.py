"""Clipped grids: never worse than the full range by their own measure, better where it counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form
from optpipe.quant.clip import CLIPS, RATIOS, fit_clip, fit_output
from optpipe.quant.gptq import Gptq
from optpipe.quant.grid import fit
from optpipe.quant.rtn import Rtn

FORMS = st.builds(
    Form, rows=st.just(32), cols=st.just(64), bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, -1]), symmetric=st.booleans(),
)  # fmt: skip


def rounded(weight, grid):
    return grid.decode(grid.encode(weight))


def by_group(errors, form):
    return errors.reshape(form.rows, form.groups, -1).sum(-1)


@settings(deadline=None, max_examples=20)
@given(form=FORMS, seed=st.integers(0, 20))
def test_no_group_gets_worse_by_its_own_measure(form, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator)
    power = torch.rand(64, generator=generator) * 10
    for clip, factor in (("mse", torch.ones(64)), ("hessian", power)):
        clipped = rounded(weight, fit_clip(weight, form, clip, power))
        ours = by_group((clipped - weight).square() * factor, form)
        theirs = by_group((rounded(weight, fit(weight, form)) - weight).square() * factor, form)
        assert (ours <= theirs * (1 + 1e-6)).all()
        assert form.bits == 8 or ours.sum() < 0.98 * theirs.sum()


def test_it_is_the_best_of_the_listed_ranges():
    """Against one group at a time, in plain Python numbers."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    power = torch.rand(64, generator=torch.Generator().manual_seed(1))
    form = Form(rows=3, cols=64, bits=3, group_size=32)
    found = rounded(weight, fit_clip(weight, form, "hessian", power))
    for row in range(3):
        for start in (0, 32):
            part, scale = slice(start, start + 32), weight[row, start : start + 32].abs().max()
            w, h = weight[row, part].double(), power[part].double()
            costs = []
            for ratio in RATIOS:
                step = float((ratio * scale / 3).half())
                q = (w / step).round().clamp(-4, 3) * step
                costs.append(float((h * (w - q) ** 2).sum()))
            ours = float((h * (w - found[row, part].double()) ** 2).sum())
            assert ours == pytest.approx(min(costs), rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_by_the_output_is_no_worse_group_by_group(layer, symmetric):
    form = Form(rows=32, cols=64, bits=3, group_size=32, symmetric=symmetric)
    for kind in ("white", "correlated", "outliers"):
        weight, x = layer(kind, 0)
        gram = x.T @ x / len(x)
        ours = rounded(weight, fit_output(weight, form, gram)) - weight
        theirs = rounded(weight, fit(weight, form)) - weight
        for part in (slice(0, 32), slice(32, 64)):
            a, b = ((x[:, part] @ d[:, part].double().T).square().sum(0) for d in (ours, theirs))
            assert (a <= b * (1 + 1e-5)).all() and a.sum() < 0.9 * b.sum()


def test_means_over_layers(layer, output_error):
    """Outlier channels: weighted by the power of the inputs, rounding spares what they multiply."""
    form = Form(rows=32, cols=64, bits=4, group_size=32)
    errors = {clip: 0.0 for clip in CLIPS}
    for seed in range(8):
        weight, x = layer("outliers", seed)
        for clip in CLIPS:
            grid = fit_clip(weight, form, clip, x.square().sum(0))
            errors[clip] += output_error(rounded(weight, grid) - weight, x)
    assert errors["hessian"] < 0.5 * errors["mse"] and errors["hessian"] < 0.5 * errors["minmax"]


def test_gptq_gains_by_it(layer, output_error):
    form = Form(rows=32, cols=64, bits=3, group_size=32)
    errors = {clip: 0.0 for clip in CLIPS}
    for seed in range(8):
        weight, x = layer("correlated", seed)
        statistic = type("Statistic", (), {"mean_CC": x.T @ x / len(x)})
        for clip in CLIPS:
            made = Gptq(bits=3, clip=clip).quantize(
                torch.nn.Linear(64, 32, bias=False), weight, form, statistic
            )
            errors[clip] += output_error(made.dequantize() - weight, x)
            power = x.square().mean(0)
            assert torch.equal(made.scales, fit_clip(weight, form, clip, power).scales_RG)
    assert errors["mse"] < 0.9 * errors["minmax"] and errors["hessian"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_on_a_whole_model_it_changes_scales_and_only_hessian_needs_data(run, tiny, clip):
    stage = Rtn(group_size=32, clip=clip, calib=run.calib)
    made, plain = (Checkpoint(run(s, tiny()).path) for s in (stage, Rtn(group_size=32)))
    name = made.decoder.blocks[2].mlp_out
    assert not torch.equal(made.get(f"{name}.scales"), plain.get(f"{name}.scales"))
    assert (stage.inputs(Checkpoint(tiny())) is None) == (clip == "mse")


@pytest.mark.parametrize("method", [Rtn, Gptq])
def test_an_unknown_clip_is_refused(method):
    with pytest.raises(ValueError, match="got 'percentile'"):
        method(clip="percentile")
