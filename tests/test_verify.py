"""The gates after each stage must open for what is right and close for what is nearly right."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.build import lower
from optpipe.build.ort import Ort
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError
from optpipe.export.onnx import Onnx
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.fp8 import Fp8
from optpipe.quant.rtn import Rtn
from optpipe.verify import TOLERANCES, verify, verify_checkpoint

INDEX = torch.tensor([0])


@pytest.fixture
def source(tiny):
    return Artifact(path=tiny(), format="hf", key="k")


def change(artifact, name, edit):
    """Rewrite one stored tensor."""
    file = artifact.path / Checkpoint(artifact.path).files[name]
    tensors = load_file(file)
    tensors[name] = edit(tensors[name])
    save_file(tensors, file)


def layers(artifact):
    return model.layers(Checkpoint(artifact.path))


def test_facts_are_what_the_files_hold(run, source):
    made = run(Magnitude(sparsity=0.25), source)
    facts = verify(made, source, layers(made))
    # a quarter of every layer but the head, which is a layer of its own here
    sizes = {n: f.rows * f.cols for n, f in layers(made).items()}
    share = 1 - sizes["lm_head"] / sum(sizes.values())
    assert facts["sparsity"] == pytest.approx(0.25 * share, rel=1e-3)
    made = run(Rtn(bits=4, group_size=32, head=True), source)
    assert verify(made, source, layers(made))["bits_per_weight"] == pytest.approx(4.5)


def test_another_form_than_planned_is_refused(run, source):
    made = run(Rtn(bits=4, group_size=32), source)
    with pytest.raises(GateError, match=r"became .*bits=4.*planned .*bits=8"):
        verify(made, source, Rtn(bits=8, group_size=32).plan(layers(source)))


def test_numbers_that_are_not_finite_are_refused(run, source):
    made = run(Magnitude(targets=["*down_proj"]), source)
    change(made, "model.layers.1.mlp.down_proj.values", lambda t: t.fill_(float("nan")))
    with pytest.raises(GateError, match=r"layers.1.mlp.down_proj.*not finite"):
        verify(made, source, layers(made))
    made = run(Magnitude(targets=["*down_proj"]), source)
    change(made, "model.norm.weight", lambda t: t.fill_(float("inf")))
    with pytest.raises(GateError, match="logits that are not finite"):
        verify(made, source, layers(made))


def test_a_weight_where_the_mask_says_none_is_refused(run, source):
    pruned = run(Magnitude(), source)
    made = run(Rtn(group_size=32), pruned)
    change(made, "model.layers.0.mlp.up_proj.codes", lambda t: t ^ 0x11)
    with pytest.raises(GateError, match="mask says there are none"):
        verify(made, pruned, layers(made))


def test_a_mask_that_breaks_its_pattern_is_refused(run, source):
    """One group of four keeps three weights, another one: as sparse as claimed, but not 2:4."""
    made = run(Magnitude(pattern="2:4", targets=["*down_proj"]), source)
    change(
        made, "model.layers.0.mlp.down_proj.mask", lambda t: t.index_fill_(1, INDEX, 0b0001_0111)
    )
    with pytest.raises(GateError, match=r"down_proj' does not follow the pattern '2:4'"):
        verify(made, source, layers(made))


def test_a_window_of_the_wrong_size_is_refused(run, tiny, monkeypatch):
    """It shows beyond the window of 16 only, which none of the other prompts reaches."""
    monkeypatch.setattr("optpipe.verify.PROMPTS", (2, 1))
    source = Artifact(path=tiny("mistral"), format="hf", key="k")
    decoder = Checkpoint(source.path).decoder
    assert verify(run(Onnx(), source), source, None)["parity"]["positions"] == 5 * (1 + 8 + 5)
    wrong = tuple(replace(block, window=block.window + 1) for block in decoder.blocks)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "decoder", replace(decoder, blocks=wrong))
        made = run(Onnx(), source)
    with pytest.raises(GateError, match="relative logit error"):
        verify(made, source, None)


def test_a_lost_mask_is_refused(run, source):
    pruned = run(Magnitude(), source)
    other = run(Magnitude(sparsity=0.4), source)
    made = run(Rtn(group_size=32), other)
    with pytest.raises(GateError, match="lost the mask"):
        verify(made, pruned, layers(made))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_graph_that_computes_something_slightly_else_is_refused(
    run, source, quantized, monkeypatch
):
    """An activation that is 10 % off, in an engine whose int8 activations allow for much."""
    if quantized:
        source = run(Rtn(group_size=32), source)
    canonical = run(Onnx(), source)
    good = run(Ort(), canonical)
    found = verify(good, source, None)
    assert good.stats["int8_activations"] == quantized
    assert ("parity_float_activations" in found) == quantized
    exact = found["parity_float_activations" if quantized else "parity"]
    assert exact["worst"] < TOLERANCES["float32"] / 10 and exact["positions"] > 40

    node = lower.Graph.node
    monkeypatch.setattr(
        lower.Graph, "node", lambda self, *a, **k: node(self, *a, **{**k, **_bent(k)})
    )
    with pytest.raises(GateError, match=r"relative logit error .* exceeds 2e-04"):
        verify(run(Ort(), canonical), source, None)


def _bent(attributes):
    return {"alpha": 1.1} if "alpha" in attributes else {}


def test_half_precision_has_its_own_tolerance(run, source):
    made = run(Onnx(dtype="float16"), source)
    found = verify(made, source, None)["parity"]
    assert TOLERANCES["float32"] < found["worst"] < TOLERANCES["float16"]


def test_short_contexts_are_verified_too(run, source):
    made = run(Onnx(capacity=16), source)
    assert verify(made, source, None)["parity"]["positions"] > 30


def test_reports_can_hold_the_facts(run, source):
    made = run(Rtn(group_size=32), source)
    json.dumps(verify(replace(made, lineage=("quant",)), source, layers(made)), allow_nan=False)


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_a_grid_that_a_later_stage_changed_is_caught(part, run, tiny):
    """Training may move scales, as recovery does; what they scale may not."""
    stage = Rtn(group_size=32, symmetric=False, targets=["*.up_proj"])
    before, after = run(stage, tiny()), run(stage, tiny())
    name, message = f"model.layers.1.mlp.up_proj.{part}", f"up_proj' lost the {part} it was"
    change(after, name, lambda t: (t.view(torch.uint8) ^ 1).view(t.dtype))
    with pytest.raises(GateError, match=message):
        verify_checkpoint(after, before, None)
    trained = replace(after, stats={"trained_tokens": 64})
    if part == "scales":
        assert verify_checkpoint(trained, before, None)
        return
    with pytest.raises(GateError, match=message):
        verify_checkpoint(trained, before, None)


def test_inputs_are_rounded_as_they_were(run, tiny):
    before, after = (run(Fp8(targets=["*.up_proj"], calib=run.calib), tiny()) for _ in range(2))
    change(after, "model.layers.1.mlp.up_proj.input_scale", lambda t: t * 2)
    with pytest.raises(GateError, match="up_proj' lost the input_scale it was quantized with"):
        verify_checkpoint(after, before, None)


def test_what_is_rounded_to_zero_is_not_pruned(run, source):
    made = run(Rtn(bits=2, group_size=32), source)
    assert verify_checkpoint(made, source, None)["sparsity"] == 0


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"bits": 8}, r"8 bits were claimed, \[3\] are there"),
        (
            {"layer_bits": {"model.layers.0.mlp.up_proj": 4}},
            "4 bits were claimed for 'model.layers",
        ),
        (
            {"bits_per_quantized_weight": 3.4},
            r"3\.4 bits a quantized weight were claimed, 3\.59375",
        ),
    ],
)
def test_bits_that_were_claimed_must_be_in_the_files(claim, message, run, tiny):
    """3 bits, and for each group of 32 a scale of 16 and a zero of 3; rows end at bytes."""
    before = Artifact(path=tiny(), format="hf", key="k")
    after = run(Rtn(bits=3, group_size=32, symmetric=False, targets=["*.up_proj"]), tiny())
    found = verify_checkpoint(after, before, None)
    assert found["bits_per_quantized_weight"] == 3 + (16 + 3) / 32
    assert set(found["layer_bits"].values()) == {3} and len(found["layer_bits"]) == 3
    with pytest.raises(GateError, match=message):
        verify_checkpoint(replace(after, stats=claim), before, None)


def test_a_layer_takes_what_its_form_says(run, tiny):
    before = Artifact(path=tiny(), format="hf", key="k")
    after = run(Rtn(bits=4, group_size=32, targets=["*.up_proj"]), tiny())
    file = next(
        f
        for f in after.path.glob("*.safetensors")
        if "up_proj.scales" in f.read_bytes().decode("latin1")
    )
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("up_proj.scales"))
    save_file({**tensors, name: tensors[name].float()}, file, metadata={"format": "pt"})
    with pytest.raises(GateError, match=r"up_proj' takes 30720 bits, its form says 27648"):
        verify_checkpoint(after, before, None)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"parameters": 5}, "5 parameters were claimed"),
        ({"sparsity": 0.9}, r"a sparsity of 0\.9 was claimed"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 12}}, "rank 12 was claimed for 'model.layers.0"),
    ],
)
def test_what_was_claimed_must_be_there(claim, message, run, tiny):
    before = Artifact(path=tiny(), format="hf", key="k")
    after = run(Svd(rank_multiple=8, targets=["*.up_proj"]), tiny())
    forms = Checkpoint(after.path).forms
    honest = verify_checkpoint(after, before, forms)
    lm = model.load(Checkpoint(after.path))
    assert honest["parameters"] == sum(p.numel() for p in lm.parameters())
    with pytest.raises(GateError, match=message):
        verify_checkpoint(replace(after, stats=claim), before, forms)
