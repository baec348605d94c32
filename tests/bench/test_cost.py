"""Bytes and FLOPs against counts by hand and against torch's own counter (T8c)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from optpipe.artifact import Artifact
from optpipe.bench.bottlenecks.cost import Model, Product, causal_pairs, cell_costs
from optpipe.bench.bottlenecks.executed import costs, graph_model, torch_model
from optpipe.bench.scenario import Cell
from optpipe.bench.torch import Torch
from optpipe.build.ort import Ort
from optpipe.cache.static import KvCache
from optpipe.export.onnx import Onnx
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.fp8 import Fp8
from optpipe.quant.int8 import Int8
from optpipe.quant.mxfp8 import Mxfp8
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.quant.rtn import Rtn

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The attention kernel of CPUs, which torch does not count by itself."""

# the tiny Llama of tests/conftest.py: 3 blocks, hidden 64, MLP 96, 4 heads of 16, 2 KV heads
HIDDEN, MLP, VOCAB, LAYERS, KV = 64, 96, 288, 3, 2 * 16
BLOCK = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
WEIGHTS = sum(rows * cols for rows, cols in BLOCK) * LAYERS
NORMS = (2 * LAYERS + 1) * HIDDEN
KAPPA = 2 * LAYERS * KV * 4
"""Bytes of one token in the cache, float32."""


def plain(folder):
    return Artifact(path=folder, format="hf", key="k")


def counted(backend, step):
    """FLOPs of linear layers, and of attention, by torch's counter."""
    shapes = {FLASH: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=shapes) as counter:
        step(backend)
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "attention" in str(op) or "bmm" in str(op))
    return sum(found.values()) - attention, attention


@pytest.mark.parametrize(("rows", "tokens"), [(1, 12), (2, 40)])
def test_flops_are_those_that_torch_counts(tiny, family, rows, tokens):
    """Within 1 %; of a prompt torch counts both halves of the square, of which one is masked."""
    model = torch_model(plain(tiny(family)), "float32")
    ids_BS = np.random.default_rng(0).integers(0, VOCAB, (rows, tokens))
    backend = Torch(plain(tiny(family)), 1, "float32")
    linear, attention = counted(backend, lambda b: b.prefill(ids_BS, np.full(rows, tokens)))
    step = model.step(rows, tokens, 0)
    head = 2 * rows * VOCAB * HIDDEN  # a product of one row may be counted as bmm, with attention
    square = 4 * rows * model.heads * model.head_dim * tokens**2 * LAYERS
    expected = step.all_flops - step.attention_flops + square
    assert linear + attention == pytest.approx(expected, rel=0.01)
    assert attention in (pytest.approx(square), pytest.approx(square + head))
    linear, attention = counted(backend, lambda b: b.decode(ids_BS[:, 0]))
    step = model.step(rows, 1, tokens)
    assert linear + attention == pytest.approx(step.all_flops, rel=0.01)
    assert attention == pytest.approx(step.attention_flops)


def test_a_dense_model_in_torch_moves_its_weights_once_and_its_cache_three_times(tiny):
    """GQA; DynamicCache reads the old cache, writes the new one, and attention reads that."""
    found = torch_model(plain(tiny()), "float32").step(4, 1, 9)
    weights = 4 * (WEIGHTS + VOCAB * HIDDEN + NORMS)  # the head; of the embeddings only rows:
    assert found.traffic["weights"].bytes == weights + 4 * HIDDEN * 4
    assert found.traffic["kv"].bytes == 4 * KAPPA * (10 + 1 + 2 * 9)
    assert found.traffic["scratch"].bytes == 0
    on_gpu = torch_model(plain(tiny()), "float32", on_gpu=True).step(4, 1, 9)
    assert on_gpu.traffic["kv"].bytes == 4 * KAPPA * (10 + 1), "rings: written once, read once"
    prompt = torch_model(plain(tiny()), "bfloat16").step(4, 20, 0)
    assert prompt.traffic["kv"].bytes == 4 * 20 * KAPPA / 2
    rows = 4 * 20 * HIDDEN  # of the embedding, one a token
    assert prompt.traffic["weights"].bytes == weights / 2 + 2 * rows
    widths = LAYERS * sum(rows + cols for rows, cols in BLOCK)
    assert prompt.traffic["activations"].bytes == 2 * 4 * (20 * widths + VOCAB + HIDDEN)


def test_codes_in_torch_are_a_byte_and_become_floats_at_every_call(tiny, run):
    made = run(Rtn(bits=4, group_size=32, symmetric=False), plain(tiny()))
    found = torch_model(made, "float32").step(1, 1, 9).traffic
    rest = 4 * (VOCAB * HIDDEN + NORMS + HIDDEN)
    assert found["weights"].bytes == WEIGHTS + 3 * WEIGHTS / 32 + rest
    assert found["scratch"].bytes == 24 * WEIGHTS  # written, - (2), * (2), read by the product
    half = torch_model(made, "bfloat16").step(1, 1, 9).traffic
    assert half["scratch"].bytes == (20 + 4 + 2 + 2) * WEIGHTS  # read, written in half, read


def test_zeros_are_dense_without_a_sparse_kernel(tiny, run):
    """2:4 on disk is not 2:4 in any runner here."""
    dense = torch_model(plain(tiny()), "float32").step(1, 1, 9)
    made = run(Magnitude(pattern="2:4"), plain(tiny()))
    found = torch_model(made, "float32").step(1, 1, 9)
    assert (found.bytes, found.all_flops) == (dense.bytes, dense.all_flops)
    graph = graph_model(run(Onnx(), made)).step(1, 1, 9)
    assert graph.traffic["weights"].bytes == dense.traffic["weights"].bytes


def test_a_low_rank_layer_is_its_two_factors(tiny, run):
    made = run(Svd(keep=0.5, rank_multiple=4, targets=["*.down_proj"]), plain(tiny()))
    rank = made.stats["ranks"]["model.layers.0.mlp.down_proj"]
    dense = torch_model(plain(tiny()), "float32").step(2, 1, 9)
    found = torch_model(made, "float32").step(2, 1, 9)
    saved = LAYERS * (MLP * HIDDEN - rank * (MLP + HIDDEN))
    assert saved > 0 and found.weights == dense.weights - saved
    assert found.all_flops == dense.all_flops - 2 * 2 * saved
    assert found.traffic["weights"].bytes == dense.traffic["weights"].bytes - 4 * saved
    graph = graph_model(run(Ort(), run(Onnx(), made))).step(2, 1, 9)
    assert graph.traffic["weights"].bytes == found.traffic["weights"].bytes


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, -1)])
def test_a_graph_reads_its_codes_and_scales(tiny, run, bits, group):
    made = run(Onnx(), run(Rtn(bits=bits, group_size=group), plain(tiny())))
    scales = sum(rows * (1 if group < 0 else cols // group) for rows, cols in BLOCK) * LAYERS
    rest = 4 * (VOCAB * HIDDEN + NORMS + HIDDEN)
    found = graph_model(made).step(1, 1, 9)
    assert found.traffic["weights"].bytes == WEIGHTS * bits / 8 + 4 * scales + rest
    assert found.traffic["kv"].bytes == KAPPA * (128 + 1)  # a static cache, masked: all of it
    assert found.flops.keys() == {"float32"}


@pytest.mark.parametrize("built", [False, True])
def test_int8_inputs_and_weights_are_multiplied_as_such(tiny, run, built):
    made = run(Onnx(), run(Int8(calib=run.calib), plain(tiny())))
    found = graph_model(run(Ort(), made) if built else made).step(3, 1, 9)
    assert found.flops["int8"] == 2 * 3 * WEIGHTS
    scales = sum(rows for rows, _ in BLOCK) * LAYERS
    rest = 4 * (VOCAB * HIDDEN + NORMS + 3 * HIDDEN)
    assert found.traffic["weights"].bytes == WEIGHTS + 4 * scales + rest


def test_fp8_is_floats_in_onnx_runtime_and_a_byte_in_torch(tiny, run):
    made = run(Fp8(calib=run.calib), plain(tiny()))
    rest = 4 * (VOCAB * HIDDEN + NORMS + HIDDEN)
    graph = graph_model(run(Onnx(), made)).step(1, 1, 9)
    assert graph.traffic["weights"].bytes == 4 * WEIGHTS + rest
    assert graph.flops.keys() == {"float32"}
    torch = torch_model(made, "float32").step(1, 1, 9).traffic
    assert torch["weights"].bytes == WEIGHTS + 2 * len(BLOCK) * LAYERS + rest
    assert torch["scratch"].bytes == 16 * WEIGHTS  # without a zero point to take off


def test_an_int8_cache_is_a_quarter(tiny, run):
    made = run(Ort(), run(Onnx(), run(KvCache(calib=run.calib), plain(tiny()))))
    found = graph_model(made).step(3, 1, 9)
    assert found.traffic["kv"].bytes == 3 * KAPPA / 4 * (10 + 1) and found.kv_item == 1


def test_an_engine_multiplies_integers_and_reads_what_the_cache_holds(tiny, run):
    made = run(Ort(), run(Onnx(), run(Rtn(bits=4, group_size=32), plain(tiny()))))
    found = graph_model(made).step(3, 1, 9)
    assert found.flops["int8"] == 2 * 3 * WEIGHTS
    attention = 4 * 3 * 4 * 16 * 10 * LAYERS
    assert found.flops["float32"] == 2 * 3 * VOCAB * HIDDEN + attention
    assert found.traffic["kv"].bytes == 3 * KAPPA * (10 + 1)
    scales = 4 * WEIGHTS / 32
    rest = 4 * (VOCAB * HIDDEN + NORMS + 3 * HIDDEN)
    assert found.traffic["weights"].bytes == WEIGHTS / 2 + scales + rest


def big(**changes):
    """One layer of 4096 x 4096 in 4 bits, groups of 128, and a head; GQA unless told."""
    codes = 4096 * 4096 / 2 + 4096 * 32 * 2
    layer = Product(rows=4096, cols=4096, bytes=codes, dtype="float16")
    head = Product(rows=32000, cols=4096, bytes=32000 * 4096 * 2, dtype="float16", head=True)
    about = {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "windows": (None,)}
    about |= {"products": (layer, head), "vector_bytes": 0.0, "tables": 1, "capacity": 8192}
    return Model(**{**about, "dtype": "float16", "cache": "in place", **changes})


def test_w4_g128_gqa_mqa_and_a_window_by_hand():
    """8 rows, 1000 tokens in the cache: kappa is 2 * 8 * 128 * 2 = 4096 bytes a token."""
    step = big().step(8, 1, 1000)
    assert step.traffic["weights"].bytes == 8_388_608 + 262_144 + 262_144_000 + 8 * 8192
    assert step.traffic["kv"].bytes == 8 * 4096 * (1001 + 1)
    positions = big(tables=2).step(8, 1, 1000).traffic["weights"].bytes
    assert positions == step.traffic["weights"].bytes + 8 * 8192, "a row of each table a token"
    mqa = big(kv_heads=1).step(8, 1, 1000)
    assert mqa.traffic["kv"].bytes == 8 * 512 * 1002 and mqa.all_flops == step.all_flops
    local = big(windows=(256,)).step(8, 1, 1000)
    assert local.traffic["kv"].bytes == 8 * 4096 * (256 + 1)
    assert local.attention_flops == 8 * 4 * 32 * 128 * 256
    prompt = big().step(8, 1000, 0)
    assert prompt.traffic["kv"].bytes == 8 * 1000 * 4096
    assert prompt.attention_flops == 8 * 4 * 32 * 128 * 1000 * 1001 / 2
    linear = 2 * 8 * (1000 * 4096 * 4096 + 32000 * 4096)  # the head at the last position only
    assert prompt.all_flops == linear + prompt.attention_flops


def test_a_cache_that_is_not_in_place_moves_more_than_it_has_to():
    """8 rows at 1000 tokens, kappa 4096: read whole it is 8192 tokens, masked after 1001."""
    least = 8 * 4096 * (1001 + 1)
    whole = big(cache="whole").step(8, 1, 1000)
    assert whole.traffic["kv"].bytes == 8 * 4096 * (8192 + 1) and whole.kv_in_place == least
    assert whole.attention_flops == 8 * 4 * 32 * 128 * 8192
    anew = big(cache="concatenated").step(8, 1, 1000)
    assert anew.traffic["kv"].bytes == 8 * 4096 * (1001 + 1 + 2 * 1000) > anew.kv_in_place == least
    assert big(cache="whole").step(8, 1000, 0).kv_in_place == 8 * 4096 * 1000


def test_what_comes_from_one_memory_by_hand():
    """Weights and cache share it; activations keep to the widest product, scratch to two thirds of
    six passes over the largest temporary."""
    streamed = 8_388_608 + 262_144 + 262_144_000
    step = big().step(8, 1, 1000).traffic
    assert step["weights"].working_set == step["kv"].working_set == streamed + 8 * 4096 * 1001
    whole = big(cache="whole").step(8, 1, 1000).traffic
    assert whole["kv"].working_set == streamed + 8 * 4096 * 8192
    assert step["activations"].working_set == 2 * 8 * (32000 + 4096)
    codes = tuple(replace(product, scratch=6e6) for product in big().products)
    scratch = big(products=codes).step(8, 1, 1000).traffic["scratch"]
    assert (scratch.bytes, scratch.working_set) == (12e6, 2e6)


def test_learned_positions_are_a_second_table_and_windows_those_of_the_layers(tiny):
    assert torch_model(plain(tiny("gpt2")), "float32").tables == 2
    assert torch_model(plain(tiny()), "float32").tables == 1
    gemma = torch_model(plain(tiny("gemma3_text")), "float32")
    assert {*gemma.windows} == {16, None}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_read_once_whether_it_is_the_embedding_or_not(tiny, run, tied):
    source = plain(tiny(tie_word_embeddings=tied))
    for found in (torch_model(source, "float32"), graph_model(run(Onnx(), source))):
        assert [p.rows * p.cols for p in found.products if p.head] == [VOCAB * HIDDEN]
        weights = found.step(1, 1, 9).traffic["weights"].bytes
        assert weights == 4 * (WEIGHTS + VOCAB * HIDDEN + NORMS + HIDDEN)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 40])
@pytest.mark.parametrize(("tokens", "depth"), [(1, 0), (1, 20), (12, 0), (30, 0), (5, 14)])
def test_pairs_are_those_under_the_mask(tokens, depth, window):
    queries, keys = depth + np.arange(tokens)[:, None], np.arange(depth + tokens)
    seen = (keys <= queries) & (keys > queries - (window or 10**9))
    assert causal_pairs(tokens, depth, window) == seen.sum()


def test_a_cell_is_costed_at_the_mean_depth_of_its_decode_steps(tiny):
    cell = Cell("single", 1, 8, 4)
    found = costs(plain(tiny()), "float32", [cell])[cell]
    model = torch_model(plain(tiny()), "float32")
    steps = [model.step(1, 1, depth) for depth in (8, 9, 10)]
    assert found.decode.bytes == pytest.approx(np.mean([step.bytes for step in steps]))
    assert found.decode.all_flops == pytest.approx(np.mean([step.all_flops for step in steps]))
    assert cell_costs(model, Cell("single", 1, 8, 1)).decode is None
    assert found.capacity == 128


def test_a_plan_reads_blocks_as_they_are_stored(run, tiny):
    """4.5 bits in attention, 8.25 in the MLP; a float32 of each nvfp4 layer; the embedding."""
    attention = Nvfp4(targets=["*.self_attn.*"], method="rtn", clip="minmax")
    made = run(Mxfp8(targets=["*.mlp.*"]), run(attention, tiny()))
    graph = run(Onnx(), made)
    found = graph_model(replace(graph, format="tensorrt"))
    blocks = [p.bytes for p in found.products if not p.head]
    expected = [
        rows * cols * (4.5 if cols == 64 and rows != 96 else 8.25) / 8 for rows, cols in BLOCK
    ]
    codes = sum(rows * cols * (1 + (1 / 16 if cols == 64 and rows != 96 else 1 / 32))
                for rows, cols in BLOCK) * LAYERS  # fmt: skip
    held = torch_model(made, "float32").step(1, 1, 9).traffic["weights"].bytes
    assert held == codes + 4 * (VOCAB * HIDDEN + NORMS + HIDDEN), "in torch a code is a byte"
    attended = [size + 4 for size in expected[:4]]
    assert sorted(blocks) == sorted((attended + expected[4:]) * LAYERS)
