"""LOWER_RIGHT against the mask of the graph, and what TensorRT is told of its attentions."""

import os

import numpy as np
import onnx
import pytest
from onnx import helper

from optpipe.build import causal, plan
from optpipe.build.generate import Engine
from optpipe.build.nvidia import Package
from optpipe.build.tensorrt import TensorRT
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.graph import MODEL, read
from optpipe.export.onnx import Onnx

CAPACITY = 48
# plain, normed heads, packed q k v, learned positions, windows in two layers of three
FAMILIES = {"llama": 3, "qwen3": 3, "phi3": 3, "gpt2": 3, "gemma3_text": 1}


@pytest.fixture
def graph(run, tiny):
    return lambda family, dtype="float32": run(Onnx(dtype=dtype, capacity=CAPACITY), tiny(family))


def spell_out(model):
    """Give every Attention without a mask the one that TensorRT documents for LOWER_RIGHT.

    "Diagonal anchored at bottom-right corner (j <= i + (s_kv - s_q))", with s_kv the length of
    the row and s_q the queries of this call.
    """
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["s_q"], start=1, end=2),
        helper.make_node("Squeeze", ["s_q"], ["s_q/scalar"]),
        helper.make_node("Range", ["zero", "s_q/scalar", "one"], ["i"]),
        helper.make_node("Cast", [causal.LENGTHS], ["s_kv"], to=onnx.TensorProto.INT64),
        helper.make_node("Sub", ["s_kv", "s_q"], ["behind"]),
        helper.make_node("Unsqueeze", ["behind", "one_axis"], ["behind/column"]),
        helper.make_node("Add", ["behind/column", "i"], ["last"]),
        helper.make_node("Unsqueeze", ["last", "mask_axes"], ["last/column"]),
        helper.make_node("LessOrEqual", ["slots", "last/column"], ["lower_right"]),
    ]
    for name, value in (("zero", 0), ("one", 1), ("one_axis", [1])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    before = [*model.graph.node]
    at = next(i for i, node in enumerate(before) if node.op_type == "Attention")
    lengths, others = before[-3:], before[:-3]
    for node in others:
        if node.op_type == "Attention" and len(node.input) == 3:
            node.input.append("lower_right")
    del model.graph.node[:]
    model.graph.node.extend([*others[:at], *lengths, *nodes, *others[at:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_attends_to_what_the_mask_allows(family, graph, tmp_path):
    """Prefill of rows of different lengths, a chunk, tokens one by one until the cache is full."""
    source = graph(family).path
    model = read(source)
    causal.unmask(model)
    assert (
        sum(n.op_type == "Attention" and len(n.input) == 3 for n in model.graph.node)
        == (FAMILIES[family])
    )
    spell_out(model)
    for file in source.iterdir():
        if file.name != MODEL:
            os.link(file, tmp_path / file.name)
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    masked, ours = Engine(source, 1), Engine(tmp_path, 1)
    ids, lengths = np.random.default_rng(0).integers(3, 288, (3, CAPACITY)), np.array([9, 4, 1])
    calls = [lambda b: b.prefill(ids[:, :9], lengths), lambda b: b.extend(ids[:, 9:20])]
    calls += [lambda b, t=t: b.decode(ids[:, t]) for t in range(20, CAPACITY)]
    for call in calls:
        np.testing.assert_array_equal(call(ours), call(masked))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", causal.KINDS)
def test_what_tensorrt_is_told(kind, family, graph):
    """All attentions may be taken apart; those without a window lose their mask."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = plan.listener(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    plan.parse(parser, graph(family).path, kind)
    changed = causal.settle(trt, network, parser)
    assert changed == (FAMILIES[family] if kind == "lower_right" else 0)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = trt.LayerType
    found = [causal._attention(trt, la) for la in layers if la.type == kinds.ATTENTION_INPUT]
    assert len(found) == 3 and all(attention.decomposable for attention in found)
    own = [a for a in found if a.causal_kind == trt.CausalMaskKind.LOWER_RIGHT]
    assert len(own) == changed
    for attention in found:
        assert (attention.mask is None) == (attention in own)
        assert (attention.key_value_lengths is not None) == (attention in own)


@pytest.mark.parametrize("family, message", [
    ("gemma2", "scores of 'gemma2' are soft-capped.*use attention=mask"),
    ("mistral", "every layer looks at a window"),
])  # fmt: skip
def test_models_that_need_their_masks_are_refused(family, message, tiny):
    with pytest.raises(InputError, match=message):
        TensorRT(attention="lower_right").inputs(Checkpoint(tiny(family)))


def test_old_bindings_are_refused():
    old = Package(name="tensorrt", version="10.16.1.11", gpu="sm90")
    assert "10.16.1.11 has no attention 'lower_right', 11.0 or newer" in old.refuse_attention(
        "lower_right"
    )
    assert old.refuse_attention("mask") is None
