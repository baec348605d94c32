"""GPTQ against the slow recursion it abbreviates, and against round to nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe import compensate as compensation
from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.compensate import compensate, inverse_factor
from optpipe.linear import Form, mask_of, weight_of
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.gptq import Gptq, Rounding
from optpipe.quant.grid import fit
from optpipe.quant.rtn import Rtn


def inputs(kind, cols, seed, tokens=600):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        mix = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))[0]
        x = x * torch.arange(1, cols + 1, dtype=torch.float64) ** -0.8 @ mix
    if kind == "outliers":
        x[:, 5] *= 30
    return x.T @ x / tokens


def weights(rows, cols, seed):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 100))


def codes_of(weight, gram, form, damp=1e-9, keep=None):
    rounding = Rounding(fit(weight, form), torch.arange(form.cols), keep)
    compensate(weight, inverse_factor(gram, damp), rounding)
    return rounding.codes_RC


def error(weight, codes, gram, form):
    layer = torch.nn.Linear(form.cols, form.rows, bias=False)
    difference = weight.double() - fit(weight, form).module(codes, layer).dequantize().double()
    return float(torch.trace(difference @ gram @ difference.T))


def slow_obs(weight, gram, grid, keep=None):
    """Eq. 2 and 3 of the paper, with the inverse Hessian of the columns that are left."""
    work, left = weight.double().clone(), list(range(weight.shape[1]))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    while left:
        inverse = torch.linalg.inv(gram[left][:, left])
        j = left[0]
        codes[:, j], fixed = grid.column(work[:, j], j)
        if keep is not None:
            fixed = fixed * keep[:, j]
            zero = grid.zeros_RG[:, 0 if grid.form.groups == 1 else j // grid.form.group_size]
            codes[:, j] = torch.where(keep[:, j], codes[:, j], zero)
        step = (work[:, j] - fixed) / inverse[0, 0]
        work[:, left] -= step[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_slow_recursion(masked, symmetric):
    form = Form(rows=5, cols=64, bits=4, group_size=32, symmetric=symmetric)
    weight, gram = weights(5, 64, 0), inputs("correlated", 64, 0)
    keep = torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    if masked:
        weight = weight * keep
    ours = codes_of(weight, gram, form, damp=1e-12, keep=keep)
    assert (ours == slow_obs(weight, gram, fit(weight, form), keep)).float().mean() > 0.995


def test_the_size_of_the_lazy_blocks_does_not_matter(monkeypatch):
    form = Form(rows=8, cols=96, bits=3, group_size=32)
    weight, gram = weights(8, 96, 0), inputs("correlated", 96, 0)
    found = []
    for block in (1, 7, 96, 128):
        monkeypatch.setattr(compensation, "BLOCK", block)
        found.append(codes_of(weight, gram, form))
    assert all(torch.equal(found[0], other) for other in found[1:])


@settings(deadline=None, max_examples=20)
@given(bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 20), scale=st.floats(0.01, 100))
def test_white_inputs_make_it_round_to_nearest(bits, seed, scale):
    form = Form(rows=4, cols=64, bits=bits, group_size=32)
    weight = weights(4, 64, seed)
    codes = codes_of(weight, scale * torch.eye(64, dtype=torch.float64), form)
    assert torch.equal(codes, fit(weight, form).encode(weight))


@pytest.mark.parametrize("kind, limit", [("correlated", 0.5), ("outliers", 0.95)])
@pytest.mark.parametrize("bits", [4, 3])
def test_beats_rounding_where_inputs_are_not_white(kind, limit, bits):
    ratios = []
    for seed in range(8):
        form = Form(rows=32, cols=64, bits=bits, group_size=32)
        weight, gram = weights(32, 64, seed), inputs(kind, 64, seed)
        layer, statistic = torch.nn.Linear(64, 32, bias=False), _Statistic(gram)
        ours = Gptq(bits=bits, clip="minmax").quantize(layer, weight, form, statistic)
        rounded = fit(weight, form).encode(weight)
        ratios.append(error(weight, ours.codes, gram, form) / error(weight, rounded, gram, form))
    assert sum(ratios) / len(ratios) < limit


def test_act_order_makes_up_for_outlier_channels():
    """Left to right, weights of strong inputs are fixed when few others are left to make up."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(8):
        form = Form(rows=32, cols=64, bits=4, group_size=32)
        weight, gram = weights(32, 64, seed), inputs("correlated", 64, seed)
        strong = torch.ones(64, dtype=torch.float64)
        strong[[50, 60]] = 30.0
        gram = gram * strong * strong[:, None]
        for act_order in errors:
            layer = torch.nn.Linear(64, 32, bias=False)
            stage = Gptq(bits=4, act_order=act_order, clip="minmax")
            codes = stage.quantize(layer, weight, form, _Statistic(gram)).codes
            errors[act_order] += error(weight, codes, gram, form)
    assert errors[True] < 0.8 * errors[False]


def test_beats_rounding_on_pruned_weights_too():
    ratios = []
    for seed in range(8):
        form = Form(rows=32, cols=64, bits=3, group_size=32)
        weight, gram = weights(32, 64, seed), inputs("correlated", 64, seed)
        keep = torch.rand(32, 64, generator=torch.Generator().manual_seed(seed)) < 0.5
        weight = weight * keep
        ours = codes_of(weight, gram, form, damp=0.01, keep=keep)
        rounded = fit(weight, form).encode(weight)
        ratios.append(error(weight, ours, gram, form) / error(weight, rounded, gram, form))
    assert sum(ratios) / len(ratios) < 0.8


class _Statistic:
    def __init__(self, gram):
        self.mean_CC = gram


def test_an_input_that_never_comes_is_no_trouble():
    form = Form(rows=4, cols=64, bits=4, group_size=32)
    weight, gram = weights(4, 64, 0), inputs("correlated", 64, 0)
    gram[10] = gram[:, 10] = 0
    for matrix in (gram, torch.zeros_like(gram)):
        layer = torch.nn.Linear(64, 4, bias=False)
        made = Gptq(bits=4, clip="minmax").quantize(layer, weight, form, _Statistic(matrix))
        assert torch.isfinite(made.dequantize()).all()


@pytest.mark.parametrize("method", [Rtn, Gptq])
@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_survive(run, tiny, method, symmetric):
    pruned = run(Magnitude(sparsity=0.5), tiny("phi3"))
    extra = {"calib": run.calib} if method is Gptq else {}
    made = run(method(group_size=32, symmetric=symmetric, **extra), pruned)
    before, after = Checkpoint(pruned.path), Checkpoint(made.path)
    for name, form in after.forms.items():
        if form.pattern is None:
            continue
        old, new = (model.layer(name, c.forms, c) for c in (before, after))
        assert torch.equal(mask_of(old), mask_of(new))
        assert not weight_of(new)[~mask_of(new)].any()


def test_bad_damping_is_refused():
    alike = torch.ones(64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"damp=1e-18 is too small for .*; raise it"):
        inverse_factor(alike, 1e-18)
    with pytest.raises(ValueError, match="damp must be above 0 and finite, got 0"):
        Gptq(damp=0.0)
