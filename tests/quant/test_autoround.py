"""AutoRound through its library, block by block. Skipped where it is not installed."""

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


def theirs(stage, folder):
    """The whole model, as the library rounds it by itself."""
    auto_round = pytest.importorskip("auto_round")
    lm, ids_ST = model.load(Checkpoint(folder)), CALIB.ids(Checkpoint(folder))
    rows = [{"input_ids": i[None], "attention_mask": torch.ones_like(i[None])} for i in ids_ST]
    scheme = {"bits": stage.bits, "group_size": stage.group_size, "sym": False, "data_type": "int"}
    fields = {"amp": False, "enable_torch_compile": False, "device_map": "cpu", "seed": CALIB.seed}
    sizes = {"iters": stage.iterations, "nsamples": len(ids_ST), "seqlen": ids_ST.shape[1]}
    with torch.enable_grad():
        auto_round.AutoRound(
            lm, object(), scheme=scheme, dataset=rows, **fields, **sizes
        ).quantize()
    return lm


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_at_a_time_is_as_good_as_all_at_once(family, run, tiny, monkeypatch):
    """And better than rounding. Steps go by signs of gradients, so that the last bit of a loss
    decides between weights; those of the library are kept exactly."""
    pytest.importorskip("auto_round")
    stage, left = AutoRound(bits=3, group_size=32, iterations=20, calib=CALIB), []

    def noted(layer, form):
        left.append(layer.weight.clone())
        return read(layer, form)

    monkeypatch.setattr(autoround, "read", noted)
    made = Checkpoint(run(stage, tiny(family)).path)
    layers = [name for name, form in made.forms.items() if form.bits is not None]
    for name, weight in zip(layers, left, strict=True):
        ours = model.layer(name, made.forms, made).dequantize()
        torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-9)
    ids = CALIB.ids(made)
    rounded = run(Rtn(bits=3, group_size=32, symmetric=False), tiny(family)).path
    with torch.no_grad():
        exact, ours, plain = (
            model.load(Checkpoint(folder))(ids).logits
            for folder in (tiny(family), made.path, rounded)
        )
        whole = theirs(stage, tiny(family))(ids).logits
    lost, plain, whole = (float((x - exact).norm()) for x in (ours, plain, whole))
    assert lost < 1.1 * whole and lost < 0.9 * plain


def test_one_block_is_in_memory_while_it_is_rounded(run, tiny, monkeypatch):
    pytest.importorskip("auto_round")
    held, lms, load, tune = [], [], model.skeleton, AutoRound.tune

    def skeleton(*args):
        lms.append(load(*args))
        return lms[0]

    def tuned(self, *args):
        blocks = Checkpoint(tiny()).decoder.blocks
        norms = [lms[0].get_submodule(block.attn_norm).weight for block in blocks]
        held.append(sum(not weight.is_meta for weight in norms))
        return tune(self, *args)

    monkeypatch.setattr(model, "skeleton", skeleton)
    monkeypatch.setattr(AutoRound, "tune", tuned)
    run(AutoRound(group_size=32, iterations=1, calib=CALIB), tiny())
    assert held == [1, 1, 1]


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
