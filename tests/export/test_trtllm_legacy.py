"""Legacy checkpoints, against those of nvidia-modelopt for the same weights and scales."""

import json
import os
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from optpipe.artifact import Artifact
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export.ranks import shares
from optpipe.export.readback import read_back
from optpipe.export.trtllm_legacy import TrtllmLegacy
from optpipe.kvcache import CacheForm
from optpipe.linear import PER_CHANNEL, PER_TENSOR, Form
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.fp8 import Fp8
from optpipe.quant.rtn import Rtn
from optpipe.structure.width import Width

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "modelopt_reference.json").read_text())
spec = spec_from_file_location("modelopt_reference", HERE / "modelopt_reference.py")
reference = module_from_spec(spec)
spec.loader.exec_module(reference)

CASES = ["llama_none", "llama_int4", "llama_int8", "llama_fp8", "qwen2_int4", "qwen3_int8"]
THEIRS = (
    "bias",
    "decoder",
    "lm_head_bias",
    "producer",
    "rank",
    "residual_mlp",
    "rmsnorm",
    "rotary_pct",
)
"""What modelopt writes for itself: 'Model Optimizer customized fields' in its code."""


@pytest.fixture
def quantized(run, eight_bits, tmp_path):
    """quantized(case) -> our artifact of a model on a known grid."""

    def make(case):
        family, kind = case.split("_")
        folder = tmp_path / "plain"
        reference.make(family, kind).save_pretrained(folder)
        if kind == "none":
            return Artifact(path=folder, format="hf", key="k")
        if kind == "fp8":
            return eight_bits(folder, number="fp8", group_size=PER_TENSOR, inputs="fp8_tensor")
        bits, group = {"int4": (4, reference.GROUP["int4"]), "int8": (8, PER_CHANNEL)}[kind]
        return run(Rtn(bits=bits, group_size=group), folder)

    return make


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_keys_types_shapes_and_bytes_are_those_of_modelopt(case, ranks, run, quantized):
    source = quantized(case)
    made = run(TrtllmLegacy(tensor_parallel=ranks), source)
    wanted = RECORDED[case][f"legacy_tp{ranks}"]
    files, ones = reference.described(made.path), set()
    for tensors in files.values():
        ones |= {tensors.pop(name).split()[0] for name in [*tensors] if "prequant" in name}
    for tensors in wanted["tensors"].values():  # an 8-bit cache, which is not ours
        for name in [*tensors]:
            if "cache_scaling_factor" in name:
                del tensors[name]
    assert files == wanted["tensors"]
    assert ones == ({"float16"} if "int4" in case else set())
    read_back(made, source)


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_that_of_modelopt_and_says_how_to_rotate(case, run, quantized):
    made, wanted = run(TrtllmLegacy(), quantized(case)), RECORDED[case]["legacy_tp1"]["config"]
    config = json.loads((made.path / "config.json").read_text())
    wanted["quantization"]["kv_cache_quant_algo"] = None
    for key in wanted.keys() - set(THEIRS):
        assert config[key] == wanted[key], key
    # modelopt 0.47 looks for both where transformers 4 had them
    assert "rotary_base" not in wanted and "rotary_scaling" not in wanted
    if case.startswith("llama"):
        assert config["rotary_base"] == 5e5
        scaling = {**reference.LLAMA3, "type": "llama3"}
        del scaling["rope_theta"]
        assert config["rotary_scaling"] == scaling
    else:
        assert config["rotary_base"] == 1e6 and "rotary_scaling" not in config
        assert config["qwen_type"] == case.split("_")[0]
        assert config["attn_bias"] == case.startswith("qwen2")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ranks_together_are_the_model(family, ranks, run, half):
    """With four ranks and two heads of keys, neighbours hold the same head."""
    source = run(Rtn(bits=8, group_size=-1), half(family))
    made = run(TrtllmLegacy(tensor_parallel=ranks), source)
    assert read_back(made, source) == {"layers_with_codes_bit_exact": 21}
    decoder = Checkpoint(half(family)).decoder
    keys = decoder.blocks[0].qkv[1]
    starts = [shares(decoder, keys, rank, ranks)[0].start for rank in range(ranks)]
    width = decoder.head_dim
    assert starts == {1: [0], 2: [0, width], 4: [0, 0, width, width]}[ranks]


def test_a_wrong_value_of_one_rank_is_found(run, half):
    source = run(Rtn(bits=8, group_size=-1), half())
    made = run(TrtllmLegacy(tensor_parallel=2), source)
    file = made.path / "rank1.safetensors"
    tensors = load_file(file)
    tensors["transformer.layers.1.mlp.proj.weight"][3, 5] += 1
    save_file(tensors, file)
    with pytest.raises(GateError, match=r"layers\.1\.mlp\.down_proj"):
        read_back(made, source)


def test_layers_with_one_scale_have_one_in_common(run, half):
    source = run(Fp8(calib=run.calib), half())
    made = run(TrtllmLegacy(tensor_parallel=2), source)
    assert read_back(made, source) == {"layers_with_codes_bit_exact": 21}


def test_what_cannot_be_split_is_refused(tiny):
    layers = {"x.o_proj": Form(rows=8, cols=128, bits=4, group_size=64)}
    assert TrtllmLegacy(tensor_parallel=2).plan(layers) == layers
    with pytest.raises(ValueError, match=r"4 ranks get 32 inputs of 'x.o_proj'"):
        TrtllmLegacy(tensor_parallel=4).plan(layers)
    with pytest.raises(ValueError, match=r"must be one of .* got 3"):
        TrtllmLegacy(tensor_parallel=3)
    with pytest.raises(ValueError, match="fp8 by layer"):
        form = Form(rows=8, cols=64, bits=8, number="fp8", inputs="fp8_token")
        TrtllmLegacy().plan({"a": form})
    for family, reason in (("gemma2", "'gemma2' is not one of"), ("mistral", "sliding window")):
        with pytest.raises(InputError, match=reason):
            TrtllmLegacy().inputs(Checkpoint(tiny(family)))
    with pytest.raises(InputError, match="heads 4 cannot be split among 8"):
        TrtllmLegacy(tensor_parallel=8).inputs(Checkpoint(tiny()))
    odd = Checkpoint(tiny())
    odd.decoder = replace(odd.decoder, vocab=289)
    with pytest.raises(InputError, match="vocab 289"):
        TrtllmLegacy(tensor_parallel=2).inputs(odd)


def test_biases_are_named_in_the_config(run, half):
    """TensorRT-LLM drops those that no setting names."""

    def settings(artifact):
        return json.loads((artifact.path / "config.json").read_text())

    few = Calib(source="random", samples=8, tokens=64)
    cut = Width(mlp=0.34, heads=0.0, multiple=32, compensation="bias", calib=few)
    assert settings(run(TrtllmLegacy(), run(cut, half())))["mlp_bias"] is True
    assert "mlp_bias" not in settings(run(TrtllmLegacy(), half()))


def test_two_four_sparsity_is_built_for(run, half):
    made = run(TrtllmLegacy(), run(Magnitude(pattern="2:4"), half()))
    text = (made.path / "build.sh").read_text()
    assert "--weight_sparsity" in text and os.access(made.path / "build.sh", os.X_OK)
    assert "--weight_sparsity" not in (run(TrtllmLegacy(), half()).path / "build.sh").read_text()


def test_a_rounded_cache_is_refused(run, half):
    source = run(Rtn(bits=8, group_size=-1), half())
    CacheForm(number="fp8", key=[1.0] * 3, value=[1.0] * 3).save(source.path)
    with pytest.raises(InputError, match="no scales of a KV cache"):
        run(TrtllmLegacy(), source)
