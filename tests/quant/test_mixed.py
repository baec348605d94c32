"""Mixed precision: within the budget, the best there is, and refused before any work."""

import itertools
from dataclasses import replace

import pytest
import torch

from optpipe import model
from optpipe.calibrate import Gram
from optpipe.checkpoint import Checkpoint
from optpipe.linear import PER_CHANNEL, Form
from optpipe.lowrank.svdllm import SvdLlm
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.gptq import Gptq
from optpipe.quant.mixed import Mixed
from optpipe.quant.rtn import Rtn

SOME = ["*layers.0.self_attn*", "*layers.0.mlp.up_proj", "*layers.2.mlp.down_proj"]


def curves(stage, folder):
    checkpoint = Checkpoint(folder)
    return dict(stage.curves(checkpoint, stage.plan(model.layers(checkpoint)), lambda *_: None))


def bits_of(artifact):
    forms = Checkpoint(artifact.path).forms
    return {name: form.bits for name, form in forms.items() if form.bits}


@pytest.mark.parametrize("budget", [3.6, 4.2, 5.5, 8.5])
def test_no_choice_within_the_budget_loses_less(budget, run, tiny):
    stage = Mixed(average_bits=budget, method="rtn", group_size=32, targets=SOME, calib=run.calib)
    options, made = curves(stage, tiny()), run(stage, tiny())
    forms = model.layers(Checkpoint(tiny()))
    weights = sum(forms[name].rows * forms[name].cols for name in options)

    def cost(choice):
        return sum(options[n][i].cost for n, i in zip(options, choice, strict=True))

    def loss(choice):
        return sum(options[n][i].loss for n, i in zip(options, choice, strict=True))

    choices = itertools.product(range(3), repeat=len(options))
    best = min(loss(c) for c in choices if cost(c) <= budget * weights)
    found = bits_of(made)
    assert found == made.stats["layer_bits"] and found.keys() == options.keys()
    ours = [[3, 4, 8].index(found[name]) for name in options]
    assert loss(ours) == pytest.approx(best, rel=1e-9)
    assert made.stats["bits_per_quantized_weight"] <= budget


def test_losses_are_those_of_the_layers_outputs(run, tiny):
    """Measured by hooks on the model as a whole, for a layer in its middle and for the head."""
    stage = Mixed(method="rtn", clip="minmax", group_size=32, head=True, calib=run.calib)
    name, folder = "model.layers.1.mlp.gate_proj", tiny()
    found = curves(stage, folder)
    lm, seen = model.load(Checkpoint(folder)), {name: [], "lm_head": []}
    for layer in seen:
        hook = seen[layer].append
        lm.get_submodule(layer).register_forward_pre_hook(lambda _, a, hook=hook: hook(a[0]))
    with torch.no_grad():
        lm(run.calib.ids(Checkpoint(folder)))
    for layer, inputs in seen.items():
        x = torch.cat(inputs).reshape(-1, 64).double()
        weight = lm.get_submodule(layer).weight
        for bits, option in zip((3, 4, 8), found[layer], strict=True):
            form = Form(rows=len(weight), cols=64, bits=bits, group_size=32)
            rounded = Rtn(bits=bits, group_size=32).quantize(
                lm.get_submodule(layer), weight, form, None
            )
            lost = x @ (rounded.dequantize() - weight).double().T
            whole = (x @ weight.double().T).square().sum()
            assert option.loss == pytest.approx(float(lost.square().sum() / whole), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_gptq_is_the_method_layer_by_layer(name, run, tiny):
    """A budget for eight bits everywhere gives what gptq gives, code by code."""
    made = run(Mixed(average_bits=8.5, group_size=32, calib=run.calib), tiny(name))
    same = run(Gptq(bits=8, group_size=32, calib=run.calib), tiny(name))
    ours, theirs = Checkpoint(made.path), Checkpoint(same.path)
    assert ours.forms == theirs.forms
    for tensor in theirs.files:
        assert torch.equal(ours.get(tensor), theirs.get(tensor)), tensor


def test_a_layer_whose_range_is_wasted_gets_more_bits(run, tiny, tmp_path):
    """The largest weight of each group is one that no input ever meets."""
    checkpoint, name = Checkpoint(tiny()), "model.layers.1.mlp.up_proj"
    lm = model.load(checkpoint)
    lm.get_submodule(checkpoint.decoder.blocks[1].mlp_norm).weight.data[::32] = 0
    lm.get_submodule(name).weight.data[:, ::32] *= 20
    lm.save_pretrained(tmp_path / "spoilt")
    stage = Mixed(average_bits=4.0, group_size=32, method="rtn", calib=run.calib)
    assert bits_of(run(stage, tmp_path / "spoilt"))[name] > bits_of(run(stage, tiny()))[name]


def test_masks_survive(run, tiny):
    pruned = run(Magnitude(sparsity=0.5), tiny())
    made = Checkpoint(run(Mixed(group_size=32, calib=run.calib), pruned).path)
    for name, form in made.forms.items():
        if form.bits:
            layer = model.layer(name, made.forms, made)
            assert form.pattern == "row" and not layer.dequantize()[~layer.mask].any()


def test_what_cannot_be_is_refused(tiny):
    layers = model.layers(Checkpoint(tiny()))
    with pytest.raises(ValueError, match=r"average_bits=3.2 is below 3.5, what 3 bits a weight"):
        Mixed(average_bits=3.2, group_size=32).plan(layers)
    with pytest.raises(ValueError, match=r"group_size=128 does not divide"):
        Mixed().plan(layers)
    for fields, message in (
        ({"bits": [4]}, r"two or more of \(2, 3, 4, 8\), got \[4\]"),
        ({"bits": [4, 5]}, r"got \[4, 5\]"),
        ({"method": "awq"}, r"method must be one of .* got 'awq'"),
        ({"clip": "best"}, r"clip must be one of .* got 'best'"),
        ({"group_size": 100}, r"group_size must be one of .* got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixed(**fields)


def test_a_budget_holds_for_every_rank_that_may_come():
    """Whole rows share a scale, so that small ranks cost more a weight: 16 bits for 4 of them."""
    layers = {name: Form(rows=r, cols=c) for name, (r, c) in {"a": (64, 96), "b": (96, 8)}.items()}
    open_ranks = SvdLlm(rank_multiple=4, targets=["a"]).plan(layers)
    most = open_ranks["a.left"].cols

    def least(rank):
        scales, weights = rank + 64 + 96, rank * (64 + 96) + 96 * 8
        return 3 + 16 * scales / weights

    worst = max(least(rank) for rank in range(4, most + 1, 4))
    assert worst > least(most) + 0.1
    stage = Mixed(group_size=PER_CHANNEL, average_bits=worst + 1e-6)
    stage.plan(open_ranks)
    with pytest.raises(ValueError, match=r"is below .* at the worst of the ranks that are still"):
        replace(stage, average_bits=worst - 1e-6).plan(open_ranks)


def test_a_layer_without_output_loses_nothing():
    gram = Gram(64)
    gram.add(torch.zeros(5, 64))
    form = Form(rows=4, cols=64, bits=3, group_size=32)
    assert Mixed(group_size=32).loss(torch.nn.Linear(64, 4, bias=False), form, gram) == 0.0
