"""Unified checkpoints, against those of nvidia-modelopt for the same weights and scales."""

import json
import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from optpipe import __version__, model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export.readback import read_back
from optpipe.export.trtllm import Trtllm, algorithm
from optpipe.kvcache import CacheForm
from optpipe.linear import PER_CHANNEL, PER_TENSOR, Form
from optpipe.quant.rtn import Rtn
from optpipe.quant.w4a8 import W4a8

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "modelopt_reference.json").read_text())
spec = spec_from_file_location("modelopt_reference", HERE / "modelopt_reference.py")
reference = module_from_spec(spec)
spec.loader.exec_module(reference)


class Known(W4a8):
    """With the scale of inputs that the record was made with."""

    def scale(self, largest):
        return torch.tensor(reference.INPUT_SCALE).half()


@pytest.fixture
def quantized(run, eight_bits, tmp_path):
    """quantized(case) -> our artifact of a model on a known grid."""

    def make(case):
        family, kind = case.split("_")
        folder = tmp_path / "plain"
        reference.make(family, kind).save_pretrained(folder)
        if kind == "fp8":
            return eight_bits(folder, number="fp8", group_size=PER_TENSOR, inputs="fp8_tensor")
        if kind == "w4a8":
            stage = Known(
                group_size=reference.GROUP[kind], method="rtn", clip="minmax", calib=run.calib
            )
            return run(stage, folder)
        bits, group = {"int4": (4, reference.GROUP["int4"]), "int8": (8, PER_CHANNEL)}[kind]
        return run(Rtn(bits=bits, group_size=group), folder)

    return make


def mine(case, kind="unified"):
    """A record of modelopt with our name in it."""
    found = json.loads(json.dumps(RECORDED[case][kind]))
    for part in (found["quantization_config"], found["hf_quant_config"]):
        part["producer"] = {"name": "optpipe", "version": __version__}
    return found


@pytest.mark.parametrize(
    "case",
    ["llama_int4", "llama_int8", "llama_fp8", "llama_w4a8", "qwen2_int4", "qwen3_int8"],
)
def test_keys_types_shapes_and_bytes_are_those_of_modelopt(case, run, quantized):
    source = quantized(case)
    made, wanted = run(Trtllm(), source), mine(case)
    tensors = {k: v for file in reference.described(made.path).values() for k, v in file.items()}
    ones = {name: tensors.pop(name) for name in [*tensors] if name.endswith("pre_quant_scale")}
    assert tensors == wanted["tensors"]["model.safetensors"]
    # its loader fails without these, and modelopt writes them only after a search for scales
    layers = ("self_attn.o_proj", "mlp.down_proj") if "4" in case else ()
    assert ones.keys() == {
        f"model.layers.{n}.{layer}.pre_quant_scale" for n in (0, 1) for layer in layers
    }
    config = json.loads((made.path / "config.json").read_text())
    assert config["quantization_config"] == wanted["quantization_config"]
    assert json.loads((made.path / "hf_quant_config.json").read_text()) == wanted["hf_quant_config"]
    assert read_back(made, source)["layers_with_codes_bit_exact"] == 14


def fp8_cache(source, number="fp8"):
    scales = [reference.KV_SCALE] * len(Checkpoint(source.path).decoder.blocks)
    CacheForm(number=number, key=scales, value=scales).save(source.path)


def test_scales_of_the_cache_are_where_modelopt_puts_them(run, quantized):
    source = quantized("llama_fp8")
    fp8_cache(source)
    made, wanted = run(Trtllm(), source), mine("llama_fp8", "unified_kv")
    tensors = {k: v for file in reference.described(made.path).values() for k, v in file.items()}
    assert tensors == wanted["tensors"]["model.safetensors"]
    config = json.loads((made.path / "config.json").read_text())
    assert config["quantization_config"] == wanted["quantization_config"]
    assert json.loads((made.path / "hf_quant_config.json").read_text()) == wanted["hf_quant_config"]
    read_back(made, source)
    scales = [reference.KV_SCALE / 2] * 2
    CacheForm(number="fp8", key=scales, value=scales).save(source.path)
    with pytest.raises(GateError, match=r"k_scale' is 0.03125, the cache .* 0.015625"):
        read_back(made, source)


def test_a_cache_in_int8_is_refused(run, quantized):
    source = quantized("llama_int8")
    fp8_cache(source, "int8")
    with pytest.raises(InputError, match=r"cache in fp8, none in int8; set cache.number=fp8"):
        run(Trtllm(), source)


def test_the_record_is_what_the_installed_modelopt_writes():
    """Takes a minute; set OPTPIPE_MODELOPT=1, after an update of nvidia-modelopt for instance."""
    if os.environ.get("OPTPIPE_MODELOPT") != "1":
        pytest.skip("slow: the import of modelopt alone takes half a minute")
    assert json.loads(json.dumps(reference.export("llama", "int8"))) == RECORDED["llama_int8"]


def test_without_quantization_it_is_a_plain_folder(run, half):
    made = run(Trtllm(dtype="bfloat16"), half())
    assert made.stats == {"dtype": "bfloat16", "quant_algo": None, "kv_cache_quant_algo": None}
    assert not (made.path / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())
    assert read_back(made, type(made)(path=half(), format="hf", key="k")) == {
        "layers_with_codes_bit_exact": 0
    }


def test_per_channel_per_token_fp8(run, half, eight_bits):
    source = eight_bits(half("qwen3"), number="fp8", group_size=PER_CHANNEL, inputs="fp8_token")
    made = run(Trtllm(), source)
    read_back(made, source)
    stored = Checkpoint(made.path)
    name = "model.layers.0.mlp.up_proj"
    assert stored.get(f"{name}.weight_scale").shape == (96,)
    assert stored.get(f"{name}.input_scale") is None
    config = json.loads((made.path / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"


def test_a_rotation_by_another_base_is_said_in_the_words_of_transformers_4(run, tmp_path):
    folder = tmp_path / "plain"
    reference.make("llama", "none").save_pretrained(folder)
    made = run(Trtllm(), folder)
    raw = json.loads((made.path / "config.json").read_text())
    assert raw["rope_theta"] == 5e5
    own = {k: v for k, v in reference.LLAMA3.items() if k != "rope_theta"}
    assert raw["rope_scaling"] == own
    assert AutoConfig.from_pretrained(made.path).rope_parameters == reference.LLAMA3


def test_commands_say_where_the_model_is_and_run_what_they_say(run, half):
    made = run(Trtllm(), half())
    lines = [json.loads(line) for line in (made.path / "bench.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and {len(line["input_ids"]) for line in lines} == {64}
    assert all(0 <= token < 288 for line in lines for token in line["input_ids"])
    assert {line["output_tokens"] for line in lines} == {64}  # 128 tokens of context in all
    for name, command in (("serve.sh", "trtllm-serve"), ("bench.sh", "trtllm-bench")):
        text = (made.path / name).read_text()
        assert f"exec {command} " in text and ("max_seq_len 129" in text) == (name == "serve.sh")
        assert os.access(made.path / name, os.X_OK)
    assert "32 requests of 64 tokens in and 64 out" in text


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (dict(bits=8, inputs="int8_token"), "multiplies no int8 activations"),
        (dict(bits=4, group_size=32, inputs="fp8_token"), "by one scale .* got fp8_token"),
        (dict(bits=8, inputs="fp8_tensor"), "got 8-bit int, .* inputs=fp8_tensor"),
        (dict(bits=8, number="fp8", group_size=PER_TENSOR), "got 8-bit fp8, group_size=0"),
        (dict(bits=3, group_size=32), "got 3-bit int"),
        (dict(bits=4, group_size=32, symmetric=False), "symmetric=False"),
        (dict(bits=4, group_size=PER_CHANNEL), "group_size=-1"),
    ],
)
def test_what_it_cannot_load_is_refused_with_what_it_can(form, reason):
    with pytest.raises(ValueError, match=reason):
        Trtllm().plan({"a": Form(rows=8, cols=64, **form)})


def test_two_formats_in_one_checkpoint_are_refused():
    layers = {
        "a": Form(rows=8, cols=64, bits=4, group_size=32),
        "b": Form(rows=8, cols=64, bits=8),
    }
    with pytest.raises(ValueError, match=r"'b' is .*W8A16.*, others .*W4A16_AWQ"):
        Trtllm().plan(layers)
    assert algorithm(layers["b"]) == {"quant_algo": "W8A16"}


def test_a_family_without_a_loader_is_refused(tiny):
    with pytest.raises(InputError, match="no family 'gpt2'"):
        Trtllm().inputs(Checkpoint(tiny("gpt2")))


def test_a_wrong_nibble_is_found(run, half):
    source = run(Rtn(bits=4, group_size=32), half())
    made = run(Trtllm(), source)
    file = made.path / "model.layers.2.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] ^= 0x40
    save_file(tensors, file)
    with pytest.raises(GateError, match="down_proj"):
        read_back(made, source)
    assert torch.equal(
        model.layer("lm_head", {}, Checkpoint(half())).weight.half(),
        Checkpoint(made.path).get("lm_head.weight"),
    )


def test_what_tensorrt_llm_cannot_load_is_refused_before_any_work():
    int4 = Form(rows=64, cols=128, bits=4, group_size=128)
    with pytest.raises(ValueError, match=r"no quantized 'lm_head'.*head=false"):
        Trtllm().plan({"lm_head": int4})
    with pytest.raises(ValueError, match="splits no fused qkv_proj of W4A16_AWQ"):
        Trtllm().plan({"model.layers.0.self_attn.qkv_proj": int4})
