"""AutoRound through its library: our copy is its model. Skipped where it is not installed."""

import pytest
import torch

from optpipe import model
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.linear import Form
from optpipe.prune.magnitude import Magnitude
from optpipe.quant import autoround
from optpipe.quant.autoround import AutoRound, read
from optpipe.quant.rtn import Rtn

CALIB = Calib(source="random", samples=4, tokens=32)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_weights_are_theirs_and_better_than_rounding(family, run, tiny):
    pytest.importorskip("auto_round")
    stage = AutoRound(bits=3, group_size=32, iterations=20, calib=CALIB)
    made, lm = Checkpoint(run(stage, tiny(family)).path), model.load(Checkpoint(tiny(family)))
    stage.tune(lm, CALIB.ids(made))
    for name, form in made.forms.items():
        if form.bits is not None:
            ours = model.layer(name, made.forms, made).dequantize()
            torch.testing.assert_close(ours, lm.get_submodule(name).weight, rtol=1e-6, atol=1e-9)
    ids = CALIB.ids(made)
    rounded = run(Rtn(bits=3, group_size=32, symmetric=False), tiny(family)).path
    with torch.no_grad():
        exact, ours, plain = (
            model.load(Checkpoint(folder))(ids).logits
            for folder in (tiny(family), made.path, rounded)
        )
    assert (ours - exact).norm() < (plain - exact).norm()


def test_a_layer_of_theirs_is_read_to_the_last_code():
    form = Form(rows=4, cols=64, bits=4, group_size=32, symmetric=False)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (4, 64), generator=generator)
    layer = torch.nn.Linear(64, 4)
    layer.scale = (torch.rand(4, 2, generator=generator) * 1e-2 + 1e-3).half()
    layer.zp = torch.randint(16, (4, 2), generator=generator).float()
    wide = [t.float().repeat_interleave(32, 1) for t in (layer.scale, layer.zp)]
    layer.weight.data = (codes - wide[1]) * wide[0]
    made = read(layer, form)
    assert torch.equal(made.codes, codes.to(torch.uint8))
    torch.testing.assert_close(made.dequantize(), layer.weight.data, rtol=1e-6, atol=0)
    assert torch.equal(made.bias, layer.bias)


def test_without_the_library_it_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr(autoround, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'optpipe\[autoround\]'"):
        AutoRound(calib=CALIB).inputs(Checkpoint(tiny()))


def test_what_cannot_be_is_refused(tiny):
    layers = model.layers(Checkpoint(tiny()))
    with pytest.raises(ValueError, match=r"is pruned \(row\), and AutoRound keeps no zeros"):
        AutoRound(group_size=32).plan(Magnitude().plan(layers))
    with pytest.raises(ValueError, match="is quantized already"):
        AutoRound(group_size=32).plan(Rtn(group_size=32).plan(layers))
    with pytest.raises(ValueError, match="does not divide the 64 inputs"):
        AutoRound().plan(layers)
    for fields in ({"bits": 5}, {"group_size": 7}, {"iterations": 0}):
        with pytest.raises(ValueError, match=f"got {next(iter(fields.values()))}"):
            AutoRound(**fields)
