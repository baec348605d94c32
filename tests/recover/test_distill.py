"""Distillation: what it must lower and keep, and that what is merged is what was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.family import describe
from optpipe.linear import Form
from optpipe.prune.magnitude import Magnitude
from optpipe.recover.distill import Distill, Lesson, divergence
from optpipe.recover.train import batches, rate_at
from optpipe.recover.tune import Adapter
from optpipe.structure.depth import Depth
from optpipe.structure.width import Width
from optpipe.transform.rotate import Rotate
from optpipe.verify import verify_checkpoint


def stage(run, **changes):
    return Distill(**{"tokens": 1024, "batch": 2, "rank": 4, "calib": run.calib, **changes})


@torch.no_grad()
def kl(folder, baseline, ids):
    """By probabilities, of models read back from disk."""
    ours, theirs = (
        torch.softmax(model.load(Checkpoint(f))(ids).logits.double(), -1)
        for f in (folder, baseline)
    )
    return float((theirs * (theirs / ours).log()).sum(-1).mean())


def test_divergence_is_kl_at_the_temperature():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 7).double()
    p, q = torch.softmax(theirs / 2, -1), torch.softmax(ours / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(ours, theirs, 2.0).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_model_gets_closer_and_every_form_stays(family, mode, run, mixed, tiny):
    """The divergence that was reported is that of the files: adapters merged, weights rounded."""
    source = mixed(family)
    made = run(stage(run, mode=mode), source, tiny(family))
    ids = run.calib.ids(Checkpoint(tiny(family)))
    found = made.stats["divergence_before"], made.stats["divergence"]
    expected = [kl(a.path, tiny(family), ids[:1]) for a in (source, made)]
    assert found == pytest.approx(expected, rel=1e-3)
    before, after = (kl(a.path, tiny(family), ids[1:]) for a in (source, made))
    assert after < 0.97 * before  # of what it was trained on: random tokens teach nothing else
    old, new = Checkpoint(source.path), Checkpoint(made.path)
    verify_checkpoint(made, source, old.forms)
    for name in old.files:
        if name.endswith((".codes", ".mask", ".zeros")):
            assert torch.equal(old.get(name), new.get(name)), name


def test_an_adapter_starts_at_nothing_and_never_leaves_its_mask():
    torch.manual_seed(0)
    mask = torch.rand(6, 8) > 0.5
    weight = torch.randn(6, 8) * mask
    adapter = Adapter(weight, mask, rank=2, seed=0)
    assert torch.equal(adapter(weight), weight)
    adapter.b_RK.data.normal_()
    moved = adapter(weight)
    assert not moved[~mask].any() and moved[mask].ne(weight[mask]).all()
    assert torch.linalg.matrix_rank(Adapter(weight, None, 2, 0).a_KC) == 2


def test_the_hidden_states_are_compared_where_blocks_were_dropped(run, tiny):
    shorter = run(Depth(share=0.4, score="influence", calib=run.calib), tiny())
    kept, ids = shorter.stats["kept_blocks"], torch.randint(3, 288, (2, 20))
    student, teacher = (model.load(Checkpoint(f)) for f in (shorter.path, tiny()))
    ends = [*kept[1:], 3]
    plain = Lesson(teacher, student, ends, None, stage(run)).loss(ids)
    deep = Lesson(teacher, student, ends, None, stage(run, hidden=2.0)).loss(ids)
    seen = {}
    for lm, index in ((student, 0), (teacher, ends[0] - 1)):
        lm.model.layers[index].register_forward_hook(
            lambda _, args, out, lm=lm: seen.setdefault(lm, out)
        )
        with torch.no_grad():
            lm(ids, use_cache=False)
    error = (seen[student] - seen[teacher]).square().mean() / seen[teacher].var()
    torch.testing.assert_close(deep - plain, 2 * error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smaller", [Depth(share=0.4), Width(multiple=8, compensation="bias")])
def test_a_smaller_model_learns_and_stays_one_that_transformers_reads(smaller, run, tiny):
    from dataclasses import replace

    source = run(replace(smaller, calib=run.calib), tiny())
    made = run(stage(run, hidden=1.0), source, tiny())
    trained = run.calib.ids(Checkpoint(tiny()))[1:]
    assert kl(made.path, tiny(), trained) < 0.97 * kl(source.path, tiny(), trained)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(ids).logits
        ours = model.load(Checkpoint(made.path))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert describe(Checkpoint(made.path).config) == Checkpoint(source.path).decoder


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_rotated_model_learns_too(hidden, run, tiny):
    rotated = run(Magnitude(), run(Rotate(), tiny()))
    made = run(stage(run, hidden=hidden), rotated, tiny())
    trained = run.calib.ids(Checkpoint(tiny()))[1:]
    assert kl(made.path, tiny(), trained) < 0.97 * kl(rotated.path, tiny(), trained)


def test_a_budget_is_spent_on_all_samples_alike(run, tiny):
    steps = list(batches(5, 2, 10, seed=0))
    counts = torch.tensor([i for chosen in steps for i in chosen]).bincount()
    assert counts.tolist() == [4] * 5
    assert steps == list(batches(5, 2, 10, seed=0)) != list(batches(5, 2, 10, seed=1))
    source = run(Magnitude(targets=["*.q_proj"]), tiny())
    assert run(stage(run, tokens=100), source, tiny()).stats["trained_tokens"] == 128


def test_the_rate_rises_and_falls():
    rates = [rate_at(step, 100) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0 and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_layers_that_round_their_inputs_are_refused(run):
    layers = {"a": Form(rows=4, cols=4, bits=8, inputs="int8_token")}
    with pytest.raises(ValueError, match="'a' rounds its inputs"):
        stage(run).plan(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "dora"}, "mode must be one of .*, got 'dora'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"hidden": -1.0}, "hidden must be at least 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
    ],
)
def test_bad_values_are_refused(changes, message, run):
    with pytest.raises(ValueError, match=message):
        stage(run, **changes)
