"""int4 weights with fp8 inputs as a stage."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.quant.rtn import Rtn
from optpipe.quant.w4a8 import W4a8


@pytest.mark.parametrize("activations", ["tensor", "token"])
def test_weights_are_those_of_int4_and_inputs_are_rounded_to_fp8(activations, run, tiny):
    stage = W4a8(group_size=32, activations=activations, method="rtn", clip="mse", calib=run.calib)
    ours = Checkpoint(run(stage, tiny()).path)
    plain = Checkpoint(run(Rtn(group_size=32, clip="mse"), tiny()).path)
    name = "model.layers.1.mlp.up_proj"
    mine, other = (model.layer(name, c.forms, c) for c in (ours, plain))
    assert torch.equal(mine.dequantize(), other.dequantize())
    x = torch.randn(5, 64)
    peak = x.abs().amax(-1, True)
    scale = mine.input_scale.float() if activations == "tensor" else peak / 448
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(mine(x), rounded @ other.dequantize().T)


def test_without_any_look_at_data_none_is_asked_for(tiny, run):
    plain = {"activations": "token", "method": "rtn", "calib": run.calib}
    assert W4a8(clip="mse", **plain).inputs(Checkpoint(tiny())) is None
    for fields in ({"clip": "hessian"}, {"method": "gptq"}, {"activations": "tensor"}):
        stage = W4a8(**{"clip": "mse", **plain, **fields})
        assert stage.inputs(Checkpoint(tiny())) is not None


def test_bad_fields_are_refused():
    wrong = {"group_size": 100, "activations": "none", "clip": "max", "method": "awq"}
    for fields in ({name: value} for name, value in wrong.items()):
        name, value = next(iter(fields.items()))
        with pytest.raises(ValueError, match=f"{name} must be one of .* got '?{value}"):
            W4a8(**fields)
