"""Whitened SVD against its theorem: it loses the discarded singular values of W S, and no factors
of that rank lose less."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe import model
from optpipe.allocate import Option, allocate
from optpipe.artifact import Artifact
from optpipe.bounds import departure
from optpipe.calibrate import Cross
from optpipe.checkpoint import Checkpoint
from optpipe.linear import PER_CHANNEL, Form
from optpipe.lowrank.factorize import truncated
from optpipe.lowrank.svdllm import SvdLlm, discarded, whitened
from optpipe.quant.rtn import Rtn
from optpipe.sensitivity import felt
from optpipe.verify import verify


def loss(weight, other, gram):
    difference = weight - other
    return float(torch.trace(difference @ gram @ difference.T))


def layer(kind, seed, rows=24, cols=40, tokens=400):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
        x = x * torch.arange(1, cols + 1) ** -1.0 @ mix
    elif kind == "outliers":
        x[:, :3] *= 30
    elif kind == "singular":
        x = x[:, :9] @ torch.randn(9, cols, generator=generator, dtype=torch.float64)
    return weight, x.T @ x / tokens


KINDS = ["white", "correlated", "outliers", "singular"]


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS[:3]), rank=st.integers(1, 23), seed=st.integers(0, 50))
def test_loss_is_the_sum_of_what_was_discarded(kind, rank, seed):
    weight, gram = layer(kind, seed)
    left, right = whitened(weight, gram, rank)
    # by Cholesky, another root of the same Gram matrix
    discarded = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram))[rank:].square().sum()
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert abs(loss(weight, left @ right, gram) - float(discarded)) < 1e-9 * whole


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(KINDS), rank=st.integers(1, 23), seed=st.integers(0, 50))
def test_no_other_factors_of_the_rank_lose_less(kind, rank, seed):
    weight, gram = layer(kind, seed)
    left, right = whitened(weight, gram, rank)
    ours = loss(weight, left @ right, gram)
    plain = truncated(weight, rank)
    scale = gram.diagonal().sqrt().sqrt()
    asvd = truncated(weight * scale, rank)
    generator = torch.Generator().manual_seed(seed)
    nudge = 1e-3 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
    others = [plain[0] @ plain[1], asvd[0] @ asvd[1] / scale, (left + nudge) @ right]
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert all(ours <= loss(weight, other, gram) + 1e-9 * whole for other in others)


def test_white_inputs_make_it_plain_svd():
    weight = torch.randn(24, 40, dtype=torch.float64)
    left, right = whitened(weight, 3 * torch.eye(40, dtype=torch.float64), 8)
    expected = truncated(weight, 8)
    torch.testing.assert_close(left @ right, expected[0] @ expected[1])


def test_more_rank_than_live_inputs_loses_nothing():
    weight, gram = layer("singular", 0)
    left, right = whitened(weight, gram, 20)
    assert left.shape == (24, 20) and right.shape == (20, 40)
    whole = loss(weight, torch.zeros_like(weight), gram)
    assert loss(weight, left @ right, gram) < 1e-12 * whole


@pytest.mark.parametrize("kind", ["correlated", "outliers"])
def test_far_better_than_plain_svd_where_inputs_are_not_white(kind):
    ratios = []
    for seed in range(8):
        weight, gram = layer(kind, seed)
        pairs = whitened(weight, gram, 8), truncated(weight, 8)
        ours, plain = (loss(weight, left @ right, gram) for left, right in pairs)
        ratios.append(ours / plain)
    assert sum(ratios) / len(ratios) < 0.5


def compared(seed=0, rows=24, cols=40, tokens=400):
    """A layer whose inputs have moved since: x0 before, x now, and the statistic of both."""
    generator = torch.Generator().manual_seed(seed)
    weight, _ = layer("correlated", seed)
    x0 = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    x = 0.8 * x0 + 0.3 * torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
    statistic = Cross(cols)
    for now, before in zip(x.split(100), x0.split(100), strict=True):
        statistic.pair(now, before)
    return weight, x0, x, statistic


def test_the_refitted_factor_is_the_least_squares_solution():
    weight, x0, x, statistic = compared()
    left, right = SvdLlm(refit=True).factors(weight, 8, statistic)
    expected = torch.linalg.lstsq(x @ right.T, x0 @ weight.T).solution.T
    torch.testing.assert_close(left, expected)
    plain = SvdLlm(refit=False).factors(weight, 8, statistic)[0]
    ours, other = ((x @ right.T @ f.T - x0 @ weight.T).square().sum() for f in (left, plain))
    assert ours < other


def test_where_nothing_was_compressed_before_a_refit_changes_nothing():
    weight, x0, _, _ = compared()
    statistic = Cross(40)
    statistic.pair(x0, x0)
    left = SvdLlm(refit=True).factors(weight, 8, statistic)[0]
    torch.testing.assert_close(left, whitened(weight, statistic.mean_CC, 8)[0])


def test_directions_without_inputs_do_not_break_a_refit():
    weight, x0, _, _ = compared()
    statistic = Cross(40)
    statistic.pair(x0 * (torch.arange(40) < 5), x0)
    assert torch.isfinite(SvdLlm(refit=True).factors(weight, 8, statistic)[0]).all()


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 50))
def test_what_the_loss_feels_of_every_rank_is_known_from_one_decomposition(kind, seed):
    """tr(D H D^T G), with D what the factors of that rank are off by."""
    weight, gram = layer(kind, seed)
    gradients = layer("correlated", seed + 1, cols=24)[1]
    lost = discarded(weight, gram, gradients)
    whole = float(torch.trace(weight @ gram @ weight.T @ gradients))
    assert len(lost) == 25 and lost[-1] == 0
    assert float(lost[0]) == pytest.approx(whole, rel=1e-9)
    for rank in (1, 8, 20):
        left, right = whitened(weight, gram, rank)
        off = weight - left @ right
        expected = float(torch.trace(off @ gram @ off.T @ gradients))
        assert abs(expected - float(lost[rank])) < 1e-8 * whole


@pytest.fixture
def allocated(run, tiny):
    fields = {"rank_multiple": 4, "keep": 0.7, "calib": run.calib}
    stages = [SvdLlm(allocation=how, **fields) for how in ("allocator", "uniform")]
    return stages, [run(stage, tiny()) for stage in stages]


def test_the_allocator_settles_ranks_within_the_plan_and_the_budget(allocated, run, tiny):
    (stage, _), (made, uniform) = allocated
    source = Checkpoint(tiny())
    layers, forms = model.layers(source), Checkpoint(made.path).forms
    planned = stage.plan(layers)
    assert departure(forms, planned) is None and forms != planned
    verify(made, Artifact(path=tiny(), format="hf", key="k"), planned)
    blocks = [name for name in layers if name != "lm_head"]
    budget = 0.7 * sum(layers[n].rows * layers[n].cols for n in blocks)
    taken = sum(f.rows * f.cols for n, f in forms.items() if n != "lm_head")
    assert budget - 1000 < taken <= budget  # less than one step of any layer is left
    assert len(set(made.stats["ranks"].values())) > len(set(uniform.stats["ranks"].values()))
    # what comes next plans on bounds, and works on what was settled
    quant = Rtn(group_size=PER_CHANNEL)
    after = run(quant, made)
    assert departure(Checkpoint(after.path).forms, quant.plan(planned)) is None


def test_ranks_are_those_of_one_budget_over_what_the_loss_feels(allocated, tiny, run):
    _, (made, _) = allocated
    checkpoint, curves = Checkpoint(tiny()), {}
    layers = {n: f for n, f in model.layers(checkpoint).items() if n != "lm_head"}
    for name, module, fed, back in felt(checkpoint, run.calib.ids(checkpoint), layers, print):
        weight, form = module.weight.double(), layers[name]
        ranks = range(4, int(0.8 * form.rows * form.cols / (form.rows + form.cols)) + 1, 4)
        curves[name] = [Option(form.rows * form.cols, 0.0)]
        for rank in ranks:
            left, right = whitened(weight, fed.mean_CC, rank)
            off = weight - left @ right
            lost = float(torch.trace(off @ fed.mean_CC @ off.T @ back.mean_CC))
            curves[name].append(Option(rank * (form.rows + form.cols), lost))
    budget = 0.7 * sum(form.rows * form.cols for form in layers.values())
    taken = allocate(curves, budget)
    assert made.stats["ranks"] == {name: 4 * taken[name] for name in layers if taken[name]}


def test_a_quantization_needs_groups_that_divide_every_rank_there_may_be(tiny):
    planned = SvdLlm(rank_multiple=4, keep=0.7).plan(model.layers(Checkpoint(tiny())))
    with pytest.raises(ValueError, match=r"group_size=32 does not divide the 4 inputs of .*left"):
        Rtn(group_size=32).plan(planned)


def test_ranks_go_where_the_loss_feels_them_and_a_costly_layer_stays_whole():
    """Two layers of the same size, one with a spectrum that no rank can leave out anything of."""
    stage, form = SvdLlm(rank_multiple=4), Form(rows=24, cols=40)
    flat, steep = torch.linspace(1, 0, 25) * 100, torch.linspace(1, 0, 25) ** 12
    curves = {"flat": stage.options(form, flat), "steep": stage.options(form, steep)}
    assert [option.cost for option in curves["flat"]] == [256, 512, 768, 960]
    assert allocate(curves, 0.7 * 2 * 960) == {"flat": 3, "steep": 0}


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match=r"allocation must be one of .* got 'best'"):
        SvdLlm(allocation="best")


def test_a_layer_too_small_for_a_rank_stays_whole_under_one_budget_and_is_refused_alone():
    layers = {"large": Form(rows=64, cols=96), "small": Form(rows=6, cols=64)}
    planned = SvdLlm(rank_multiple=8).plan(layers)
    assert [*planned] == ["large.right", "large.left", "small"]
    with pytest.raises(
        ValueError, match=r"'small' .*multiple of 8; lower rank_multiple to at mo.* 4"
    ):
        SvdLlm(allocation="uniform", rank_multiple=8).plan(layers)
    with pytest.raises(
        ValueError, match=r"'small' \(1 x 64\) no rank .*; leave it out of targets$"
    ):
        SvdLlm(allocation="uniform", rank_multiple=1).plan({"small": Form(rows=1, cols=64)})


def test_a_budget_that_no_ranks_meet_is_refused_before_any_work():
    """The least is 16 * 160 of 6144 parameters in the large layer and all 384 of the small one."""
    layers = {"large": Form(rows=64, cols=96), "small": Form(rows=6, cols=64)}
    with pytest.raises(ValueError, match=r"keep=0.45 is below 0.451, the share .* at rank 16"):
        SvdLlm(rank_multiple=16, keep=0.45).plan(layers)
    SvdLlm(rank_multiple=16, keep=0.46).plan(layers)


def test_no_two_products_are_planned_that_take_as_long_as_one():
    """Nor settled: above 0.8 of the parameters, rank 30 here, a layer stays whole."""
    form = Form(rows=64, cols=96)
    assert SvdLlm(rank_multiple=1).plan({"a": form})["a.right"].rows == 30
    assert SvdLlm(rank_multiple=1).costs(form) == [*range(160, 4801, 160), 6144]
