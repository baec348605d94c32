"""Scales of inputs, and the stages that round inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.linear import round_inputs
from optpipe.quant.fp8 import Fp8
from optpipe.quant.inputs import Magnitudes, input_scale
from optpipe.quant.int8 import Int8


@given(largest=st.floats(1e-6, 5e6), top=st.sampled_from([127.0, 448.0]))
def test_a_scale_is_the_next_that_both_short_types_hold(largest, top):
    scale = input_scale(largest, top)
    assert scale.dtype == torch.float16
    assert torch.equal(scale.bfloat16().half(), scale)
    exact = largest / top
    assert exact <= float(scale) <= max(exact * (1 + 2**-7), exact + 2**-24)


def test_nothing_seen_and_too_much():
    assert float(input_scale(0.0, 127.0)) == 1
    with pytest.raises(ValueError, match="float16"):
        input_scale(1e8, 127.0)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_percentiles_are_those_of_all_magnitudes(percent):
    x = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).exp()
    seen = Magnitudes(500)
    for part in x.split(16):
        seen.add(part)
    exact = float(
        x.double().abs().flatten().sort().values[math.ceil(x.numel() * percent / 100) - 1]
    )
    assert exact * (1 - 1e-6) <= seen.percentile(percent) <= exact * 2 ** (1 / 64 + 1e-6)
    assert percent < 100 or seen.percentile(100) == float(x.max())


def test_zeros_and_infinitesimals_count():
    seen = Magnitudes(2)
    seen.add(torch.zeros(3, 2))
    assert seen.percentile(99) == seen.percentile(100) == 0
    seen.add(torch.tensor([[1e-30, 3.0]]))
    assert seen.percentile(50) < 1e-10 and seen.percentile(100) == 3


@pytest.mark.parametrize("stage", [Int8, Fp8])
def test_scales_span_what_the_compressed_model_feeds_its_layers(stage, run, tiny):
    made = Checkpoint(run(stage(percentile=100.0, calib=run.calib), tiny()).path)
    ids = run.calib.ids(made)
    lm, largest = model.load(made), {}
    for name, layer in lm.named_modules():
        if name in made.forms and made.forms[name].inputs:

            def hook(_, args, name=name):
                largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

            layer.register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in ids:
            lm(row[None])
    assert len(largest) == 21
    top = 127 if stage is Int8 else 448
    for name, most in largest.items():
        got, exact = made.get(f"{name}.input_scale"), input_scale(most, top)
        if name.endswith(("q_proj", "k_proj", "v_proj")):  # others: their block was still exact
            assert torch.equal(got, exact), name
        torch.testing.assert_close(got, exact, rtol=0.15, atol=0)


JOINED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


@pytest.mark.parametrize("stage", [
    Int8(activations="token"), Fp8(activations="token", weights="channel"),
    Fp8(activations="token"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_rounded_weights_and_inputs(stage, family, run, tiny):
    """Against transformers' own layers, with weights and inputs rounded from outside."""
    made = Checkpoint(run(stage, tiny(family)).path)
    source = model.load(Checkpoint(tiny(family)))
    top = 127 if isinstance(stage, Int8) else 448

    def rounded(x, scale):
        x = x / scale
        near = x.round() if top == 127 else x.to(torch.float8_e4m3fn).float()
        return near * scale

    def peak_of(name, form):
        """Of a row; one scale for a layer is that of all layers that are fed the same."""
        if form.group_size != 0:
            return source.get_submodule(name).weight.abs().amax(-1, True)
        owner, _, own = name.rpartition(".")
        together = next((names for names in JOINED if own in names), [own])
        return max(source.get_submodule(f"{owner}.{one}").weight.abs().max() for one in together)

    peaks = {name: peak_of(name, form) for name, form in made.forms.items() if form.inputs}
    for name, peak in peaks.items():
        layer = source.get_submodule(name)
        up = (peak / top).half()
        up = torch.where(up.float() < peak / top, (up.view(torch.int16) + 1).view(torch.half), up)
        layer.weight.copy_(rounded(layer.weight, up.float()))
        layer.register_forward_pre_hook(
            lambda _, args: (rounded(args[0], args[0].abs().amax(-1, True) / top),)
        )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.load(made)(ids).logits, source(ids).logits)


def test_a_percentile_saturates_what_is_beyond(run, tiny):
    all_of_it, most = (
        Checkpoint(run(Int8(percentile=p, calib=run.calib), tiny()).path) for p in (100.0, 99.0)
    )
    name = "model.layers.0.mlp.down_proj.input_scale"
    assert most.get(name) < 0.9 * all_of_it.get(name)
    x = torch.tensor([127.0 * float(all_of_it.get(name))])
    assert float(round_inputs(x, "int8_tensor", most.get(name))) == 127 * float(most.get(name))


def test_a_percentile_that_nothing_would_read_is_refused():
    with pytest.raises(ValueError, match="percentile=50 has no effect with activations=token"):
        Fp8(activations="token", percentile=50.0)


@pytest.mark.parametrize("fields", [
    {"activations": "channel"}, {"percentile": 0.0}, {"percentile": 100.5},
    {"weights": "group"},
])  # fmt: skip
def test_bad_fields_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} must be .* got '?{value}"):
        Fp8(**fields)
