"""nvidia-modelopt's presets: what we store is what its own quantizers compute."""

import pytest
import torch

from optpipe import model
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import joined
from optpipe.linear import mask_of, pack, round_inputs
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.modelopt import Modelopt
from optpipe.quant.presets import PRESETS, Rounding, imported
from optpipe.quant.rtn import Rtn

CALIB = Calib(source="random", samples=4, tokens=32)
IDS = torch.randint(3, 288, (2, 30), generator=torch.Generator().manual_seed(0))


def theirs(stage, folder, device="cpu"):
    """The model as modelopt leaves it."""
    checkpoint = Checkpoint(folder)
    lm = model.load(checkpoint).to(device)
    ids = stage.calib.ids(checkpoint).to(device)
    with imported() as mtq, torch.no_grad():
        config = PRESETS[stage.preset].settings(mtq, stage.group_size)
        return mtq.quantize(lm, config, lambda lm: [lm(i[None]) for i in ids])


@torch.no_grad()
def logits(lm, ids=IDS):
    return lm(ids).logits.double()


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("preset", ["int4_rtn", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_weight_is_theirs(preset, family, run, tiny):
    stage = Modelopt(preset=preset, group_size=32, calib=CALIB)
    made, lm = Checkpoint(run(stage, tiny(family)).path), theirs(stage, tiny(family))
    for names in joined(made.forms) if preset == "fp8" else []:  # as its exporter does
        quantizers = [lm.get_submodule(name).weight_quantizer for name in names]
        largest = max(float(quantizer.amax) for quantizer in quantizers)
        for quantizer in quantizers:
            quantizer.amax.fill_(largest)
    for name, form in made.forms.items():
        if form.bits is None:
            continue
        layer, other = model.layer(name, made.forms, made), lm.get_submodule(name)
        with torch.no_grad():
            expected = other.weight_quantizer(other.weight)
        # the scale alone is rounded, to float16, with steps of 2 ** -24 below its normal range
        step = 0.5 * float(layer.scales.float().min()) * 2**-10 + 2**-25
        bound = expected.abs() * 2**-11 + layer.codes.max() * step
        assert ((layer.dequantize() - expected).abs() <= bound).all(), name
        assert torch.equal(layer.dequantize() == 0, expected == 0)
        if preset == "fp8":
            reach = float(other.input_quantizer.amax)
            assert reach <= float(layer.input_scale) * 448 < reach * 1.01
            x = torch.randn(4, form.cols) * reach / 3
            ours = round_inputs(x, "fp8_tensor", layer.input_scale)
            assert relative(ours, other.input_quantizer(x)) < 0.05
    assert relative(logits(model.load(made)), logits(lm)) < (0.002 if preset == "int4_rtn" else 0.1)


def codes_of(other, form):
    """The codes in modelopt's rounded weight, which the factors of whole rows do not change."""
    with torch.no_grad():
        rounded = other.weight_quantizer(other.weight).reshape(form.rows, form.groups, -1)
    largest = other.weight.abs().reshape(form.rows, form.groups, -1).amax(-1, keepdim=True)
    half = 2 ** (form.bits - 1)
    return (rounded / largest * (half - 1)).round().reshape(form.rows, form.cols) + half


@pytest.mark.parametrize("preset", ["int4_awq", "w4a8", "int8_smoothquant"])
def test_scaled_inputs_are_folded(preset, run, tiny):
    """Layers that share their inputs with none have exactly their codes: all but attn_out, whose
    inputs come from fewer values, in a family whose q, k and v, and gate and up, are one layer."""
    stage, folder = Modelopt(preset=preset, group_size=32, calib=CALIB), tiny("phi3")
    made, lm = Checkpoint(run(stage, folder).path), theirs(stage, folder)
    ours = model.load(made)
    for block in made.decoder.blocks:
        for name in (*block.qkv, *block.mlp_in, block.mlp_out):
            layer, other = ours.get_submodule(name), lm.get_submodule(name)
            assert (layer.codes == codes_of(other, layer.form)).float().mean() > 0.999, name
            if (top := {"int8_smoothquant": 127, "w4a8": 448}.get(preset)) is not None:
                reach = float(other.input_quantizer.amax)
                assert reach * 0.999 <= float(layer.input_scale) * top < reach * 1.01
    exact = logits(model.load(Checkpoint(folder)))
    assert relative(logits(ours), exact) < 1.1 * relative(logits(lm), exact) < 0.6


def test_nvfp4_has_the_bytes_of_modelopt(run, tiny):
    """Its quantizers run on CUDA only, the class of its packed weights does not."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stage, folder = Modelopt(preset="nvfp4", calib=CALIB), tiny("llama")
    made, before = Checkpoint(run(stage, folder).path), model.load(Checkpoint(folder))
    seen = {}
    for name in made.decoder.blocks[0].linears:
        before.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).append(float(x[0].abs().max()))
        )
    for ids in CALIB.ids(made):
        logits(before, ids[None])
    for name, inputs in seen.items():
        layer = model.layer(name, made.forms, made)
        together = next((names for names in joined(seen) if name in names), [name])
        largest = max(before.get_submodule(each).weight.abs().max() for each in together)
        packed, scales, whole = NVFP4QTensor.quantize(
            before.get_submodule(name).weight, 16, weights_scaling_factor_2=largest / 2688
        )
        assert torch.equal(pack(layer.codes, 4), packed._quantized_data)
        assert torch.equal(layer.scales.float(), scales.float())
        assert torch.equal(layer.global_scale, whole)
        torch.testing.assert_close(float(layer.input_scale), max(inputs) / 2688, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_awq"])
def test_nvfp4_computes_what_modelopt_does_on_a_gpu(preset, run, tiny):
    stage, folder = Modelopt(preset=preset, calib=CALIB), tiny("phi3")
    exact = logits(model.load(Checkpoint(folder)))
    ours = logits(model.load(Checkpoint(run(stage, folder).path)))
    them = logits(theirs(stage, folder, "cuda"), IDS.cuda()).cpu()
    lost = relative(them, exact)
    assert relative(ours, exact) < 1.2 * lost < 0.6
    assert preset == "nvfp4_awq" or relative(ours, them) < 0.5 * lost


def test_low_rank_layers_are_scaled_too(run, tiny):
    """The divisors of a left factor are folded into the right one."""
    factored = run(Svd(rank_multiple=8, targets=["*o_proj", "*down_proj"]), tiny("llama"))
    stage = Modelopt(preset="int8_smoothquant", calib=CALIB)
    exact = logits(model.load(Checkpoint(factored.path)))
    ours = logits(model.load(Checkpoint(run(stage, factored).path)))
    them = logits(theirs(stage, factored.path))
    assert relative(ours, exact) < 1.1 * relative(them, exact) < 0.3


def test_one_block_is_in_memory_while_modelopt_looks(run, tiny, monkeypatch):
    held, lms, load = [], [], model.skeleton

    def skeleton(*args):
        lms.append(load(*args))
        return lms[0]

    def calibrated(self, *args):
        weights = [n for b in Checkpoint(tiny()).decoder.blocks for n in b.linears]
        layers = [next(iter(lms[0].get_submodule(name).state_dict().values())) for name in weights]
        held.append(sum(not tensor.is_meta for tensor in layers))
        return look(self, *args)

    look = Rounding.calibrated
    monkeypatch.setattr(model, "skeleton", skeleton)
    monkeypatch.setattr(Rounding, "calibrated", calibrated)
    run(Modelopt(calib=CALIB), tiny())
    assert held == [7, 7, 7]


def test_masks_survive(run, tiny):
    pruned = run(Magnitude(sparsity=0.5, targets=["*up_proj"]), tiny("qwen2"))
    stage = Modelopt(preset="int8_smoothquant", calib=CALIB)
    before, after = Checkpoint(pruned.path), Checkpoint(run(stage, pruned).path)
    name = before.decoder.blocks[1].mlp_in[1]
    old, new = (model.layer(name, c.forms, c) for c in (before, after))
    assert torch.equal(mask_of(old), mask_of(new)) and not new.dequantize()[~mask_of(old)].any()


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(ValueError, match="'mxfp4': no form here holds"):
        Modelopt(preset="mxfp4")
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'int3'"):
        Modelopt(preset="int3")
    with pytest.raises(ValueError, match="got -1"):
        Modelopt(group_size=-1)
    layers = model.layers(Checkpoint(tiny("llama")))
    with pytest.raises(ValueError, match=r"group_size=128 does not divide the 64 inputs"):
        Modelopt(preset="int4_rtn").plan(layers)
    with pytest.raises(ValueError, match="is quantized already"):
        Modelopt(group_size=32).plan(Rtn(group_size=32).plan(layers))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"'nvfp4_awq': modelopt calibrates it on CUDA only"):
            Modelopt(preset="nvfp4_awq", calib=CALIB).inputs(Checkpoint(tiny()))
    with pytest.raises(InputError, match=r"h.0.mlp.c_proj come from a nonlinear activation"):
        Modelopt(preset="int4_awq", calib=CALIB).inputs(Checkpoint(tiny("gpt2")))
