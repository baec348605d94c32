"""Factors folded through every family leave its logits alone, in float64 to rounding."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.fold import absorb, divide, folds, shared, values
from optpipe.linear import LowRank

TOLERANCE = {"gemma2": 1e-5, "gemma3_text": 1e-5}  # their norms multiply in float32, whatever comes
IDS = torch.randint(3, 288, (2, 30), generator=torch.Generator().manual_seed(0))


def double(folder):
    return model.load(Checkpoint(folder), torch.float64).double()


@torch.no_grad()
def test_factors_on_every_input_change_nothing(family, tiny):
    decoder = Checkpoint(tiny(family)).decoder
    lm = double(tiny(family))
    before, folded = lm(IDS).logits, 0
    for block in decoder.blocks:
        for fold in folds(decoder, block):
            size = lm.get_submodule(fold.readers[0]).in_features
            factor = torch.rand(size, generator=torch.Generator().manual_seed(1)).double() * 9 + 0.1
            old = lm.get_submodule(fold.readers[-1]).weight
            used = divide(lm, decoder, fold, shared(fold, factor), torch.float64)
            new = lm.get_submodule(fold.readers[-1]).weight
            torch.testing.assert_close(new, old * used, rtol=1e-12, atol=0)
            assert (used - 1).abs().max() > 0.3
            folded += 1
    after = lm(IDS).logits
    assert folded == 3 * (4 if decoder.gated else 3)
    assert (after - before).abs().max() < TOLERANCE.get(family, 1e-9) * before.std()


@torch.no_grad()
def test_the_weight_of_every_norm_moves_into_its_readers(family, tiny):
    decoder = Checkpoint(tiny(family)).decoder
    lm = double(tiny(family))
    before = lm(IDS).logits
    for block in decoder.blocks:
        for norm, readers in ((block.attn_norm, block.qkv), (block.mlp_norm, block.mlp_in)):
            absorb(lm, decoder, norm, readers)
            assert torch.equal(
                lm.get_submodule(norm).weight + decoder.norm_offset, torch.ones(64).double()
            )
    assert (lm(IDS).logits - before).abs().max() < TOLERANCE.get(family, 1e-9) * before.std()


def test_factors_of_shared_heads_are_their_geometric_mean(tiny):
    decoder = Checkpoint(tiny("llama")).decoder  # 4 heads, 2 of keys and values
    fold = values(decoder, decoder.blocks[0])
    factor = torch.ones(64)
    factor[0], factor[16] = 8.0, 2.0  # the same channel of two heads that share their values
    expected = torch.ones(64)
    expected[[0, 16]] = 4.0
    torch.testing.assert_close(shared(fold, factor), expected)
    torch.testing.assert_close(shared(fold, expected), expected)  # nothing left to average


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_readers_follow_what_rounding_made_of_the_norm(dtype, tiny):
    """The product of norm and readers is what it was, though the norm is kept in half precision."""
    for family in ("llama", "gemma2"):
        decoder = Checkpoint(tiny(family)).decoder
        lm = double(tiny(family))
        fold = folds(decoder, decoder.blocks[1])[2]
        norm = lm.get_submodule(fold.writer)
        norm.weight.data = norm.weight.to(dtype).double()
        reader = lm.get_submodule(fold.readers[0])
        before = (norm.weight + decoder.norm_offset) * reader.weight
        factor = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
        divide(lm, decoder, fold, factor, dtype)
        assert torch.equal(norm.weight, norm.weight.to(dtype).double())
        after = (norm.weight + decoder.norm_offset) * lm.get_submodule(fold.readers[0]).weight
        torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


@torch.no_grad()
def test_a_norm_weight_of_zero_takes_no_factor(tiny):
    decoder = Checkpoint(tiny("llama")).decoder
    lm = double(tiny("llama"))
    fold = folds(decoder, decoder.blocks[0])[0]
    lm.get_submodule(fold.writer).weight.data[3] = 0
    before = lm(IDS).logits
    used = divide(lm, decoder, fold, torch.full((64,), 3.0), torch.float64)
    assert used[3] == 1 and used[4] == 3
    assert (lm(IDS).logits - before).abs().max() < 1e-9 * before.std()


@torch.no_grad()
def test_factors_go_through_layers_of_low_rank(tiny):
    decoder = Checkpoint(tiny("llama")).decoder
    lm = double(tiny("llama"))
    for name in decoder.blocks[0].linears:
        layer = lm.get_submodule(name)
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        right, left = (torch.nn.Linear(*t.shape[::-1], bias=False).double() for t in (v, u))
        right.weight.data, left.weight.data = v, u * s
        lm.set_submodule(name, LowRank(right, left))
    before = lm(IDS).logits
    for fold in folds(decoder, decoder.blocks[0]):
        size = lm.get_submodule(fold.readers[0]).right.in_features
        factor = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.1
        divide(lm, decoder, fold, shared(fold, factor), torch.float64)
    assert (lm(IDS).logits - before).abs().max() < 1e-9 * before.std()
