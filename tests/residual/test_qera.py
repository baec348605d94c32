"""QERA against its theorem, against weaker corrections, and through every form it is stored in."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import KINDS, Layer

from optpipe import model, pipeline
from optpipe.artifact import Artifact
from optpipe.build.ort import Ort
from optpipe.calibrate import Calib, Gram
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.onnx import Onnx
from optpipe.flow import observed
from optpipe.linear import Corrected, Form, LowRank, Quantized, dense, weight_of
from optpipe.lowrank.factorize import truncated
from optpipe.lowrank.svd import Svd
from optpipe.lowrank.svdllm import SvdLlm, whitened
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.wanda import Wanda
from optpipe.quant.awq import Awq
from optpipe.quant.rtn import Rtn
from optpipe.recover.blockwise import Blockwise
from optpipe.residual.qera import Qera
from optpipe.source import HuggingFace
from optpipe.structure.width import Width
from optpipe.transform.rotate import Rotate
from optpipe.transform.smoothquant import SmoothQuant
from optpipe.verify import verify


def corrected(layer, weight, rank):
    found, left = Qera(rank=rank).corrected(dense(weight, None), layer.weight, layer.gram)
    residual = found.residual
    return weight + residual.left.weight @ residual.right.weight, left


def rounded(weight):
    form = Form(rows=24, cols=64, bits=3, group_size=32)
    return weight_of(Rtn(bits=3, group_size=32).quantize(dense(weight, None), weight, form, None))


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(0, 50), st.booleans())
def test_no_correction_of_the_rank_loses_less(kind, rank, seed, pruned):
    """Nor do a plain SVD of what is missing (LoRC), one of it times mean |x| (LQER), or none."""
    layer = Layer(kind, seed)
    magnitude = Magnitude().pruned(layer.weight, None)[0]
    weight = magnitude if pruned else rounded(layer.weight)
    missing = (layer.weight - weight).double()
    ours, left = corrected(layer, weight, rank)
    mean = layer.x.abs().mean(0)
    plain, lqer = truncated(missing, rank), truncated(missing * mean, rank)
    others = weight, weight + plain[0] @ plain[1], weight + lqer[0] @ lqer[1] / mean
    errors = [layer.error(other) for other in others]
    assert layer.error(ours) <= min(errors) * (1 + 1e-6)
    assert layer.error(ours) == pytest.approx(left * errors[0], rel=1e-4)
    # what is left is what the truncation discarded (Eckart and Young, in the norm of the inputs)
    discarded = torch.linalg.svdvals(missing @ torch.linalg.cholesky(layer.mean_CC))[rank:]
    assert layer.error(ours) == pytest.approx(float(discarded.square().sum()), rel=1e-4)


def test_more_rank_never_loses_more_and_the_whole_rank_nothing():
    layer = Layer("correlated", 0)
    weight = rounded(layer.weight)
    errors = [layer.error(corrected(layer, weight, rank)[0]) for rank in range(1, 25)]
    assert all(b <= a for a, b in pairwise(errors))
    assert errors[-1] < 1e-9 * layer.error(weight)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    def made(family):
        out = tmp_path_factory.mktemp("quantized")
        source = Artifact(path=tiny(family), format="hf", key="k")
        stats = Rtn(bits=3, group_size=32).run(source, out, lambda *_: None)
        return Artifact(path=out, format="hf", key="q", lineage=("quant",), stats=stats)

    return made


def test_every_family_is_nearer_to_its_original_and_says_by_how_much(family, run, tiny, quantized):
    source = quantized(family)
    made = run(Qera(rank=8, calib=run.calib), source, baseline=tiny(family))
    planned = Qera(rank=8).plan(model.layers(Checkpoint(source.path)))
    facts = verify(made, source, planned)
    block = Checkpoint(tiny(family)).decoder.blocks[0]
    assert facts["ranks"][f"{block.mlp_out}.residual"] == 8
    assert 0 < made.stats["loss_kept"] < 0.9
    ids = torch.randint(3, 288, (1, 60), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        folders = tiny(family), source.path, made.path
        dense_logits, before, after = (model.load(Checkpoint(f))(ids).logits for f in folders)
    assert (after - dense_logits).square().mean() < (before - dense_logits).square().mean()


def test_bits_count_for_the_weights_that_are_corrected(run, tiny, quantized):
    source = quantized("llama")
    made = run(Qera(rank=8, calib=run.calib, targets=["*.down_proj"]), source, baseline=tiny())
    before = verify(source, Artifact(path=tiny(), format="hf", key="k"), None)["bits_per_weight"]
    after = verify(made, source, None)["bits_per_weight"]
    graphs = [run(Onnx(), artifact).stats["bits_per_weight"] for artifact in (source, made)]
    weights = sum(f.rows * f.cols for f in model.layers(Checkpoint(tiny())).values())
    for less, more in ((before, after), graphs):
        assert more - less == pytest.approx(3 * 8 * (64 + 96) * 32 / weights, rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_graph_and_an_engine_compute_the_corrected_layer(name, run, tiny, quantized):
    made = run(Qera(rank=8, calib=run.calib), quantized(name), baseline=tiny(name))
    graph = run(Onnx(), made)
    assert verify(graph, made, None)["parity"]["worst"] < 2e-4
    engine = run(Ort(accuracy_level=1), graph)
    assert verify(engine, made, None)["parity"]["worst"] < 2e-4


def test_a_corrected_layer_is_the_sum_of_its_parts(run, tiny, quantized):
    made = Checkpoint(
        run(Qera(rank=4, calib=run.calib), quantized("qwen2"), baseline=tiny("qwen2")).path
    )
    name = "model.layers.1.self_attn.q_proj"
    layer = model.layer(name, made.forms, made)
    assert isinstance(layer, Corrected) and isinstance(layer.base, Quantized)
    left, right = (made.get(f"{name}.residual.{side}.weight") for side in ("left", "right"))
    x = torch.randn(5, 64)
    expected = x @ (layer.base.dequantize() + left @ right).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


DENSE = {"a": Form(rows=64, cols=64)}
CODES = {"a": Form(rows=64, cols=64, bits=3)}
FACTORS = {"a.right": Form(rows=32, cols=64), "a.left": Form(rows=64, cols=32)}


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        (DENSE, 4, "'a' is neither quantized nor pruned"),
        (CODES, 32, "rank=32 takes no fewer weights than layer 'a'"),
        (FACTORS, 4, "'a' is neither quantized nor pruned"),
        (Rtn(group_size=32).plan(FACTORS), 32, r"layer 'a' itself \(64 x 32 x 64\)"),
        (Qera(rank=4).plan(CODES), 4, "'a' is corrected already; correct once"),
    ],
)
def test_layers_that_cannot_be_corrected_are_refused(layers, rank, message):
    with pytest.raises(ValueError, match=message):
        Qera(rank=rank).plan(layers)


def test_nothing_changes_a_layer_after_its_correction():
    for stage in (Rtn(), Magnitude(), Qera()):
        with pytest.raises(ValueError, match=r"is (quantized|corrected) already"):
            stage.plan(Qera(rank=4).plan(CODES))


def test_rank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Qera(rank=0)


BEFORE = {
    "pruned": {"prune": Wanda(sparsity=0.4)},
    "recovered": {"prune": Wanda(sparsity=0.4), "recover": Blockwise(tokens=256, batch=2)},
    "factorized": {
        "lowrank": SvdLlm(keep=0.9, rank_multiple=32, allocation="uniform", targets=["*.mlp.*"])
    },
    "settled": {"lowrank": SvdLlm(keep=0.9, rank_multiple=16, targets=["*.mlp.*"])},
    "rotated": {"transform": Rotate()},
    "smoothed": {"transform": SmoothQuant(linears=True)},
    "narrowed": {"structure": Width(multiple=32, mlp=0.4)},
}


@pytest.mark.parametrize("before", BEFORE)
def test_it_takes_back_what_was_lost_since_weights_were_rewritten(before, run, tiny, tmp_path):
    """The logits come nearer to those of the model that weights are corrected towards."""
    stages = {**BEFORE[before], "quant": Rtn(bits=3, group_size=16), "residual": Qera(rank=8)}
    for name, stage in stages.items():
        if hasattr(stage, "calib"):
            stages[name] = replace(stage, calib=run.calib)
    source = HuggingFace(path=str(tiny()))
    steps = pipeline.check(stages, source, tmp_path)
    made = list(pipeline.run(steps, source.prepare(tmp_path)))
    rewrote = [i for i, stage in enumerate(stages.values(), 1) if stage.rewrites]
    ids = torch.randint(3, 288, (1, 60), generator=torch.Generator().manual_seed(5))
    folders = made[max(rewrote, default=0)].path, made[-2].path, made[-1].path
    with torch.no_grad():
        wanted, quantized, corrected = (model.load(Checkpoint(f))(ids).logits for f in folders)
    assert 0 < made[-1].stats["loss_kept"] < 0.9
    assert (corrected - wanted).square().mean() < 0.9 * (quantized - wanted).square().mean()


def test_two_factors_are_corrected_as_one_layer(run, tiny):
    name = "model.layers.1.mlp.up_proj"
    factors = run(Svd(keep=0.9, rank_multiple=32, targets=[name]), tiny())
    quantized = run(Rtn(bits=3, group_size=32, targets=["*.up_proj.*"]), factors)
    stage = Qera(rank=4, targets=[name], calib=run.calib)
    made = Checkpoint(run(stage, quantized, baseline=tiny()).path)
    before, after = (model.layer(name, c.forms, c) for c in (Checkpoint(quantized.path), made))
    assert isinstance(after, Corrected) and isinstance(after.base, LowRank)
    assert torch.equal(weight_of(after.base), weight_of(before))
    missing = Checkpoint(tiny()).get(f"{name}.weight") - weight_of(before)
    gram = dict(_grams(quantized.path, run.calib))[f"{name}.right"]
    left, right = whitened(missing.double(), gram, 4)
    torch.testing.assert_close(weight_of(after.residual).double(), left @ right)
    graph = run(Onnx(), made.path)
    assert verify(graph, Artifact(path=made.path, format="hf", key="k"), None)["parity"]


def _grams(folder, calib):
    checkpoint = Checkpoint(folder)
    seen = calib.observe(checkpoint, frozenset(model.layers(checkpoint)) - {"lm_head"}, Gram)
    for name, _, statistic in observed(checkpoint, seen):
        yield name, statistic.mean_CC


@pytest.mark.parametrize("last", [Awq(group_size=32), Blockwise(tokens=64)])
def test_what_was_lost_before_a_rewrite_is_not_guessed(last, tiny, tmp_path):
    calib = Calib(source="random", samples=2, tokens=16)
    stages = {"prune": Magnitude(), "last": replace(last, calib=calib), "residual": Qera(rank=4)}
    stages["residual"] = replace(stages["residual"], calib=calib)
    with pytest.raises(InputError, match=r"stage 'residual': .*is as stage 'last' left it"):
        pipeline.check(stages, HuggingFace(path=str(tiny())), tmp_path)
