"""Checkpoints in NVFP4, against the packing of compressed-tensors and of nvidia-modelopt."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpipe import microscaling, model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export.readback import read_back
from optpipe.export.trtllm import Trtllm
from optpipe.export.trtllm_legacy import TrtllmLegacy
from optpipe.export.vllm import Vllm, scheme
from optpipe.quant.fp8 import Fp8
from optpipe.quant.nvfp4 import Nvfp4

INPUTS = ["none", "block"]


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def quantized(run, half, made):
    """quantized(activations) -> an artifact of the tiny model in NVFP4, made once."""

    def make(activations="none"):
        if activations not in made:
            stage = Nvfp4(activations=activations, method="rtn", clip="minmax", calib=run.calib)
            made[activations] = run(stage, half("llama"))
        return made[activations]

    return make


def layers(source):
    found = Checkpoint(source.path)
    return {n: model.layer(n, found.forms, found) for n, f in found.forms.items() if f.bits}


@pytest.mark.parametrize("activations", INPUTS)
def test_the_library_reads_the_weights_that_we_multiply_with(activations, run, quantized):
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    source = quantized(activations)
    made = Checkpoint(run(Vllm(), source).path)
    settings = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "nvfp4-pack-quantized"
    (group,) = settings["config_groups"].values()
    theirs = schemes.QuantizationScheme(**group)
    preset = schemes.preset_name_to_scheme("NVFP4" if activations == "block" else "NVFP4A16", [])
    assert theirs.weights == preset.weights
    if activations == "block":
        wanted = preset.input_activations.model_copy(update={"observer": None})
        assert theirs.input_activations.model_copy(update={"observer": None}) == wanted
    for name, layer in layers(source).items():
        parts = nvfp4.NVFP4PackedCompressor.compression_param_names(theirs)
        stored = {part: made.get(f"{name}.{part}") for part in parts}
        assert all(tensor is not None for tensor in stored.values())
        codes = nvfp4.unpack_fp4_from_uint8(stored["weight_packed"], *layer.codes.shape)
        steps = stored["weight_scale"].float() / stored["weight_global_scale"]
        weight = codes.float() * steps.repeat_interleave(16, 1)
        torch.testing.assert_close(weight, layer.dequantize(), rtol=1e-6, atol=0)
        assert torch.equal(codes.float(), microscaling.numbers(layer.codes, "nvfp4"))
        assert torch.equal(nvfp4.pack_fp4_to_uint8(codes), stored["weight_packed"])
        assert stored["weight_scale"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("exporter", [Vllm, Trtllm])
def test_layers_multiplied_as_one_have_one_global_scale(exporter, run, half, quantized):
    """That of their largest weight, so that the scales of blocks are written as they are."""
    source, plain = quantized(), model.load(Checkpoint(half("llama")))
    made = run(exporter(), source)
    read_back(made, source)
    stored = Checkpoint(made.path)
    part = {"vllm": "weight_global_scale", "trtllm": "weight_scale_2"}[made.format]
    for block in stored.decoder.blocks:
        for names in (block.qkv, block.mlp_in, [block.attn_out], [block.mlp_out]):
            largest = max(float(plain.get_submodule(name).weight.abs().max()) for name in names)
            whole = torch.tensor(largest) / (6 * 448)
            found = {float(stored.get(f"{name}.{part}")) for name in names}
            assert found == {float(whole if made.format == "trtllm" else 1 / whole)}
            for name in names:
                ours = layers(source)[name]
                assert ours.global_scale == whole
                assert torch.equal(stored.get(f"{name}.weight_scale").float(), ours.scales.float())


@pytest.mark.parametrize("stage, exporter", [
    (Nvfp4(method="rtn", clip="mse"), Vllm), (Nvfp4(method="rtn", clip="mse"), Trtllm),
    (Fp8(), Vllm), (Fp8(), TrtllmLegacy),
])  # fmt: skip
def test_layers_with_two_scales_are_refused(stage, exporter, run, half):
    stage = replace(stage, calib=run.calib)
    first = run(replace(stage, targets=["*.q_proj"]), half("llama"))
    rest = ["*.k_proj", "*.v_proj", "*.o_proj", "*.mlp.*"]
    source = run(replace(stage, targets=rest), first)
    with pytest.raises(InputError, match=r"q_proj' and '.*, with one scale, .* in one stage"):
        run(exporter(), source)


@pytest.mark.parametrize("activations", INPUTS)
def test_a_unified_checkpoint_is_in_the_words_of_modelopt(activations, run, quantized):
    """Of modelopt 0.47: NVFP4QTensor.quantize, get_weights_scaling_factor_2, quant_utils.py."""
    source = quantized(activations)
    made = run(Trtllm(), source)
    assert read_back(made, source)["layers_with_codes_bit_exact"] > 0
    stored, algorithm = Checkpoint(made.path), {"none": "W4A16_NVFP4", "block": "NVFP4"}
    told = json.loads((made.path / "hf_quant_config.json").read_text())["quantization"]
    assert (told["quant_algo"], told["group_size"]) == (algorithm[activations], 16)
    for name, layer in layers(source).items():
        rows, cols = layer.codes.shape
        weight, scale = stored.get(f"{name}.weight"), stored.get(f"{name}.weight_scale")
        assert (weight.dtype, weight.shape) == (torch.uint8, (rows, cols // 2))
        assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, cols // 16))
        assert torch.equal(weight & 15, layer.codes[:, 0::2])
        assert torch.equal(weight >> 4, layer.codes[:, 1::2])
        assert stored.get(f"{name}.weight_scale_2").shape == ()
        inputs = stored.get(f"{name}.input_scale")
        assert (inputs is None) == (activations == "none")
        if inputs is not None:
            assert inputs.dtype == torch.float32 and inputs == layer.input_scale


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_global_scale"])
def test_reading_back_finds_a_wrong_value(part, run, quantized):
    source = quantized()
    made = run(Vllm(), source)
    file = made.path / "model.layers.1.safetensors"
    tensors, name = load_file(file), f"model.layers.1.mlp.down_proj.{part}"
    if part == "weight_global_scale":
        tensors[name] *= 1 + 1e-5
    else:
        tensors[name].view(torch.uint8)[3, 1] ^= 1
    save_file(tensors, file)
    with pytest.raises(GateError, match=r"down_proj\.weight"):
        read_back(made, source)


def test_rank_files_in_nvfp4_are_refused(run, half):
    planned = Nvfp4().plan(model.layers(Checkpoint(half("llama"))))
    with pytest.raises(ValueError, match="writes no W4A16_NVFP4; export=trtllm does"):
        TrtllmLegacy().plan(planned)
    assert scheme(planned["model.layers.0.mlp.up_proj"])["input_activations"] is None
