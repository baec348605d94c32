"""Pruning and rounding in one pass, against each half alone and the recursion written out."""

from dataclasses import replace

import pytest
import torch
from layers import KINDS, Layer

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError
from optpipe.linear import Form, dense, mask_of, weight_of
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.mask import follows
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.quant.gptq import Gptq
from optpipe.quant.grid import fit
from optpipe.quant.joint import Joint
from optpipe.quant.rtn import Rtn
from optpipe.verify import verify


def made(layer, bits=4, **fields):
    pattern = fields.get("pattern", "layer")
    form = Form(rows=24, cols=64, bits=bits, group_size=32, pattern=pattern)
    stage = Joint(bits=bits, group_size=32, clip="minmax", **fields)
    return stage.quantize(dense(layer.weight, None), layer.weight, form, layer.gram)


def slow(layer, form):
    """2:4 and rounding with an inverse of the Hessian for every column."""
    grid, gram = fit(layer.weight, form), layer.gram.mean_CC
    work, keep = layer.weight.double().clone(), torch.ones(24, 64, dtype=torch.bool)
    for j in range(64):
        if j % 4 == 0:
            inverses = [torch.linalg.inv(gram[i:, i:])[0, 0] for i in range(j, j + 4)]
            cost = work[:, j : j + 4].square() / torch.stack(inverses)
            keep[:, j : j + 4] = cost >= cost.sort(1).values[:, 2, None]
        inverse = torch.linalg.inv(gram[j:, j:])
        fixed = grid.column(work[:, j], j)[1] * keep[:, j]
        work[:, j:] -= ((work[:, j] - fixed) / inverse[0, 0])[:, None] * inverse[0]
        work[:, j] = fixed
    return work, keep


def test_equals_the_recursion_written_out():
    layer = Layer("correlated", 0)
    found = made(layer, pattern="2:4", damp=1e-12)
    weight, keep = slow(layer, Form(rows=24, cols=64, bits=4, group_size=32))
    assert torch.equal(mask_of(found), keep)
    torch.testing.assert_close(weight_of(found).double(), weight, rtol=1e-3, atol=1e-4)


def test_nothing_to_drop_makes_it_gptq_in_the_order_of_the_columns():
    layer = Layer("correlated", 1)
    found = made(layer, sparsity=0.0)
    form = Form(rows=24, cols=64, bits=4, group_size=32)
    stage = Gptq(act_order=False, clip="minmax")
    gptq = stage.quantize(dense(layer.weight, None), layer.weight, form, layer.gram)
    assert torch.equal(found.codes, gptq.codes) and torch.equal(found.scales, gptq.scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_the_pattern_holds_and_compensated_rounding_beats_rounding_after_sparsegpt(kind, pattern):
    errors = []
    for seed in range(8):
        layer = Layer(kind, seed)
        ours = made(layer, bits=3, pattern=pattern)
        keep = mask_of(ours)
        assert follows(keep, pattern) and not weight_of(ours)[~keep].any()
        assert int((~keep).sum()) == 12 * 64
        sparse, mask = SparseGpt(pattern=pattern).pruned(layer.weight, layer.gram)
        form = Form(rows=24, cols=64, bits=3, group_size=32, pattern=pattern)
        after = Rtn().quantize(dense(sparse, None, mask), sparse, form, None)
        errors.append([layer.error(weight_of(w)) for w in (ours, after)])
    ours, after = torch.tensor(errors).mean(0)
    assert ours < after


def test_a_model_is_sparse_and_quantized_after_one_stage(run, tiny):
    stage = Joint(bits=4, group_size=32, pattern="2:4", calib=run.calib, targets=["*.mlp.*"])
    checkpoint = Checkpoint(run(stage, tiny()).path)
    assert checkpoint.forms == stage.plan(model.layers(Checkpoint(tiny())))
    form = checkpoint.forms["model.layers.0.mlp.up_proj"]
    assert (form.bits, form.pattern) == (4, "2:4")


def test_the_zeros_it_claims_are_there_those_of_a_stage_before_included(run, tiny):
    pruned = run(Magnitude(targets=["*.q_proj"]), tiny())
    stage = Joint(sparsity=0.3, group_size=32, calib=run.calib, targets=["*.mlp.*"])
    made = run(stage, pruned)
    layers = model.layers(Checkpoint(made.path))
    gone = 3 * (64 * 64 // 2 + 3 * round(0.3 * 64 * 96))
    whole = sum(form.rows * form.cols for form in layers.values())
    assert made.stats["sparsity"] == pytest.approx(gone / whole, rel=1e-12)
    assert verify(made, pruned, stage.plan(layers_of(pruned)))["sparsity"] >= gone / whole
    with pytest.raises(GateError, match=r"a sparsity of 0\.5 was claimed"):
        verify(replace(made, stats={"sparsity": 0.5}), pruned, None)


def layers_of(artifact):
    return model.layers(Checkpoint(artifact.path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"pattern": "4:2"}, "pattern N:M"),
        ({"damp": 0.0}, "damp must be above 0"),
        ({"clip": "best"}, "clip"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Joint(**fields)


def test_layers_that_are_pruned_or_quantized_already_are_refused():
    for fields, message in (({"bits": 4}, "quantized already"), ({"pattern": "row"}, "pruned")):
        with pytest.raises(ValueError, match=message):
            Joint(group_size=32).plan({"a": Form(rows=8, cols=32, **fields)})
