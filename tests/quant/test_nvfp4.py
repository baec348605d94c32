"""NVFP4 weights and inputs as stages, and what of it other methods take for free."""

import pytest
import torch
from torch import nn

from optpipe import model
from optpipe.calibrate import Gram
from optpipe.checkpoint import Checkpoint
from optpipe.family import joined
from optpipe.linear import Form
from optpipe.quant.awq import Awq
from optpipe.quant.gptq import Gptq
from optpipe.quant.joint import Joint
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.quant.rtn import Rtn

NVFP4 = {"number": "nvfp4", "bits": 4, "group_size": 16}


def test_scales_of_inputs_put_the_largest_seen_at_the_largest_number(run, tiny):
    made = Checkpoint(run(Nvfp4(activations="block", calib=run.calib), tiny()).path)
    source, largest = model.load(Checkpoint(tiny())), {}
    layer = source.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(
        lambda _, args: largest.update(q=max(largest.get("q", 0), float(args[0].abs().max())))
    )
    with torch.no_grad():
        for row in run.calib.ids(made):
            source(row[None])
    scale = made.tensor("model.layers.0.self_attn.q_proj.input_scale")
    assert scale.dtype == torch.float32
    torch.testing.assert_close(float(scale), largest["q"] / 2688, rtol=1e-6, atol=0)
    assert made.forms["model.layers.2.mlp.down_proj"].inputs == "nvfp4_block"
    assert made.forms["model.layers.2.mlp.down_proj"].static_inputs


def test_without_inputs_it_is_rounding_to_nearest_and_needs_no_data(run, tiny):
    stage = Nvfp4(method="rtn", clip="mse")
    assert stage.inputs(Checkpoint(tiny())) is None
    ours, rtn = (Checkpoint(run(s, tiny()).path) for s in (stage, Rtn(clip="mse", **NVFP4)))
    name = "model.layers.1.mlp.up_proj"
    for part in ("codes", "scales", "global_scale"):
        one, other = (c.tensor(f"{name}.{part}") for c in (ours, rtn))
        assert torch.equal(one.float(), other.float())
    assert ours.forms == rtn.forms


@pytest.mark.parametrize("method", [Rtn, Gptq, Awq, Joint])
def test_every_method_gives_layers_multiplied_as_one_the_same_global_scale(method, run, tiny):
    calibrated = {} if method is Rtn else {"calib": run.calib}
    made = Checkpoint(run(method(**NVFP4, **calibrated), tiny("llama")).path)
    for names in joined(made.forms):
        assert len({float(made.tensor(f"{name}.global_scale")) for name in names}) == 1
    apart = {float(made.tensor(f"{n}.global_scale")) for n, f in made.forms.items() if f.bits}
    assert len(apart) == 12, "q, k and v, gate and up, and two layers alone, in three blocks"


@pytest.mark.parametrize("kind", ["white", "correlated", "outliers"])
def test_gptq_takes_the_grid_as_it_takes_integers(kind, layer, output_error):
    weight, x = layer(kind, 0)
    form = Form(rows=32, cols=64, symmetric=True, **NVFP4)
    gram = Gram(64)
    gram.add(x.float())
    linear = nn.Linear(64, 32, bias=False)
    gptq = Gptq(**NVFP4).quantize(linear, weight, form, gram).dequantize()
    rtn = Rtn(**NVFP4).quantize(linear, weight, form, None).dequantize()
    errors = [output_error(w - weight, x) for w in (gptq, rtn)]
    assert errors[0] < (1.0 if kind == "white" else 0.7) * errors[1]


def test_by_gptq_codes_are_those_of_stage_gptq(run, tiny):
    ours, gptq = (
        Checkpoint(run(s, tiny()).path)
        for s in (Nvfp4(activations="block", calib=run.calib), Gptq(calib=run.calib, **NVFP4))
    )
    name = "model.layers.0.self_attn.k_proj"  # before any input was rounded
    assert torch.equal(ours.tensor(f"{name}.codes"), gptq.tensor(f"{name}.codes"))


@pytest.mark.parametrize("fields", [
    {"activations": "tensor"}, {"clip": "max"}, {"percentile": 0.0}, {"method": "awq"},
])  # fmt: skip
def test_bad_fields_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} must be .* got '?{value}"):
        Nvfp4(**fields)


def test_what_has_no_effect_and_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="percentile=99 has no effect with activations=none"):
        Nvfp4(percentile=99.0)
    layers = {"model.layers.0.odd": Form(rows=8, cols=40)}
    with pytest.raises(ValueError, match=r"16 does not divide the 40 inputs of layer '.*odd'"):
        Nvfp4().plan(layers)
    for fields in ({"bits": 8}, {"group_size": 32}, {"symmetric": False}):
        with pytest.raises(ValueError, match="number=nvfp4 takes bits=4 and symmetric=true and g"):
            Rtn(**{**NVFP4, **fields})
