"""Round to nearest on whole models."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Quantized
from optpipe.quant.rtn import Rtn


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 32), (4, -1), (4, 32), (8, -1)])
def test_error_shrinks_with_bits_and_the_file_with_it(run, tiny, bits, group_size):
    made = run(Rtn(bits=bits, group_size=group_size), tiny())
    checkpoint = Checkpoint(made.path)
    before = Checkpoint(tiny())
    stored = 0.0
    for name, form in checkpoint.forms.items():
        if name == "lm_head":
            continue
        layer = model.layer(name, checkpoint.forms, checkpoint)
        assert isinstance(layer, Quantized) and form.bits == bits
        old = model.layer(name, {}, before).weight
        relative = (layer.dequantize() - old).norm() / old.norm()
        assert relative < {2: 0.9, 3: 0.35, 4: 0.2, 8: 0.01}[bits]
        stored += form.stored_bits() / 8
        parts = (checkpoint.get(f"{name}.{part}") for part in ("codes", "scales"))
        assert sum(t.numel() * t.element_size() for t in parts) == form.stored_bits() / 8
    assert made.stats["bits_per_quantized_weight"] == pytest.approx(
        bits + (16 / 32 if group_size == 32 else 16 / 64), rel=0.06
    )


def test_eight_bits_barely_change_the_logits(run, tiny):
    made = run(Rtn(bits=8, group_size=-1, head=True), tiny())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = (model.load(Checkpoint(p))(ids).logits for p in (made.path, tiny()))
    assert (ours - theirs).norm() / theirs.norm() < 0.02
    assert Checkpoint(made.path).forms["lm_head"].bits == 8


def test_a_tied_head_gets_codes_of_its_own(run, tiny):
    made = Checkpoint(run(Rtn(bits=8, group_size=-1, head=True), tiny("gpt2")).path)
    lm = model.load(made)
    assert isinstance(lm.lm_head, Quantized)
    embedding = Checkpoint(tiny("gpt2")).get("transformer.wte.weight")
    assert torch.equal(lm.transformer.wte.weight, embedding)


def test_quantizing_twice_is_refused(run, tiny):
    layers = Rtn(group_size=32).plan(model.layers(Checkpoint(tiny())))
    with pytest.raises(ValueError, match="quantized already, to 4 bits"):
        Rtn(group_size=32).plan(layers)


def test_groups_that_do_not_fit_are_refused_with_those_that_do(tiny):
    with pytest.raises(ValueError, match=r"group_size=128 .* 64 inputs .* \[-1, 16, 32, 64\]"):
        Rtn(group_size=128).plan(model.layers(Checkpoint(tiny())))
