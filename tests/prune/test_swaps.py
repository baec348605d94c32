"""Swaps of dropped for kept weights: every one lowers the error, and the best comes first."""

import itertools

import pytest
import torch
from layers import KINDS, Layer

from optpipe.prune import swaps
from optpipe.prune.mask import follows, keep_mask
from optpipe.prune.swaps import swapped
from optpipe.prune.wanda import Wanda

SHARE = {"white": 1.0, "correlated": 0.5, "outliers": 1.0}
"""Of the error, what at most is left: white inputs leave hardly anything to win."""


def error(weight, keep, gram):
    gone = weight.double() * ~keep
    return ((gone @ gram) * gone).sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_every_swap_lowers_the_error_of_its_row_and_keeps_the_pattern(kind, pattern):
    layer, size = Layer(kind, 0), 4 if pattern == "2:4" else 64
    weight, gram = layer.weight, layer.mean_CC
    keep, lost = keep_mask(weight.abs(), 0.5, pattern), []
    for _ in range(60):
        lost.append(error(weight, keep, gram))
        after = swapped(weight, keep, gram, 1, size)
        moved = (after != keep).sum(1)
        assert follows(after, pattern) and set(moved.tolist()) <= {0, 2}
        assert (error(weight, after, gram)[moved > 0] < lost[-1][moved > 0]).all()
        keep = after
    assert lost[-1].sum() < SHARE[kind] * lost[0].sum()
    assert torch.equal(keep, swapped(weight, keep_mask(weight.abs(), 0.5, pattern), gram, 60, size))


@pytest.mark.parametrize("size", [4, 16])
def test_the_best_pair_is_found_and_none_is_left_in_the_end(size):
    layer = Layer("correlated", 1, rows=5, cols=16)
    weight, gram = layer.weight, layer.mean_CC
    start = keep_mask(weight.abs(), 0.5, "2:4")

    def others(row, keep):
        for p, u in itertools.product(range(16), repeat=2):
            if p // size == u // size and not keep[p] and keep[u]:
                changed = keep.clone()
                changed[p], changed[u] = True, False
                yield float(error(weight[row : row + 1], changed[None], gram))

    once, last = (swapped(weight, start, gram, most, size) for most in (1, 1000))
    for row in range(5):
        found, end = (float(error(weight, keep, gram)[row]) for keep in (once, last))
        best = min(others(row, start[row]))
        assert found == pytest.approx(min(best, float(error(weight, start, gram)[row])), rel=1e-9)
        assert end <= min(others(row, last[row])) * (1 + 1e-9)


def test_few_candidates_and_few_rows_at_a_time_still_lower_the_error(monkeypatch):
    layer = Layer("correlated", 2)
    keep = keep_mask(layer.weight.abs(), 0.5, "row")
    whole = swapped(layer.weight, keep, layer.mean_CC, 20, 64)
    monkeypatch.setattr(swaps, "ELEMENTS", 1)
    assert torch.equal(swapped(layer.weight, keep, layer.mean_CC, 20, 64), whole)
    monkeypatch.setattr(swaps, "CANDIDATES", 4)
    few = swapped(layer.weight, keep, layer.mean_CC, 20, 64)
    before, after = (error(layer.weight, k, layer.mean_CC) for k in (keep, few))
    assert (after <= before).all() and after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_with_swaps_changes_no_weight_and_loses_less(kind):
    layer = Layer(kind, 3)
    stages = Wanda(), Wanda(swaps=60), Wanda(swaps=60, refit=True)
    plain, ours, refitted = (stage.pruned(layer.weight, layer.gram) for stage in stages)
    assert torch.equal(ours[0], layer.weight * ours[1]) and torch.equal(ours[1], refitted[1])
    errors = [layer.error(weight, 0.01) for weight, _ in (refitted, ours, plain)]
    assert errors[0] < errors[1] < SHARE[kind] * errors[2]
    with pytest.raises(ValueError, match="swaps must be at least 0, got -1"):
        Wanda(swaps=-1)
