"""Rewriting a model block by block: what methods are shown, and what lands on disk."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.blockwise import rewrite, select
from optpipe.calibrate import Cross, Observation, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, dense
from optpipe.prune.magnitude import Magnitude


def source(folder):
    return Artifact(path=folder, format="hf", key="k")


def quiet(*_):
    pass


def test_changing_nothing_changes_nothing(family, tiny, tmp_path):
    planned = model.layers(Checkpoint(tiny(family)))
    rewrite(source(tiny(family)), tmp_path, planned, lambda _, layer, __: layer, quiet)
    ids = torch.randint(3, 288, (1, 30))
    before, after = (model.load(Checkpoint(p)) for p in (tiny(family), tmp_path))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert model.layers(Checkpoint(tmp_path)) == planned


def test_layers_see_what_the_compressed_model_feeds_them(family, tiny, tmp_path):
    """Block 1 must be shown inputs that went through the changed block 0, sliding windows and
    all: compare with hooks on the rewritten model run as a whole."""
    ids = torch.randint(3, 288, (3, 40), generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(tiny(family))
    planned = model.layers(checkpoint)
    seen = {}

    def halve_first_block(name, layer, statistic):
        if statistic is not None:
            seen[name] = statistic.sum_C
        if name in checkpoint.decoder.blocks[0].linears:
            return dense(layer.weight / 2, layer.bias)
        return layer

    wanted = frozenset((*checkpoint.decoder.blocks[1].linears, "lm_head"))
    observation = Observation(ids_ST=ids, wanted=wanted, statistic=Squares)
    rewrite(source(tiny(family)), tmp_path, planned, halve_first_block, quiet, observation)

    lm = model.load(Checkpoint(tmp_path))
    expected = {name: 0 for name in wanted}

    def hook(name):
        def add(_, args):
            expected[name] = expected[name] + args[0].double().square().sum((0, 1))

        return add

    for name in wanted:
        lm.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        lm(ids)
    assert seen.keys() == wanted
    for name in wanted:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-6)


def test_only_one_block_is_in_memory_at_a_time(tiny, tmp_path):
    checkpoint = Checkpoint(tiny())
    loaded = []
    lms = []
    skeleton = model.skeleton

    def spy(*args):
        lms.append(skeleton(*args))
        return lms[-1]

    def count(_, layer, __):
        weights = [b.mlp_out for b in checkpoint.decoder.blocks]
        loaded.append(sum(lms[0].get_submodule(n).weight.device.type != "meta" for n in weights))
        return layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "skeleton", spy)
        rewrite(source(tiny()), tmp_path, model.layers(checkpoint), count, quiet)
    assert max(loaded) == 1


def test_targets_are_patterns_and_must_match():
    layers = {n: Form(rows=1, cols=1) for n in ("a.0.q", "a.0.up", "a.1.q", "lm_head")}
    assert select(layers, ["*"]) == {"a.0.q", "a.0.up", "a.1.q"}
    assert select(layers, ["*.q", "a.0.*"], head=True) == {"a.0.q", "a.0.up", "a.1.q", "lm_head"}
    with pytest.raises(ValueError, match=r"'\*.down' matches none of 3 layers, such as a.0.q"):
        select(layers, ["*.q", "*.down"])


def test_buffers_of_old_files_are_left_behind_and_every_layer_keeps_its_type(run, tiny, tmp_path):
    """GPT-2 was published with a causal mask in every block; some models have float32 layers."""
    folder = Path(shutil.copytree(tiny("gpt2"), tmp_path / "old"))
    held = load_file(folder / "model.safetensors")
    held["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    half = {name: tensor.half() for name, tensor in held.items() if ".mlp." not in name}
    save_file({**held, **half}, folder / "model.safetensors", metadata={"format": "pt"})
    made = Checkpoint(run(Magnitude(targets=["*h.0.*"]), folder).path)
    assert "transformer.h.0.attn.bias" not in made.files
    types = {
        name: made.types[name] for name in made.files if ".h.0." in name and "mask" not in name
    }
    assert {kind for name, kind in types.items() if ".mlp." in name} == {"F32"}
    assert {kind for name, kind in types.items() if ".mlp." not in name} == {"F16"}


def test_a_comparison_shows_what_both_models_feed_a_layer(family, tiny, tmp_path):
    """The pairs of a layer in block 2, against hooks on both models run as a whole."""
    ids = torch.randint(3, 288, (3, 40), generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(tiny(family))
    name, seen = checkpoint.decoder.blocks[2].mlp_out, {}

    def halve_first_block(layer_name, layer, statistic):
        if statistic is not None:
            seen["cross"], seen["gram"] = statistic.cross_CC, statistic.mean_CC
        if layer_name in checkpoint.decoder.blocks[0].linears:
            return dense(layer.weight / 2, layer.bias)
        return layer

    observation = Observation(ids_ST=ids, wanted=frozenset({name}), statistic=Cross)
    planned = model.layers(checkpoint)
    rewrite(source(tiny(family)), tmp_path, planned, halve_first_block, quiet, observation)
    fed = []
    for folder in (tiny(family), tmp_path):
        lm, caught = model.load(Checkpoint(folder)), []
        lm.get_submodule(name).register_forward_pre_hook(lambda _, a, c=caught: c.append(a[0]))
        with torch.no_grad():
            lm(ids)
        fed.append(caught[0].reshape(-1, caught[0].shape[-1]).double())
    before, now = fed
    torch.testing.assert_close(seen["cross"], before.T @ now / len(now), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen["gram"], now.T @ now / len(now), rtol=1e-3, atol=1e-5)
