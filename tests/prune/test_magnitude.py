"""Magnitude pruning of a whole model."""

import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.linear import mask_of
from optpipe.prune.magnitude import Magnitude


def test_kept_weights_are_the_original_ones_bit_by_bit(run, tiny):
    made = run(Magnitude(sparsity=0.4, targets=["*mlp*"]), tiny())
    before, after = Checkpoint(tiny()), Checkpoint(made.path)
    for name in model.layers(after):
        old, new = (model.layer(name, c.forms or {}, c) for c in (before, after))
        mask = mask_of(new)
        if "mlp" not in name:
            assert mask is None and torch.equal(old.weight, new.weight)
            continue
        assert (~mask).sum(1).unique().tolist() == [round(0.4 * mask.shape[1])]
        assert torch.equal(new.weight, old.weight * mask)
        dropped, kept = old.weight.abs()[~mask], old.weight.abs()[mask]
        rows = torch.arange(mask.shape[0])[:, None].expand_as(mask)
        for row in range(mask.shape[0]):
            assert dropped[rows[~mask] == row].max() <= kept[rows[mask] == row].min()


def test_pruned_layers_take_the_room_of_what_is_left(run, tiny):
    full = run(Magnitude(sparsity=0.0, targets=["*mlp.up*"]), tiny())
    half = run(Magnitude(sparsity=0.5), tiny())
    checkpoint = Checkpoint(half.path)
    linear = sum(f.rows * f.cols for n, f in model.layers(checkpoint).items() if n != "lm_head")
    saved = full.size_bytes - half.size_bytes
    assert abs(saved - linear * (4 * 0.5 - 1 / 8)) < 0.1 * saved  # float32 weights, a bit of mask
