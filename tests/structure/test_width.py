"""Width against the definitions of its scores and against models masked by hand."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from optpipe import model, pipeline
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.onnx import Onnx
from optpipe.linear import dense
from optpipe.lowrank.svd import Svd
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.wanda import Wanda
from optpipe.quant.gptq import Gptq
from optpipe.quant.rtn import Rtn
from optpipe.source import HuggingFace
from optpipe.structure.resize import parameters
from optpipe.structure.width import Moments, Width, _kept, compensated, flap_score, kept_inputs
from optpipe.verify import verify

IDS = torch.randint(3, 288, (2, 40), generator=torch.Generator().manual_seed(1))


def stage(run, **changes):
    return Width(**{"mlp": 0.3, "heads": 0.5, "multiple": 8, "calib": run.calib, **changes})


def heads(family):
    """GPT-2 keeps its heads; Phi-3 and the others have two key-value heads here."""
    return 0.0 if family == "gpt2" else 0.5


def moments_of(x):
    moments = Moments(x.shape[1])
    for part in x.split(7):
        moments.add(part)
    return moments


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def test_the_score_is_variance_times_squared_column_norm():
    weight, x = torch.randn(5, 12).double(), torch.randn(50, 12).double() + 3
    expected = x.var(0, correction=0) * torch.linalg.vector_norm(weight, dim=0) ** 2
    torch.testing.assert_close(flap_score(weight, moments_of(x)), expected, rtol=1e-6, atol=0)


def test_the_best_groups_stay_in_their_order():
    score = torch.tensor([1.0, 1, 5, 0, 0, 3, 2, 2])
    assert kept_inputs(score, 2, 2).tolist() == [2, 3, 6, 7]
    assert kept_inputs(score, 1, 3).tolist() == [2, 5, 7]


@given(st.integers(1, 5000), st.floats(0, 0.99), st.sampled_from([1, 8, 128]))
def test_never_more_goes_than_was_allowed(total, share, multiple):
    kept = _kept(total, share, multiple)
    assert 1 <= kept <= total and total - kept <= share * total + 1e-6
    assert kept == total or kept % multiple == 0


@pytest.mark.parametrize(
    ("kind", "share", "stay"),
    [
        ("Llama", 0.2, 8),
        ("Llama", 0.5, 4),
        ("Llama", 0.7, 4),
        ("Gemma2", 0.2, 8),
        ("Qwen3", 0.2, 7),
    ],
)
def test_as_many_heads_stay_as_transformers_has_a_config_for(kind, share, stay, tmp_path):
    """The sizes of Llama 3 8B: of 28 query heads 4096 is no multiple, which some families want."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    kind = getattr(transformers, f"{kind}Config")
    smaller = Width(heads=share).resize(kind(**sizes, **heads))
    smaller.save_pretrained(tmp_path)
    read = kind.from_pretrained(tmp_path)
    assert (read.num_key_value_heads, read.num_attention_heads) == (stay, 4 * stay)


def test_bias_makes_up_exactly_for_constant_channels():
    torch.manual_seed(0)
    x, keep = torch.randn(60, 10).double(), torch.tensor([0, 2, 3, 7])
    gone = [i for i in range(10) if i not in keep]
    x[:, gone] = torch.randn(len(gone)).double()
    for bias in (None, torch.randn(6).double()):
        layer = dense(torch.randn(6, 10).double(), bias)
        smaller = compensated(layer, keep, moments_of(x), "bias")
        torch.testing.assert_close(smaller(x[:, keep]), layer(x), rtol=1e-10, atol=1e-10)


def test_weights_are_the_least_squares_answer_and_never_worse_than_none():
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(80, 12).double() @ torch.randn(12, 12).double()
        keep, layer = torch.tensor([1, 4, 5, 6, 9, 11]), dense(torch.randn(4, 12).double(), None)
        ours = compensated(layer, keep, moments_of(x), "weights")
        expected = torch.linalg.lstsq(x[:, keep], layer(x)).solution.T
        torch.testing.assert_close(ours.weight.detach(), expected, rtol=1e-6, atol=1e-8)
        plain = compensated(layer, keep, moments_of(x), "none")
        error = [float((m(x[:, keep]) - layer(x)).square().sum()) for m in (ours, plain)]
        assert error[0] < error[1]
        damp = 0.1 * (x[:, keep].square().sum() / 6).sqrt()  # rows that pull towards the weights
        more = torch.cat([x[:, keep], damp * torch.eye(6).double()])
        wanted = torch.cat([layer(x), damp * layer.weight[:, keep].T])
        damped = compensated(layer, keep, moments_of(x), "weights", 0.01).weight
        expected = torch.linalg.lstsq(more, wanted).solution.T
        torch.testing.assert_close(damped.detach(), expected, rtol=1e-6, atol=1e-8)


def test_it_is_the_dense_model_with_masked_channels(family, run, tiny):
    """Zero the columns that are gone in transformers' own model: the same logits."""
    made = run(stage(run, heads=heads(family), compensation="none"), tiny(family))
    old, new = Checkpoint(tiny(family)), Checkpoint(made.path)
    lm = model.load(old)
    for block in old.decoder.blocks:
        for name in (block.attn_out, block.mlp_out):
            before, after = lm.get_submodule(name).weight, model.layer(name, {}, new).weight
            equal = (before[:, :, None] == after[:, None, :]).all(0).any(1)
            assert equal.sum() == after.shape[1]
            before[:, ~equal] = 0
    with torch.no_grad():
        masked = lm(IDS).logits
    torch.testing.assert_close(logits(made.path), masked, rtol=1e-4, atol=1e-4)


def test_transformers_reads_what_we_run(family, run, tiny):
    made = run(stage(run, heads=heads(family)), tiny(family))
    new = Checkpoint(made.path)
    model.check_complete(new)
    with torch.no_grad():
        ours = model.load(new)(IDS).logits
    torch.testing.assert_close(logits(made.path), ours, rtol=1e-5, atol=1e-5)
    decoder = new.decoder
    assert decoder.kv_heads == (4 if family == "gpt2" else 1)
    assert decoder.intermediate == (184 if family == "gpt2" else 72)
    assert decoder.head_dim == Checkpoint(tiny(family)).decoder.head_dim
    held = sum(torch.Size(shape).numel() for shape in new.shapes().values())
    assert made.stats["parameters"] == held == parameters(new.config)
    assert made.stats["parameters_before"] > held


@pytest.mark.parametrize(("family", "heads"), [("llama", 0.5), ("qwen3", 0.5), ("gpt2", 0.0)])
def test_biases_are_read_back_exported_and_agree(family, heads, run, tiny):
    mlp = 0.0 if family == "qwen3" else 0.3
    made = run(stage(run, mlp=mlp, heads=heads, compensation="bias"), tiny(family))
    new = Checkpoint(made.path)
    out = new.decoder.blocks[1].attn_out if heads else new.decoder.blocks[1].mlp_out
    assert new.get(f"{out}.bias").abs().min() > 0
    with torch.no_grad():
        ours = model.load(new)(IDS).logits
    torch.testing.assert_close(logits(made.path), ours, rtol=1e-5, atol=1e-5)
    verify(run(Onnx(), made), made, None)


def test_taylor_is_the_gradient_of_transformers_own_loss(run, tiny):
    made = run(stage(run, score="taylor", compensation="none", heads=0.0), tiny())
    lm = AutoModelForCausalLM.from_pretrained(tiny())
    for ids in run.calib.ids(Checkpoint(tiny())):
        lm(ids[None], labels=ids[None]).loss.backward()
    for index in range(3):
        weight = lm.model.layers[index].mlp.down_proj.weight
        keep = (weight * weight.grad).abs().sum(0).topk(72).indices.sort().values
        name = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(Checkpoint(made.path).get(name), weight.detach()[:, keep])


def test_later_stages_are_planned_for_the_smaller_model(run, tiny, tmp_path):
    source = HuggingFace(path=str(tiny()))
    stages = {
        "structure": stage(run),
        "prune": Wanda(calib=run.calib),
        "quant": Gptq(group_size=32, targets=["*.q_proj"], calib=run.calib),
    }
    steps = pipeline.check(stages, source, tmp_path)
    assert steps[0].layers["model.layers.2.mlp.down_proj"].cols == 72
    assert steps[2].layers["model.layers.2.self_attn.q_proj"].rows == 32
    *_, last = pipeline.run(steps, source.prepare(tmp_path))
    assert Checkpoint(last.path).decoder.intermediate == 72
    assert last.stats["verified"]["sparsity"] > 0.3


@pytest.mark.parametrize(
    "earlier", [Magnitude(targets=["*.q_proj"]), Rtn(group_size=32), Svd(rank_multiple=4)]
)
def test_it_comes_first(earlier, run, tiny, tmp_path):
    stages = {"earlier": earlier, "structure": stage(run)}
    with pytest.raises(InputError, match="structured pruning comes before everything else"):
        pipeline.check(stages, HuggingFace(path=str(tiny())), tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"heads": 0.5}, "no head can go; set heads=0"),
        ("mistral", {"compensation": "bias"}, "'mistral' has no bias on the output of its atten"),
        ("qwen3", {"compensation": "bias", "heads": 0.0}, "'qwen3' has no bias .* of its mlp"),
        ("llama", {"mlp": 0.05, "heads": 0.2, "multiple": 32}, "leave everything as it is"),
    ],
)
def test_what_a_family_cannot_have_is_refused(family, changes, message, run, tiny):
    with pytest.raises(ValueError, match=message):
        stage(run, **changes).resize(Checkpoint(tiny(family)).config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": 1.0}, "mlp must be at least 0 and below 1, got 1.0"),
        ({"heads": -0.1}, "heads must be"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"score": "norm"}, "score must be one of .*, got 'norm'"),
        ({"compensation": "both"}, "compensation must be one of .*, got 'both'"),
        ({"damp": 0.0}, "damp must be above 0"),
    ],
)
def test_bad_values_are_refused(changes, message, run):
    with pytest.raises(ValueError, match=message):
        stage(run, **changes)
