"""The ONNX Runtime form against torch, operator by operator and end to end."""

import collections

import numpy as np
import onnx
import pytest
import torch

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.build.generate import EXACT_INTEGERS, Engine
from optpipe.build.lower import Lowering
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx

GRIDS = [
    (4, 32, True), (4, 32, False), (4, -1, True), (4, -1, False), (3, 32, True), (3, -1, False),
    (2, 32, False), (8, -1, True), (8, -1, False), (8, 32, True), (8, 32, False),
]  # fmt: skip
EXACT, ROUNDING, INT8_ACTIVATIONS = 2e-5, 5e-2, 0.2


def build(folder, tmp_path, accuracy_level=1):
    canonical, fused = tmp_path / "canonical", tmp_path / "fused"
    canonical.mkdir()
    fused.mkdir()
    Onnx().run(Artifact(path=folder, format="hf", key="k"), canonical, lambda *_: None)
    Lowering(canonical, fused, accuracy_level).run()
    return canonical, fused


def operators(folder):
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


def worst(engine, folder):
    return errors(engine, folder).max()


def errors(engine, folder):
    """Largest error of prefill, chunk and decode against the torch model, in spreads."""
    ids = np.random.default_rng(1).integers(3, 288, (2, 40))
    with torch.inference_mode():
        full = model.load(Checkpoint(folder))(torch.from_numpy(ids)).logits.numpy()
    logits = [
        engine.prefill(ids[:, :29], np.array([29, 29]))[:, None],
        engine.extend(ids[:, 29:33]),
    ]
    logits += [engine.decode(ids[:, t])[:, None] for t in range(33, 40)]
    return np.abs(np.concatenate(logits, 1) - full[:, 28:]) / full.std()


def test_every_family_computes_the_same_in_the_fast_operators(family, tiny, tmp_path):
    _, fused = build(tiny(family), tmp_path)
    counts = operators(fused)
    assert counts["GroupQueryAttention"] == 3
    left = {
        "Attention",
        "TensorScatter",
        "RotaryEmbedding",
        "RMSNormalization",
        "LessOrEqual",
        "Softmax",
    }
    assert not left & counts.keys()
    assert worst(Engine(fused, threads=1), tiny(family)) < EXACT


@pytest.mark.parametrize("bits, group_size, symmetric", GRIDS)
def test_codes_scales_and_zeros_arrive_as_they_are(
    bits, group_size, symmetric, tiny, compressed, tmp_path
):
    folder = compressed(tiny("llama"), bits, group_size, symmetric)
    canonical, fused = build(folder, tmp_path)
    counts = operators(fused)
    # q, k and v as one; the MLP output as two factors; the head
    assert counts["MatMulNBits"] == 3 * (1 + 1 + 2 + 2) + 1
    assert "MatMul" not in counts and "DequantizeLinear" not in counts
    assert worst(Engine(canonical, threads=1), folder) < EXACT
    assert worst(Engine(fused, threads=1), folder) < EXACT


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3_text", "gpt2"])
def test_quantized_layers_with_biases_norms_and_fused_projections(
    family, tiny, compressed, tmp_path
):
    folder = compressed(tiny(family), 4, 32, False)
    _, fused = build(folder, tmp_path)
    assert worst(Engine(fused, threads=1), folder) < EXACT


def test_int8_activations_stay_near(tiny, compressed, tmp_path):
    folder = compressed(tiny("llama"), 4, 32, True)
    _, fused = build(folder, tmp_path, accuracy_level=4)
    assert EXACT < worst(Engine(fused, threads=1), folder) < INT8_ACTIVATIONS


def test_weights_are_stored_once_and_only_if_used(tiny, compressed, tmp_path):
    canonical, fused = build(compressed(tiny("llama"), 4, 32, True), tmp_path)
    graph = onnx.load(fused / "model.onnx", load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    assert {weight.name for weight in graph.initializer} <= used
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (canonical, fused)]
    assert sizes[1] < 1.1 * sizes[0] + 1e5


ROUNDED = [
    ("int", -1, "int8_tensor"), ("int", -1, "int8_token"), ("int", 16, "int8_tensor"),
    ("fp8", -1, "fp8_tensor"), ("fp8", 0, "fp8_tensor"), ("fp8", -1, "fp8_token"),
    ("fp8", 16, None), ("fp8", 0, None),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("form", ROUNDED)
def test_rounded_inputs_and_fp8_are_what_torch_computes(form, family, tiny, compressed, tmp_path):
    """At the typical position; an input that one side rounds up and the other down, because they
    add in another order, moves all that follows it.
    """
    number, group_size, inputs = form
    folder = compressed(tiny(family), 8, group_size, True, number, inputs)
    canonical, fused = build(folder, tmp_path)
    for found in (canonical, fused):
        found = errors(Engine(found, threads=1), folder)
        assert np.median(found) < EXACT and found.mean() < ROUNDING
        assert inputs is not None or found.max() < EXACT
    counts = operators(fused)
    integers = number == "int" and group_size == -1
    layers = {"llama": 19, "qwen3": 25, "gpt2": 16}[family]  # q, k and v are one in Llama
    assert counts["MatMulIntegerToFloat"] == (layers if integers else 0)
    assert counts["DequantizeLinear"] == 0 or not integers


def test_rounding_changes_what_the_engine_computes(tiny, compressed, tmp_path):
    """So that the test above cannot pass by leaving it out."""
    rounded = compressed(tiny("llama"), 8, -1, True, "int", "int8_tensor")
    engine = Engine(build(rounded, tmp_path)[1], threads=1)
    forms = rounded / "forms.json"
    forms.write_text(forms.read_text().replace('"int8_tensor"', "null"))
    assert np.median(errors(engine, rounded)) > 100 * EXACT


@pytest.mark.parametrize("vnni", [True, False])
def test_integers_do_not_saturate_whatever_the_cpu(vnni, tiny, compressed, tmp_path, monkeypatch):
    folder = compressed(tiny("llama"), 8, -1, True, "int", "int8_tensor")
    monkeypatch.setattr("optpipe.build.generate.has_vnni", lambda: vnni)
    engine = Engine(build(folder, tmp_path)[1], threads=1)
    options = engine.session.get_session_options()
    if vnni:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry(EXACT_INTEGERS)
    else:
        assert options.get_session_config_entry(EXACT_INTEGERS) == "1"
    assert np.median(errors(engine, folder)) < EXACT
