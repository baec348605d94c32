"""Checkpoints for vLLM, opened by transformers through the compressed-tensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export.readback import read_back
from optpipe.export.vllm import Vllm, quantization, scheme
from optpipe.kvcache import CacheForm
from optpipe.linear import PER_CHANNEL, PER_TENSOR, Form
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.rtn import Rtn

LINEAR = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]
IDS = torch.arange(3, 60)[None]


def logits(lm):
    with torch.inference_mode():
        return lm.eval()(IDS).logits


def assert_same_logits(made, source, tolerance=1e-4):
    """transformers decodes what we wrote to what our torch model multiplies with."""
    theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    ours = logits(model.load(Checkpoint(source.path)))
    assert (logits(theirs) - ours).abs().max() < tolerance * ours.std()
    assert theirs.config.quantization_config is not None


@pytest.mark.parametrize("family", LINEAR)
def test_transformers_computes_the_same_logits(family, run, half):
    pytest.importorskip("compressed_tensors")
    quantized = run(Rtn(bits=4, group_size=32), half(family))
    made = run(Vllm(), quantized)
    assert_same_logits(made, quantized)
    layers = sum(
        form.bits is not None for form in model.layers(Checkpoint(quantized.path)).values()
    )
    assert read_back(made, quantized) == {"layers_with_codes_bit_exact": layers}


@pytest.mark.parametrize("head", [False, True])
def test_int8_per_channel_and_a_quantized_head(head, run, half):
    pytest.importorskip("compressed_tensors")
    quantized = run(Rtn(bits=8, group_size=-1, head=head), half("llama"))
    made = run(Vllm(), quantized)
    assert_same_logits(made, quantized)
    read_back(made, quantized)


def test_several_kinds_of_layers_are_named_one_by_one(run, half):
    pytest.importorskip("compressed_tensors")
    first = run(Rtn(bits=4, group_size=32, targets=["*.self_attn.*"]), half())
    quantized = run(Rtn(bits=8, group_size=-1, targets=["*.down_proj"]), first)
    made = run(Vllm(), quantized)
    settings = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert (
        len(settings["config_groups"]) == 2 and "model.layers.0.mlp.up_proj" in settings["ignore"]
    )
    assert_same_logits(made, quantized)


def test_words_are_those_of_the_library(run, tiny):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    quantized = run(Rtn(bits=4, group_size=32), tiny())
    made, source = Checkpoint(run(Vllm(), quantized).path), Checkpoint(quantized.path)
    for name, form in source.forms.items():
        if form.bits is None:
            continue
        layer = model.layer(name, source.forms, source)
        signed = (layer.codes.to(torch.int16) - 8).to(torch.int8)
        assert torch.equal(made.get(f"{name}.weight_packed"), helpers.pack_to_int32(signed, 4))
        assert torch.equal(made.get(f"{name}.weight_scale"), layer.scales)
        assert made.get(f"{name}.weight_shape").tolist() == [form.rows, form.cols]


@pytest.mark.parametrize("part", ["code", "scale", "norm", "lost", "more"])
def test_reading_back_finds_a_single_wrong_value(part, run, tiny):
    quantized = run(Rtn(bits=4, group_size=32), tiny())
    made = run(Vllm(), quantized)
    file = made.path / "model.layers.1.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj"
    if part == "code":
        tensors[f"{name}.weight_packed"][3, 1] ^= 1 << 17
    elif part == "scale":
        tensors[f"{name}.weight_scale"].view(torch.int16)[5, 1] += 1
    elif part == "norm":
        tensors["model.layers.1.input_layernorm.weight"][7] += 0.01
    elif part == "more":
        tensors["model.layers.1.mlp.extra.weight"] = torch.ones(1)
    else:
        del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, file)
    if part in ("lost", "more"):
        index = json.loads((made.path / "model.safetensors.index.json").read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != file.name}
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
        (made.path / "model.safetensors.index.json").write_text(json.dumps(index))
    match = {"lost": "lacks", "more": "is no parameter"}.get(part, "is not that of")
    with pytest.raises(GateError, match=match):
        read_back(made, quantized)


@pytest.mark.parametrize("family", LINEAR)
def test_the_config_says_the_rotation_in_old_and_new_words(family, run, tiny):
    made, plain = (
        run(Vllm(dtype="bfloat16"), tiny(family)),
        AutoConfig.from_pretrained(tiny(family)),
    )
    config = AutoConfig.from_pretrained(made.path)
    assert config.rope_parameters == plain.rope_parameters
    raw = json.loads((made.path / "config.json").read_text())
    theta = plain.rope_parameters.get("full_attention", plain.rope_parameters)["rope_theta"]
    assert raw["rope_theta"] == theta and raw["rope_scaling"] is None
    assert raw["torch_dtype"] == "bfloat16" and "quantization_config" not in raw
    assert Checkpoint(made.path).get("model.norm.weight").dtype == torch.bfloat16


def test_what_vllm_cannot_load_is_refused_before_any_work(run, tiny):
    layers = model.layers(Checkpoint(tiny()))
    for stage, reason in (
        (Rtn(bits=3, group_size=32), "4 and 8 bits, not for 3"),
        (Rtn(bits=4, group_size=32, symmetric=False), "no zero points"),
        (Magnitude(pattern="2:4"), "2:4 sparse, for which vLLM has no kernels any more"),
        (Svd(rank_multiple=4), "no layers of low rank"),
        (Rtn(bits=4, group_size=32, targets=["*.q_proj"]), "as one layer"),
    ):
        with pytest.raises(ValueError, match=reason):
            Vllm().plan(stage.plan(layers))
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float32'"):
        Vllm(dtype="float32")
    with pytest.raises(InputError, match="Conv1D"):
        Vllm().inputs(Checkpoint(tiny("gpt2")))


def test_an_unstructured_mask_is_stored_as_zeros(run, tiny):
    pruned = run(Magnitude(sparsity=0.5), tiny())
    made = run(Vllm(), pruned)
    read_back(made, pruned)
    weight = Checkpoint(made.path).get("model.layers.0.mlp.up_proj.weight")
    assert 0.45 < float((weight == 0).float().mean()) < 0.55


EIGHT = [
    (number, group_size, inputs)
    for number in ("int", "fp8")
    for group_size in (PER_CHANNEL, PER_TENSOR)
    for inputs in (
        f"{'fp8' if number == 'fp8' else 'int8'}_tensor",
        "fp8_token",
        "int8_token",
        None,
    )
    if inputs is None or inputs.startswith(number)
    if (number, inputs) != ("int", None)
]


@pytest.mark.parametrize(("number", "group_size", "inputs"), EIGHT)
def test_eight_bits_with_rounded_inputs(number, group_size, inputs, run, half, eight_bits):
    """The library scales int8 tokens by 2 / 255 of their largest value, vLLM and we by 1 / 127."""
    pytest.importorskip("compressed_tensors")
    quantized = eight_bits(half("qwen2"), number=number, group_size=group_size, inputs=inputs)
    made = run(Vllm(), quantized)
    read_back(made, quantized)
    assert_same_logits(made, quantized, 0.1 if inputs == "int8_token" else 1e-3)
    stored = Checkpoint(made.path)
    name = "model.layers.0.mlp.up_proj"
    assert stored.types[f"{name}.weight"] == {"int": "I8", "fp8": "F8_E4M3"}[number]
    assert (f"{name}.input_scale" in stored.types) == (inputs is not None and "tensor" in inputs)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_cache_in_fp8(quantize, run, half):
    """The library takes the scales, but 0.17 rounds nothing with transformers 5.24, which calls the
    argument it looks for by another name."""
    pytest.importorskip("compressed_tensors")
    stage = Rtn(bits=4, group_size=32) if quantize else Magnitude(sparsity=0.1)
    source = run(stage, half("llama"))
    exact = logits(model.load(Checkpoint(source.path)))
    scales = [0.03125, 0.0625, 0.015625]
    CacheForm(number="fp8", key=scales, value=scales[::-1]).save(source.path)
    made = run(Vllm(), source)
    read_back(made, source)
    stored = Checkpoint(made.path)
    assert stored.get("model.layers.1.self_attn.k_scale").item() == 0.0625
    assert stored.get("model.layers.2.self_attn.v_scale").item() == 0.03125
    settings = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["type"] == "float"
    rounded = logits(model.load(Checkpoint(source.path)))
    if quantize:
        assert (rounded - exact).abs().max() > 1e-3 * exact.std()
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
        found = [block.self_attn.k_scale.item() for block in theirs.model.layers]
        assert found == scales
        assert (logits(theirs) - exact).abs().max() < 1e-4 * exact.std()


def test_a_cache_in_int8_is_refused(run, half):
    source = run(Rtn(bits=4, group_size=32), half())
    CacheForm(number="int8", key=[0.1] * 3, value=[0.1] * 3).save(source.path)
    with pytest.raises(InputError, match="none in int8"):
        run(Vllm(), source)


def test_eight_bit_forms_that_do_not_exist_are_refused():
    for form in (
        Form(rows=8, cols=64, bits=8, inputs="fp8_token"),
        Form(rows=8, cols=64, bits=4, inputs="int8_token"),
        Form(rows=8, cols=64, bits=8, number="fp8", group_size=32),
    ):
        with pytest.raises(ValueError, match="int8 with int8 and fp8 with fp8"):
            scheme(form)
    with pytest.raises(ValueError, match="one scale a layer"):
        scheme(Form(rows=8, cols=64, bits=8, group_size=PER_TENSOR))


def test_one_kind_is_named_by_its_class():
    form = Form(rows=8, cols=64, bits=4, group_size=32)
    settings = quantization({"a": form, "lm_head": Form(rows=8, cols=64)})
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert settings["ignore"] == ["lm_head"]
    assert quantization({"a": Form(rows=8, cols=64)}) is None
    with pytest.raises(ValueError, match="12 inputs do not fill words of 8 codes"):
        scheme(Form(rows=8, cols=12, bits=4))


def test_the_stage_is_verified_by_reading_back(run, tiny):
    from optpipe.verify import verify

    quantized = run(Rtn(bits=4, group_size=32), tiny())
    made = run(Vllm(), quantized)
    found = verify(made, Artifact(path=quantized.path, format="hf", key="k"), None)
    assert found["read_back"]["layers_with_codes_bit_exact"] == 21
