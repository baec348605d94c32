"""GGUF files, read back by the gguf package, and by transformers with names of its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import optpipe
from optpipe import model
from optpipe.artifact import Artifact
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError, InputError
from optpipe.export import llamacpp
from optpipe.export.gguf import FILE, Gguf, encode
from optpipe.export.readback import read_back
from optpipe.kvcache import CacheForm
from optpipe.linear import Form, Quantized
from optpipe.lowrank.svd import Svd
from optpipe.quant.rtn import Rtn

gguf = pytest.importorskip("gguf")
DEMO = Path(optpipe.__file__).parent / "demo"
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2"]
IDS = torch.arange(3, 15)[None]  # inside the window of Gemma-2


def plain(folder):
    return Artifact(path=folder, format="hf", key="k")


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_blocks_are_what_the_package_decodes(bits, kind):
    torch.manual_seed(0)
    form = Form(rows=6, cols=128, bits=bits, group_size=64)
    layer = Quantized(form, torch.randint(2**bits, (6, 128)), torch.rand(6, 2) * 0.01)
    found = gguf.quants.dequantize(encode(layer), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found, layer.dequantize().numpy())
    assert encode(layer).shape[1] == 4 * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_come_back_bit_by_bit(family, run, half):
    for bits, group in ((4, 32), (8, -1)):
        source = run(Rtn(bits=bits, group_size=group), half(family))
        made = run(Gguf(), source)
        layers = sum(f.bits is not None for f in Checkpoint(source.path).forms.values())
        assert read_back(made, source) == {"layers_with_codes_bit_exact": layers}
        reader = gguf.GGUFReader(made.path / FILE)
        kinds = {t.tensor_type.name for t in reader.tensors}
        assert kinds == {f"Q{bits}_0", "F16", "F32"}
        told = reader.fields["general.file_type"].parts[-1][0]
        assert told == gguf.LlamaFileType[f"MOSTLY_Q{bits}_0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_the_file(family, run, half):
    """It knows the names, the order of rows and the offsets of norms by itself.

    Of these families it reads head sizes, soft caps or the context from no GGUF file.
    """
    pytest.importorskip("accelerate")  # transformers wants it for such files
    source = run(Rtn(bits=4, group_size=32), half(family))
    made = run(Gguf(), source)
    alone = made.path / "alone"
    alone.mkdir()
    shutil.copy(made.path / FILE, alone)
    told = {} if family in ("llama", "qwen2") else {"config": AutoConfig.from_pretrained(made.path)}
    theirs = AutoModelForCausalLM.from_pretrained(
        alone, gguf_file=FILE, dtype=torch.float32, **told
    )
    with torch.inference_mode():
        ours = model.load(Checkpoint(source.path))(IDS).logits
        found = theirs.eval()(IDS).logits
    assert (found - ours).abs().max() < 1e-3 * ours.std()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_quantization_all_matrices_are_floats(dtype, run, half):
    made = run(Gguf(dtype=dtype), half())
    assert read_back(made, plain(half())) == {"layers_with_codes_bit_exact": 0}
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(made.path / FILE).tensors}
    assert kinds == {"F16" if dtype == "float16" else "BF16", "F32"}


def test_rows_of_llama_are_interleaved_as_llama_cpp_rotates_them(half):
    """Its converter: reshape(heads, 2, dim / 2, ...).swapaxes(1, 2)."""
    decoder = Checkpoint(half("llama")).decoder
    weight = torch.randn(decoder.kv_heads * decoder.head_dim, 5)
    order = llamacpp.row_order(decoder, decoder.blocks[1].qkv[1])
    shape = (decoder.kv_heads, 2, decoder.head_dim // 2, 5)
    wanted = weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(weight[order], wanted)
    assert llamacpp.row_order(decoder, decoder.blocks[1].qkv[2]) is None


def test_the_tokenizer_of_the_demo_model_goes_along(run, tmp_path):
    made = run(Gguf(), DEMO)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(made.path / FILE, alone)
    theirs, ours = (
        AutoTokenizer.from_pretrained(alone, gguf_file=FILE),
        AutoTokenizer.from_pretrained(DEMO),
    )
    text = "def main():\n    return [x * 10 for x in range(3)]  # \u00e9\u00df\n"
    assert theirs(text, add_special_tokens=False).input_ids == ours(text).input_ids
    fields = gguf.GGUFReader(made.path / FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 4096
    assert fields["tokenizer.ggml.token_type"].contents()[0] == llamacpp.CONTROL


def test_the_factors_of_llama_3_are_those_of_its_formula(tmp_path, run):
    """Frequencies longer than the old context are divided by the factor, short ones are kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "m")
    made = run(Gguf(), tmp_path / "m")
    tensors = {t.name: t.data for t in gguf.GGUFReader(made.path / FILE).tensors}
    waves = 2 * np.pi * 5e5 ** (np.arange(0, 32, 2) / 32)
    smooth = np.clip((64 / waves - 1) / (4 - 1), 0, 1)
    wanted = 1 / ((1 - smooth) / 8 + smooth)
    np.testing.assert_allclose(tensors["rope_freqs.weight"], wanted, rtol=1e-4)
    read_back(made, plain(tmp_path / "m"))


def test_a_wrong_code_is_found(run, half):
    source = run(Rtn(bits=4, group_size=32), half())
    made = run(Gguf(), source)
    reader = gguf.GGUFReader(made.path / FILE, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.attn_q.weight")
    tensor.data[3, 7] ^= 0x10
    reader.data.flush()
    with pytest.raises(GateError, match="q_proj"):
        read_back(made, source)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (dict(bits=3, group_size=32), "'a' is 3-bit int"),
        (dict(bits=4, group_size=32, symmetric=False), "symmetric=False"),
        (dict(bits=8, number="fp8"), "8-bit fp8"),
        (dict(bits=8, inputs="int8_token"), "its own way"),
        (dict(bits=4, group_size=16), "take a multiple of 32"),
        (dict(bits=8, group_size=0), "group_size=0"),
    ],
)
def test_what_blocks_cannot_hold_is_refused(form, reason):
    with pytest.raises(ValueError, match=reason):
        Gguf().plan({"a": Form(rows=8, cols=64, **form)})


def test_factors_and_models_that_llama_cpp_computes_otherwise_are_refused(tiny, monkeypatch):
    layers = model.layers(Checkpoint(tiny()))
    with pytest.raises(ValueError, match="no layers of low rank"):
        Gguf().plan(Svd(rank_multiple=4).plan(layers))
    for family, reason in (
        ("phi3", "knows no family 'phi3'"),
        ("mistral", "no window; this model sees 16"),
    ):
        with pytest.raises(InputError, match=reason):
            Gguf().inputs(Checkpoint(tiny(family)))
    scaled = Checkpoint(tiny("gemma2"))
    scaled.config.query_pre_attn_scalar = 100
    with pytest.raises(InputError, match="scales attention by head_dim"):
        Gguf().inputs(scaled)
    yarn = Checkpoint(tiny("qwen2"))
    yarn.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="rope type 'yarn'"):
        Gguf().inputs(yarn)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        ({"type": "ByteLevel", "use_regex": False}, None),
        ({"type": "Metaspace"}, None),
        (None, None),
        *(
            (
                {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": regex}},
                        {"type": "ByteLevel", "use_regex": False},
                    ],
                },
                found,
            )
            for regex, found in [*llamacpp.PRE_TOKENIZERS.items(), ("x", None)]
        ),
    ],
)
def test_how_text_is_split_has_a_name_or_is_refused(pre_tokenizer, name):
    assert llamacpp._pre_tokenizer({"pre_tokenizer": pre_tokenizer}) == name


def test_a_rounded_cache_is_refused(run, half):
    source = run(Rtn(bits=8, group_size=-1), half())
    CacheForm(number="fp8", key=[1.0] * 3, value=[1.0] * 3).save(source.path)
    with pytest.raises(InputError, match="takes the type of its KV cache"):
        run(Gguf(), source)
