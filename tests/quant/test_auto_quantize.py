"""auto_quantize: its choices are within the budget, and every layer is what its preset makes."""

import pytest
import torch

from optpipe import bounds, model, pipeline
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.trtllm import Trtllm
from optpipe.export.vllm import Vllm
from optpipe.lowrank.svd import Svd
from optpipe.quant.auto_quantize import AutoQuantize
from optpipe.quant.modelopt import Modelopt
from optpipe.quant.rtn import Rtn
from optpipe.source import HuggingFace
from optpipe.stage import Stage

CALIB = Calib(source="random", samples=4, tokens=32)
FIELDS = {"group_size": 32, "calib": CALIB}


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_choices_are_within_the_budget_and_as_planned(method, run, tiny):
    stage = AutoQuantize(effective_bits=6, method=method, **FIELDS)
    made = run(stage, tiny())
    checkpoint, formats = Checkpoint(made.path), made.stats["layer_formats"]
    assert bounds.departure(checkpoint.forms, stage.plan(model.layers(Checkpoint(tiny())))) is None
    bits = weights = 0
    for name, form in checkpoint.forms.items():
        if name in formats:
            expected = {"int4_rtn": (4, "int"), "fp8": (8, "fp8"), "none": (None, "int")}
            assert (form.bits, form.number) == expected[formats[name]]
            bits += (form.bits or 16) * form.rows * form.cols
            weights += form.rows * form.cols
    assert bits / weights == pytest.approx(made.stats["effective_bits"]) and bits / weights <= 6
    assert len(set(formats.values())) > 1  # a budget between the two formats is no uniform choice
    for block in checkpoint.decoder.blocks:
        for together in (block.qkv, block.mlp_in):
            assert len({formats[name] for name in together}) == 1


def test_every_layer_is_what_its_preset_makes(run, tiny, monkeypatch):
    """Only the rows that make what o_proj and down_proj read are divided for these."""
    monkeypatch.setattr(AutoQuantize, "search", lambda *_: (chosen, 6.0))
    block = Checkpoint(tiny()).decoder.blocks[1]
    chosen = dict.fromkeys(block.qkv, "int4_rtn") | {
        block.attn_out: "int4_awq",
        block.mlp_out: "fp8",
    }
    mixed = Checkpoint(run(AutoQuantize(**FIELDS), tiny()).path)
    for preset in ("int4_rtn", "int4_awq", "fp8"):
        whole = Checkpoint(run(Modelopt(preset=preset, **FIELDS), tiny()).path)
        for name in chosen:
            if chosen[name] == preset and name != block.qkv[-1]:
                ours, theirs = (model.layer(name, c.forms, c) for c in (mixed, whole))
                assert torch.equal(ours.codes, theirs.codes)
                assert torch.equal(ours.scales, theirs.scales)
    for name, form in mixed.forms.items():
        assert name in chosen or form.bits is None
    ids = torch.arange(20)[None] + 3
    with torch.no_grad():
        exact, ours = (model.load(Checkpoint(p))(ids).logits for p in (tiny(), mixed.path))
    assert (ours - exact).norm() < 0.2 * exact.norm()


class Wide(Stage):
    """Takes nothing below 8 bits."""

    def plan(self, layers):
        if narrow := [name for name, form in layers.items() if form.bits == 4]:
            raise ValueError(f"'{narrow[0]}' has 4 bits")
        return layers

    def run(self, source, out, progress):
        raise NotImplementedError


def test_what_follows_must_take_every_choice(tiny, tmp_path):
    source, wide = (
        HuggingFace(path=str(tiny())),
        AutoQuantize(formats=["int8_smoothquant", "fp8"], effective_bits=8, **FIELDS),
    )
    layers = model.layers(Checkpoint(tiny()))
    steps = pipeline.check({"quant": wide, "next": Wide()}, source, tmp_path)
    stored = [form.stored_bits() for form in steps[0].layers.values()]
    assert stored == [form.stored_bits() for form in layers.values()]  # any may stay as it is
    with pytest.raises(InputError, match=r"stage 'next': 'model.layers.0.*' has 4 bits"):
        pipeline.check({"quant": AutoQuantize(**FIELDS), "next": Wide()}, source, tmp_path)
    mixed = AutoQuantize(**FIELDS)
    with pytest.raises(InputError, match=r"stage 'next': one checkpoint has one format: .*mlp"):
        pipeline.check({"quant": mixed, "next": Trtllm()}, source, tmp_path)
    assert pipeline.check({"quant": mixed, "next": Vllm()}, source, tmp_path)
    with pytest.raises(InputError, match=r"stage 'again': layer .* is quantized already"):
        pipeline.check({"quant": wide, "again": Rtn(group_size=32)}, source, tmp_path)


def test_what_cannot_be_is_refused(run, tiny):
    for fields, message in (
        ({"formats": ["int3"]}, r"formats must be some of .* got \['int3'\]"),
        ({"method": "hessian"}, "got 'hessian'"),
        ({"effective_bits": 3.9}, r"effective_bits must be from 4, .*, to 16, got 3\.9"),
        ({"score_samples": 0}, "got 0"),
        ({"group_size": -1}, "got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoQuantize(**fields)
    factored = run(Svd(rank_multiple=8, targets=["*up_proj"]), tiny())
    with pytest.raises(ValueError, match=r"up_proj.right' is a factor"):
        AutoQuantize(**FIELDS).plan(Checkpoint(factored.path).forms)
    with pytest.raises(InputError, match="come from a nonlinear activation"):
        AutoQuantize(formats=["int4_awq"], **FIELDS).inputs(Checkpoint(tiny("gpt2")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'nvfp4': modelopt runs it on CUDA only"):
            AutoQuantize(formats=["nvfp4"], **FIELDS).inputs(Checkpoint(tiny()))
