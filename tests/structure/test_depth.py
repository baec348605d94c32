"""Depth against transformers' own hidden states and losses, and an identity block."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe import model, pipeline
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx
from optpipe.quant.rtn import Rtn
from optpipe.source import HuggingFace
from optpipe.structure.depth import Depth, influences, losses_without
from optpipe.structure.width import Width
from optpipe.verify import verify

IDS = torch.randint(3, 288, (4, 40), generator=torch.Generator().manual_seed(1))


def quiet(*_):
    pass


def stage(run, **changes):
    return Depth(**{"share": 0.4, "calib": run.calib, **changes})


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def blocks_of(lm):
    return lm.base_model.h if hasattr(lm.base_model, "h") else lm.base_model.layers


@torch.no_grad()
def loss_without(folder, gone):
    """By transformers: the blocks in ``gone`` hand on what they are given."""
    lm = load(folder)
    for index in gone:
        blocks_of(lm)[index].forward = lambda hidden, *_, **__: hidden
    return sum(float(lm(ids[None], labels=ids[None]).loss) for ids in IDS) / len(IDS)


def test_influence_is_one_minus_the_cosine_of_transformers_hidden_states(family, tiny):
    with torch.no_grad():
        lm = load(tiny(family))
        seen = []
        for block in blocks_of(lm):
            block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        lm(IDS, use_cache=False)
    expected = [1 - float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in seen]
    found = influences(Checkpoint(tiny(family)), IDS, quiet)
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(0 <= value <= 2 for value in found)


def test_the_loss_without_a_block_is_that_of_transformers(family, tiny):
    found = losses_without(Checkpoint(tiny(family)), [0, 2], IDS, quiet)
    expected = {i: loss_without(tiny(family), {1, i}) for i in (0, 2)}
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def identity(tiny, tmp_path):
    """A model whose block 1 adds nothing."""
    lm = load(tiny())
    for layer in (lm.model.layers[1].self_attn.o_proj, lm.model.layers[1].mlp.down_proj):
        layer.weight.data.zero_()
    lm.save_pretrained(tmp_path / "identity")
    return tmp_path / "identity"


def test_an_identity_block_has_no_influence_and_is_not_missed(identity, run):
    assert influences(Checkpoint(identity), IDS, quiet)[1] == pytest.approx(0, abs=1e-12)
    whole = loss_without(identity, set())
    assert losses_without(Checkpoint(identity), [0, 1, 2], IDS, quiet)[1] == pytest.approx(whole)
    made = run(stage(run, score="influence"), identity)
    assert made.stats["kept_blocks"] == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(load(made.path)(IDS).logits, load(identity)(IDS).logits)


def test_greedy_takes_the_least_loss_at_every_step(run, tiny):
    made = run(stage(run, share=0.7), tiny())
    ids = run.calib.ids(Checkpoint(tiny()))
    kept, losses = [0, 1, 2], []
    for _ in range(2):
        found = losses_without(Checkpoint(tiny()), kept, ids, quiet)
        kept.remove(min(found, key=found.get))
        losses.append(min(found.values()))
    assert made.stats["kept_blocks"] == kept and made.stats["calib_loss"] == losses


def test_transformers_reads_the_shorter_model(family, run, tiny):
    """Also where blocks differ in their windows: they keep their own."""
    made = run(stage(run), tiny(family))
    kept, new = made.stats["kept_blocks"], Checkpoint(made.path)
    model.check_complete(new)
    lm = load(tiny(family))
    gone = [index for index in range(3) if index not in kept]
    for index in gone:
        blocks_of(lm)[index].forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        expected = lm(IDS, use_cache=False).logits
        torch.testing.assert_close(load(made.path)(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    old = Checkpoint(tiny(family)).decoder
    assert [b.window for b in new.decoder.blocks] == [old.blocks[i].window for i in kept]
    held = sum(torch.Size(shape).numel() for shape in new.shapes().values())
    assert made.stats["parameters"] == held


def test_blocks_keep_their_number_in_the_first_model(run, tiny):
    once = run(stage(run), tiny())
    twice = run(stage(run, share=0.5), once)
    assert set(twice.stats["kept_blocks"]) < set(once.stats["kept_blocks"])
    narrow = run(Width(multiple=8, heads=0.0, calib=run.calib), once)
    assert Checkpoint(narrow.path).config.source_blocks == once.stats["kept_blocks"]


def test_a_run_goes_on_with_fewer_blocks(run, tiny, tmp_path):
    source = HuggingFace(path=str(tiny("gemma3_text")))
    stages = {"structure": stage(run), "quant": Rtn(group_size=32), "export": Onnx()}
    steps = pipeline.check(stages, source, tmp_path)
    assert {n.split(".")[2] for n in steps[0].layers if "layers" in n} == {"0", "1"}
    artifacts = list(pipeline.run(steps, source.prepare(tmp_path)))
    assert artifacts[-1].stats["verified"]["parity"]


def test_the_onnx_model_agrees(run, tiny):
    made = run(stage(run), tiny("gpt2"))
    verify(run(Onnx(), made), made, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"share": 0.0}, "share must be above 0"), ({"score": "loss"}, "score must be one of")],
)
def test_bad_values_are_refused(changes, message, run):
    with pytest.raises(ValueError, match=message):
        stage(run, **changes)


def test_a_share_of_no_block_is_refused(run, tiny):
    with pytest.raises(ValueError, match=r"share=0\.2 of 3 blocks is less than one"):
        stage(run, share=0.2).resize(Checkpoint(tiny()).config)
