"""How sparsity is shared out over layers: the budget holds, and outliers and costs decide."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.checkpoint import Checkpoint
from optpipe.prune.admm import Admm
from optpipe.prune.allocated import SPREAD, outliers, owl
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


@pytest.mark.parametrize("method", [Wanda, SparseGpt, Admm])
def test_layers_differ_and_together_drop_what_was_asked_for(method, run, tiny):
    targets = ["*.mlp.*"]
    stage = method(sparsity=0.4, allocation="owl", targets=targets, calib=run.calib)
    made = run(stage, tiny())
    shares = made.stats["sparsities"]
    assert len(set(shares.values())) > 1 and len(shares) == 9
    layers = model.layers(Checkpoint(tiny()))
    total = sum(f.rows * f.cols for f in layers.values())
    chosen = sum(layers[name].rows * layers[name].cols for name in shares)
    assert made.stats["sparsity"] * total == pytest.approx(0.4 * chosen, rel=0.02)
    facts = verify(made, Artifact(path=tiny(), format="hf", key="k"), stage.plan(layers))
    assert facts["sparsity"] == pytest.approx(made.stats["sparsity"], rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "best"}, r"allocation must be one of .* got 'best'"),
        ({"allocation": "owl", "pattern": "2:4"}, "pattern 2:4 fixes the sparsity"),
        ({"allocation": "owl", "sparsity": 0.9}, r"from 0\.16 to 0\.84, got 0\.9"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Wanda(**fields)
