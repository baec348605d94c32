"""Distillation: what it must lower and keep, and that what is merged is what was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.family import describe
from optpipe.linear import Form, weight_of
from optpipe.prune.magnitude import Magnitude
from optpipe.recover import lesson
from optpipe.recover.distill import Distill
from optpipe.recover.lesson import divergence
from optpipe.recover.train import batches, rate_at
from optpipe.recover.tune import Adapter, Tuning
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


def test_the_model_gets_closer_and_every_form_stays(family, run, mixed, tiny):
    gets_closer(family, "full", run, mixed, tiny)


def test_adapters_get_it_closer_too(run, mixed, tiny):
    gets_closer("llama", "lora", run, mixed, tiny)


def gets_closer(family, mode, run, mixed, tiny):
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


def whole_steps(stage, source, original, step):
    """The steps of a stage by autograd through both whole models; what the student has become."""
    checkpoint = Checkpoint(source.path)
    student, teacher = model.load(checkpoint), model.load(Checkpoint(original))
    ids = stage.calib.ids(checkpoint)[1:]
    kept = source.stats.get("kept_blocks", [0, 1, 2])
    take = step(student, checkpoint)
    steps = stage.steps(ids.shape[1])
    for number, chosen in enumerate(batches(len(ids), stage.batch, steps, 0)):
        ours, theirs = (lm(ids[chosen], output_hidden_states=True) for lm in (student, teacher))
        loss = divergence(ours.logits, theirs.logits, stage.temperature)
        for index, end in enumerate(kept[1:], 1):
            target = theirs.hidden_states[end]
            error = (ours.hidden_states[index] - target).square().mean() / target.var()
            loss = loss + stage.hidden * error / (len(kept) - 1)
        loss.backward()
        take(stage.rate * rate_at(number, steps))
    return student


def close(made, expected, source):
    """Of what every layer and norm has moved, at most a thousandth is an error."""
    ours, before = (model.load(Checkpoint(a.path)) for a in (made, source))
    moved = 0
    for block in Checkpoint(source.path).decoder.blocks:
        for name, _ in model.block_linears(expected, block):
            new, wanted, old = (
                weight_of(lm.get_submodule(name)) for lm in (ours, expected, before)
            )
            assert (new - wanted).norm() <= 1e-3 * (wanted - old).norm() + 1e-6, name
            moved += not torch.equal(new, old)
    for (name, new), wanted, old in zip(
        ours.named_parameters(), expected.parameters(), before.parameters(), strict=True
    ):
        if new.dim() == 1 and not name.endswith(".bias"):  # of k, it has no gradient but rounding
            assert (new - wanted).norm() <= 1e-3 * (wanted - old).norm() + 1e-6, name
    return moved


def test_steps_are_those_of_adam_on_the_whole_model(run, tiny):
    """Hidden states are compared where blocks were dropped."""
    source = run(Depth(share=0.4, score="influence", calib=run.calib), tiny())
    ours = stage(run, hidden=2.0, temperature=2.0, tokens=512)

    def adam(lm, _):
        free = [p for n, p in lm.named_parameters() if n.startswith(("model.layers", "model.norm"))]
        groups = [
            {"params": [p.requires_grad_()], "lr": float(p.detach().square().mean().sqrt())}
            for p in free
        ]
        rates, optimizer = [g["lr"] for g in groups], torch.optim.Adam(groups, betas=(0.9, 0.95))

        def take(rate):
            for group, size in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * size
            optimizer.step()
            optimizer.zero_grad()

        return take

    expected = whole_steps(ours, source, tiny(), adam)
    assert close(run(ours, source, tiny()), expected, source) == 14


@pytest.mark.parametrize(("family", "mode"), [("gemma2", "full"), ("gpt2", "lora")])
def test_steps_are_those_of_whole_models_in_every_form(family, mode, run, mixed, tiny, monkeypatch):
    monkeypatch.setattr(lesson, "LOGITS", 20 * 288)  # pieces of 20 of 64 tokens
    source = mixed(family)
    ours = stage(run, mode=mode, tokens=256)
    tunings = []

    def tuned(lm, checkpoint):
        tuning = Tuning(lm, checkpoint, ours.rank if mode == "lora" else 0)
        for block in checkpoint.decoder.blocks:
            tuning.add_block(block)
        norm = checkpoint.decoder.final_norm
        for name, _ in lm.get_submodule(norm).named_parameters(prefix=norm):
            tuning.add_tensor(name)
        tuning.start()
        tunings.append(tuning)
        return tuning.step

    expected = whole_steps(ours, source, tiny(family), tuned)
    tunings[0].settle()
    assert close(run(ours, source, tiny(family)), expected, source) > 10


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
