"""Canonical graphs on ONNX Runtime against transformers, for every family and form of a layer."""

import collections

import numpy as np
import onnx
import pytest
import torch
import transformers

from optpipe.artifact import Artifact
from optpipe.build.generate import Engine
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.onnx import Onnx
from optpipe.lowrank.svd import Svd
from optpipe.quant.rtn import Rtn

STANDARD = {""}
TOKENS, PREFILL = 40, 29  # beyond the sliding windows of 16


def export(folder, out, **fields):
    out.mkdir(exist_ok=True)
    Onnx(**fields).run(Artifact(path=folder, format="hf", key="k"), out, lambda *_: None)
    return Engine(out, threads=1)


def error(ours, theirs):
    return np.abs(ours - theirs).max() / theirs.std()


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(3, 288, (2, TOKENS))


def reference(folder, ids):
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return lm(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("float16", 2e-2)])
def test_prefill_chunk_and_decode_equal_one_full_run(family, tiny, tmp_path, ids, dtype, tolerance):
    engine = export(tiny(family), tmp_path / "onnx", dtype=dtype)
    full = reference(tiny(family), ids)
    assert error(engine.score(ids), full) < tolerance
    got = [engine.prefill(ids[:, :PREFILL], np.array([PREFILL, PREFILL]))[:, None]]
    got.append(engine.extend(ids[:, PREFILL : PREFILL + 3]))
    got += [engine.decode(ids[:, t])[:, None] for t in range(PREFILL + 3, TOKENS)]
    assert error(np.concatenate(got, 1), full[:, PREFILL - 1 :]) < tolerance


def test_rows_of_different_lengths(family, tiny, tmp_path, ids):
    engine = export(tiny(family), tmp_path / "onnx")
    lengths = np.array([30, 11])
    logits = [engine.prefill(np.where(np.arange(30) < lengths[:, None], ids[:, :30], 0), lengths)]
    follow = ids[:, 31:37]
    logits += [engine.decode(follow[:, t]) for t in range(6)]
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row, :length], follow[row]])[None]
        full = reference(tiny(family), alone)[0, length - 1 :]
        assert error(np.stack(logits)[:, row], full) < 2e-5


def test_only_standard_operators_and_a_static_cache(family, tiny, tmp_path):
    export(tiny(family), tmp_path / "onnx", capacity=64)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert {(o.domain, o.version) for o in graph.opset_import} == {("", 24)}
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"), full_check=True)
    counts = collections.Counter(node.op_type for node in graph.graph.node)
    assert counts["TensorScatter"] == 6
    assert all(not node.domain for node in graph.graph.node)
    for node in graph.graph.node:
        if node.op_type == "Attention":  # no causal flag, no lengths: TensorRT misreads them
            assert len(node.input) == 4
            assert {a.name: a.i for a in node.attribute}["is_causal"] == 0
    pasts = [v for v in graph.graph.input if v.name.startswith("past")]
    assert {v.type.tensor_type.shape.dim[2].dim_value for v in pasts} == {64}


@pytest.mark.parametrize("stage, bits", [
    (Rtn(bits=3, group_size=32), 4 + 16 / 32), (Svd(keep=0.5, rank_multiple=1), 8),
])  # fmt: skip
def test_bits_per_weight_are_those_of_the_graph(stage, bits, run, tiny):
    """Three bits travel in four; half of the parameters in 16 bits."""
    made = run(Onnx(dtype="float16"), run(stage, tiny()))
    head = 288 * 64  # a layer of its own that nobody touched
    layers = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    expected = (layers * bits + head * 16) / (layers + head)
    assert made.stats["bits_per_weight"] == pytest.approx(expected, rel=0.02)


def test_a_full_cache_is_an_error_and_not_garbage(tiny, tmp_path, ids):
    engine = export(tiny(), tmp_path / "onnx", capacity=32)
    engine.prefill(ids[:, :31], np.array([31, 31]))
    engine.decode(ids[:, 31])
    with pytest.raises(ValueError, match=r"33 tokens exceed the engine's capacity of 32"):
        engine.decode(ids[:, 32])


def test_capacity_beyond_the_context_is_refused(tiny):
    with pytest.raises(InputError, match=r"capacity 129 .* 128"):
        Onnx(capacity=129).inputs(Checkpoint(tiny()))


def test_a_rotary_table_that_changes_with_length_is_refused(tmp_path, ids):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}  # fmt: skip
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=288, max_position_embeddings=128, pad_token_id=0,
        rope_parameters=rope, original_max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"longrope.*at most 64, got 128"):
        Onnx().inputs(Checkpoint(tmp_path))
    engine = export(tmp_path, tmp_path / "onnx", capacity=64)
    assert error(engine.score(ids), reference(tmp_path, ids)) < 2e-5


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
])  # fmt: skip
def test_scaled_rotary_embeddings(rope, tmp_path, ids):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=288, max_position_embeddings=128, rope_parameters={"rope_theta": 1e4, **rope},
        initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    engine = export(tmp_path, tmp_path / "onnx")
    assert error(engine.score(ids), reference(tmp_path, ids)) < 2e-5


def test_partial_rotation(tmp_path, ids):
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=288, max_position_embeddings=128, pad_token_id=0,
        partial_rotary_factor=0.5, initializer_range=0.1,
    )  # fmt: skip
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    engine = export(tmp_path, tmp_path / "onnx")
    assert error(engine.score(ids), reference(tmp_path, ids)) < 2e-5


@pytest.mark.parametrize("fields", [{"dtype": "float8"}, {"capacity": 15}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=str(next(iter(fields.values())))):
        Onnx(**fields)
