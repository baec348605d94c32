"""MXFP8 as a stage."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form
from optpipe.quant.mxfp8 import Mxfp8


def test_logits_are_those_of_rounded_weights_and_inputs(run, tiny):
    """Against transformers' own layers, with weights and inputs rounded from outside."""
    made = Checkpoint(run(Mxfp8(activations="block"), tiny("gpt2")).path)
    source = model.load(Checkpoint(tiny("gpt2")))

    def rounded(x):
        blocks = x.reshape(-1, 32).double()
        largest = blocks.abs().amax(-1, keepdim=True)
        step = torch.where(largest > 0, 2.0 ** (largest / 448).log2().ceil(), 1.0)
        near = (blocks / step).float().to(torch.float8_e4m3fn).double()
        return (near * step).reshape(x.shape).to(x.dtype)

    for name, form in made.forms.items():
        if form.inputs is not None:
            layer = source.get_submodule(name)
            layer.weight.copy_(rounded(layer.weight))
            layer.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.load(made)(ids).logits, source(ids).logits)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match=r"activations must be one of .* got 'token'"):
        Mxfp8(activations="token")
    with pytest.raises(ValueError, match=r"clip must be one of .* got 'hessian'"):
        Mxfp8(clip="hessian")
    with pytest.raises(ValueError, match="32 does not divide the 48 inputs"):
        Mxfp8().plan({"model.layers.0.odd": Form(rows=8, cols=48)})
