"""How sparsity is shared out over layers: the budget holds, and outliers and costs decide."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.checkpoint import Checkpoint
from optpipe.prune.admm import Admm
from optpipe.prune.allocated import SPREAD, outliers, owl
from optpipe.prune.probe import losses, spread
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.prune.wanda import Wanda
from optpipe.verify import verify


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 99)), min_size=2, max_size=9),
       st.floats(0.2, 0.8))  # fmt: skip
def test_owl_drops_so_much_in_all_and_least_where_outliers_are(blocks, sparsity):
    shares = {str(i): share / 1000 for i, (share, _) in enumerate(blocks)}
    sizes = {str(i): size for i, (_, size) in enumerate(blocks)}
    found = owl(shares, sizes, sparsity)
    dropped = sum(found[name] * sizes[name] for name in found)
    assert dropped == pytest.approx(sparsity * sum(sizes.values()), rel=1e-9)
    spread = max(found.values()) - min(found.values())
    assert spread == pytest.approx(2 * SPREAD if len(set(shares.values())) > 1 else 0, abs=1e-9)
    ordered = sorted(found, key=shares.get)
    assert all(found[a] >= found[b] - 1e-12 for a, b in pairwise(ordered))


def test_outliers_are_scores_above_five_times_the_mean():
    score = torch.ones(1000)
    score[:7] = 100.0  # mean 1.693
    assert outliers(score) == 0.007
    assert outliers(torch.ones(10)) == 0


@pytest.mark.parametrize(
    ("method", "allocation"),
    [(SparseGpt, "owl"), (Admm, "owl"), (SparseGpt, "allocator")],
)
def test_layers_differ_and_together_drop_what_was_asked_for(method, allocation, run, tiny):
    targets = ["*.mlp.*"]
    stage = method(sparsity=0.4, allocation=allocation, targets=targets, calib=run.calib)
    made = run(stage, tiny())
    shares = made.stats["sparsities"]
    assert len(set(shares.values())) > 1 and len(shares) == 9
    layers = model.layers(Checkpoint(tiny()))
    total = sum(f.rows * f.cols for f in layers.values())
    chosen = sum(layers[name].rows * layers[name].cols for name in shares)
    assert made.stats["sparsity"] * total == pytest.approx(0.4 * chosen, rel=0.02)
    facts = verify(made, Artifact(path=tiny(), format="hf", key="k"), stage.plan(layers))
    assert facts["sparsity"] == pytest.approx(made.stats["sparsity"], rel=1e-3)


def test_owl_looks_at_what_the_model_feeds_its_layers(run, tiny):
    """Wanda's scores of all layers of a block, by hooks on the model as a whole."""
    stage = Wanda(sparsity=0.4, allocation="owl", targets=["*.mlp.*"], calib=run.calib)
    found = run(stage, tiny()).stats["sparsities"]
    lm, squares = model.load(Checkpoint(tiny())), {}
    for name in found:

        def add(_, args, name=name):
            squares[name] = squares.get(name, 0) + args[0].square().sum((0, 1))

        lm.get_submodule(name).register_forward_pre_hook(add)
    with torch.no_grad():
        lm(run.calib.ids(Checkpoint(tiny())))
    scores = {n: lm.get_submodule(n).weight.abs() * squares[n].sqrt() for n in found}
    blocks = {n: n.partition(".mlp")[0] for n in found}
    shares = {
        block: outliers(torch.cat([scores[n].flatten() for n in found if blocks[n] == block]))
        for block in blocks.values()
    }
    assert len(set(shares.values())) == 3
    expected = owl(shares, dict.fromkeys(shares, 1), 0.4)
    assert found == pytest.approx({n: expected[blocks[n]] for n in found}, abs=2e-3)


def test_losses_are_those_of_whole_models_with_one_block_at_another_sparsity(run, tiny):
    stage = Wanda(sparsity=0.5, calib=run.calib)
    checkpoint, ids = Checkpoint(tiny()), run.calib.ids(Checkpoint(tiny()))
    chosen = frozenset(model.layers(checkpoint)) - {"lm_head"}
    found = losses(stage, checkpoint, chosen, [0.75], lambda *_: None)
    assert [sorted(options) for options in found.values()] == [[0.5, 0.75]] * 3

    def loss(lm):
        with torch.no_grad():
            logits = lm(ids).logits[:, :-1].double()
        return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    uniform = run(stage, tiny()).path
    for index, options in enumerate(found.values()):
        odd = run(_Odd(odd=f"layers.{index}.", calib=run.calib), tiny()).path
        lm, other = (model.load(Checkpoint(folder)) for folder in (uniform, odd))
        assert options[0.5] == pytest.approx(loss(lm), rel=1e-6)
        lm.model.layers[index] = other.model.layers[index]
        assert options[0.75] == pytest.approx(loss(lm), rel=1e-6)
        assert abs(options[0.75] - options[0.5]) > 1e-4


@dataclass(frozen=True, kw_only=True)
class _Odd(Wanda):
    """Wanda with one block at 0.75, which is fed what the blocks before it give at 0.5."""

    odd: str

    def sparsities(self, checkpoint, layers, chosen, progress):
        found = super().sparsities(checkpoint, layers, chosen, progress)
        return {name: 0.75 if self.odd in name else share for name, share in found.items()}


@given(st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=5, max_size=5, unique=True),
                          st.integers(1, 9)), min_size=1, max_size=5), st.booleans())  # fmt: skip
def test_blocks_of_any_size_drop_so_much_in_all_and_lose_no_more_than_alike(blocks, alike):
    shares = [0.42, 0.46, 0.5, 0.54, 0.58]
    found = {
        str(i): dict(zip(shares, sorted(lost), strict=True)) for i, (lost, _) in enumerate(blocks)
    }
    sizes = {str(i): 7 if alike else size for i, (_, size) in enumerate(blocks)}
    taken = spread(found, sizes, 0.5)
    dropped = sum(taken[name] * sizes[name] for name in sizes)
    assert dropped == pytest.approx(0.5 * sum(sizes.values()), rel=1e-9)
    if alike:  # nothing is left over, so that every share is one of those
        lost = sum(of_block[round(taken[name], 9)] for name, of_block in found.items())
        assert lost <= sum(of_block[0.5] for of_block in found.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "best"}, r"allocation must be one of .* got 'best'"),
        ({"allocation": "owl", "pattern": "2:4"}, "pattern 2:4 fixes the sparsity"),
        ({"allocation": "allocator", "pattern": "2:4"}, "pattern 2:4 fixes the sparsity"),
        ({"allocation": "owl", "sparsity": 0.9}, r"from 0\.16 to 0\.84, got 0\.9"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Wanda(**fields)
