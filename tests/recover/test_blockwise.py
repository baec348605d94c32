"""Block reconstruction: what it must lower, what it must keep, and what it compares with."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.linear import Form
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.mxfp8 import Mxfp8
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.recover.blockwise import Blockwise
from optpipe.structure.depth import Depth
from optpipe.transform.rotate import Rotate
from optpipe.verify import verify_checkpoint


def stage(run, **changes):
    return Blockwise(**{"tokens": 1024, "batch": 2, "calib": run.calib, **changes})


def states(lm, ids):
    """What goes into every block and out of it, by hooks on a torch model."""
    seen = []
    blocks = lm.base_model.h if hasattr(lm.base_model, "h") else lm.base_model.layers
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        lm(ids, use_cache=False)
    return seen


def relative(ours, target):
    spread = sum(t.double().var(correction=0) for t in target)
    return float((ours - target).double().square().mean((1, 2)).sum() / spread)


def test_no_block_gets_worse_and_every_form_stays(family, run, mixed, tiny):
    source = mixed(family)
    made = run(stage(run), source, tiny(family))
    pairs = list(zip(made.stats["block_error_before"], made.stats["block_error"], strict=True))
    assert all(after <= before for before, after in pairs)
    assert sum(after < 0.9 * before for before, after in pairs) >= 2
    old, new = Checkpoint(source.path), Checkpoint(made.path)
    verify_checkpoint(made, source, old.forms)  # masks, ranks, finite logits
    for name in old.files:
        if name.endswith((".codes", ".mask", ".zeros")):
            assert torch.equal(old.get(name), new.get(name)), name
    scales = [name for name in old.files if name.endswith(".scales")]
    assert scales and all(bool((new.get(name) > 0).all()) for name in scales)
    assert any(not torch.equal(old.get(name), new.get(name)) for name in scales)


@pytest.mark.parametrize("quant", [Nvfp4(method="rtn", clip="minmax"), Mxfp8(activations="none")])
def test_scales_of_eight_bits_stay(quant, run, tiny):
    source = run(quant, tiny())
    made = run(stage(run), source, tiny())
    old, new = Checkpoint(source.path), Checkpoint(made.path)
    verify_checkpoint(made, source, old.forms)
    scales = [name for name in old.files if name.endswith("scales")]
    assert scales and all(torch.equal(old.get(name), new.get(name)) for name in scales)
    assert sum(made.stats["block_error"]) < 0.99 * sum(made.stats["block_error_before"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_errors_are_those_of_whole_models(family, run, mixed, tiny):
    """Hooks on both models run as a whole: the recovered one feeds itself."""
    made = run(stage(run), mixed(family), tiny(family))
    ids = run.calib.ids(Checkpoint(tiny(family)))
    target = states(AutoModelForCausalLM.from_pretrained(tiny(family)), ids)
    ours = states(model.load(Checkpoint(made.path)), ids)
    expected = [relative(a, b) for a, b in zip(ours, target, strict=True)]
    assert made.stats["block_error"] == pytest.approx(expected, rel=1e-3)


def test_the_block_before_a_dropped_one_learns_what_that_did(run, tiny):
    shorter = run(Depth(share=0.4, score="influence", calib=run.calib), tiny())
    kept = shorter.stats["kept_blocks"]
    made = run(stage(run, rate=1e-9), shorter, tiny())
    ids = run.calib.ids(Checkpoint(tiny()))
    whole = states(AutoModelForCausalLM.from_pretrained(tiny()), ids)
    ours = states(model.load(Checkpoint(shorter.path)), ids)
    ends = [whole[following - 1] for following in (*kept[1:], 3)]
    expected = [relative(a, b) for a, b in zip(ours, ends, strict=True)]
    assert made.stats["block_error_before"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_shorter_model_stays_one_that_transformers_reads(family, run, tiny):
    shorter = run(Depth(share=0.4, calib=run.calib), tiny(family))
    made = run(stage(run), shorter, tiny(family))
    assert sum(made.stats["block_error"]) < 0.9 * sum(made.stats["block_error_before"])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(ids).logits
        ours = model.load(Checkpoint(made.path))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_an_untouched_model_is_left_alone(run, tiny):
    made = run(stage(run), tiny())
    assert made.stats["block_error"] == made.stats["block_error_before"] == [0.0] * 3
    old, new = Checkpoint(tiny()), Checkpoint(made.path)
    assert all(torch.equal(old.get(name), new.get(name)) for name in old.files)


def test_half_precision_is_rounded_before_it_is_judged(run, tiny, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.bfloat16).save_pretrained(half)
    source = run(Magnitude(), half)
    made = run(stage(run), source, half)
    ids = run.calib.ids(Checkpoint(half))
    target = states(model.load(Checkpoint(half)), ids)
    ours = states(model.load(Checkpoint(made.path)), ids)
    expected = [relative(a, b) for a, b in zip(ours, target, strict=True)]
    assert made.stats["block_error"] == pytest.approx(expected, rel=1e-3)
    assert Checkpoint(made.path).types["model.norm.weight"] == "BF16"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rotated_model_is_compared_in_its_own_basis(family, run, tiny):
    """It computes what the untouched one does, so that nothing is left to learn."""
    made = run(stage(run, tokens=1, rate=1e-9), run(Rotate(), tiny(family)), tiny(family))
    assert max(made.stats["block_error_before"]) < 1e-9


def test_another_model_is_no_teacher(run, tiny):
    with pytest.raises(InputError, match="the embedding is not that of the untouched model, nor"):
        run(stage(run), tiny("qwen2"), tiny("mistral"))


def test_layers_that_round_their_inputs_are_refused(run):
    layers = {"a": Form(rows=4, cols=4, bits=8, inputs="int8_token")}
    with pytest.raises(ValueError, match="'a' rounds its inputs"):
        stage(run).plan(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"rate": 1.0}, "rate must be above 0 and below 1, got 1.0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(changes, message, run):
    with pytest.raises(ValueError, match=message):
        stage(run, **changes)
