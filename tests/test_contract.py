"""What every compression method must do, for every YAML that names one: a new one is tested by
existing."""

import hashlib
import importlib
from dataclasses import MISSING, FrozenInstanceError, fields

import pytest
import torch
from omegaconf import OmegaConf

from optpipe import model
from optpipe.bounds import departure
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.config import build, data_dir
from optpipe.errors import InputError
from optpipe.linear import mask_of, weight_of
from optpipe.lowrank.svdllm import SvdLlm
from optpipe.prune.magnitude import Magnitude
from optpipe.prune.wanda import Wanda
from optpipe.quant.gptq import Gptq

METHODS = [
    p
    for g in ("structure", "recover", "prune", "lowrank", "transform", "quant")
    for p in sorted(data_dir("conf").glob(f"{g}/*"))
]
SMALL = {"group_size": 32, "rank_multiple": 4, "multiple": 8, "share": 0.4, "tokens": 256}
CALIB = {"source": "random", "samples": 4, "tokens": 32}


@pytest.fixture(params=METHODS, ids=lambda p: f"{p.parent.name}={p.stem}")
def node(request):
    """The YAML, with groups, ranks and a calibration that suit the tiny models."""
    if request.param.stem == "autoround":
        pytest.importorskip("auto_round")
    whole = OmegaConf.create({"calib": CALIB, "stage": OmegaConf.load(request.param)})
    for key in SMALL.keys() & whole.stage.keys():
        whole.stage[key] = SMALL[key]
    return whole.stage


def digests(folder):
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_there_are_methods():
    assert len(METHODS) >= 6


def test_it_is_frozen_and_names_its_paper(node):
    stage = build(node)
    with pytest.raises(FrozenInstanceError):
        setattr(stage, fields(stage)[0].name, None)
    assert "arXiv:" in importlib.import_module(type(stage).__module__).__doc__


def test_the_yaml_shows_every_field_with_its_default(node):
    stage = build(node)
    assert {f.name for f in fields(stage)} == node.keys() - {"_target_"}
    for field in fields(stage):
        default = field.default if field.default is not MISSING else field.default_factory()
        if field.name not in (*SMALL, "calib"):
            assert node[field.name] == default, field.name


def test_a_key_it_does_not_have_is_refused(node):
    node["not_a_field"] = 1
    with pytest.raises(InputError, match="not_a_field"):
        build(node)


def test_targets_that_match_nothing_are_refused(node, tiny):
    if "targets" not in node:
        return  # the whole model is what it changes
    layers = model.layers(Checkpoint(tiny()))
    for targets, message in ((["*nowhere*"], "'\\*nowhere\\*' matches none"), ([], "is empty")):
        node["targets"] = targets
        with pytest.raises(ValueError, match=message):
            build(node).plan(layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_does_what_it_planned_twice_alike_and_leaves_its_source_alone(node, name, run, tiny):
    stage, base = build(node), tiny(name)
    given = run(Magnitude(), base).path if ".recover." in node["_target_"] else base
    before, source = digests(given), Checkpoint(given)
    planned, config = stage.plan(model.layers(source)), stage.resize(source.config)
    if config is not source.config:
        planned = model.layers(source.planned(config))
    first, second = run(stage, given, base), run(stage, given, base)
    assert digests(first.path) == digests(second.path) and first.stats == second.stats
    assert digests(given) == before
    checkpoint = Checkpoint(first.path)
    assert departure(model.layers(checkpoint), planned) is None
    layers = [name for block in source.decoder.blocks for name in block.linears]
    names = {f"{n}.{part}" for n in layers for part in ("weight", "values")} & source.files.keys()
    assert any(not _same(checkpoint.get(n), source.get(n)) for n in names), "nothing changed"
    if not stage.rewrites:  # or a correction would compare weights that mean something else
        norms = [n for n, shape in source.shapes().items() if len(shape) == 1 and "bias" not in n]
        assert norms and all(torch.equal(checkpoint.get(n), source.get(n)) for n in norms)
    if stage.inputs(source) is None:  # no data
        assert "calib_tokens" not in first.stats
    else:
        said = [first.stats[key] for key in ("calib_tokens", "seed", "calib_text")]
        assert said == [4 * 32, 0, None]
    with torch.no_grad():
        assert torch.isfinite(model.load(checkpoint)(torch.arange(3, 50)[None]).logits).all()


def _same(ours, theirs):
    """GPT-2 is stored with inputs first, what is made of it with outputs first."""
    return ours is not None and any(torch.equal(ours, t) for t in (theirs, theirs.t()))


def pruned_factorized_quantized(run, folder):
    """Wanda in the first block, low rank in the MLP of the second, then GPTQ everywhere."""
    first, second, _ = Checkpoint(folder).decoder.blocks
    pruned = run(Wanda(targets=[f"{first.name}.*"], calib=run.calib), folder)
    targets = [f"{second.name}.mlp.*"]
    uniform = SvdLlm(keep=0.9, allocation="uniform", targets=targets, calib=run.calib)
    factorized = run(uniform, pruned)
    return pruned, run(Gptq(group_size=32, calib=run.calib), factorized)


def test_prune_factorize_and_quantize_every_family(family, run, tiny):
    pruned, made = (Checkpoint(a.path) for a in pruned_factorized_quantized(run, tiny(family)))
    for name, form in made.forms.items():
        assert (form.bits == 4) == (name != "lm_head")
        if form.pattern is not None:
            old, new = (model.layer(name, c.forms, c) for c in (pruned, made))
            assert torch.equal(mask_of(old), mask_of(new))
            assert not weight_of(new)[~mask_of(new)].any()
    assert sum(form.pattern == "row" for form in made.forms.values()) > 2
    second = made.decoder.blocks[1]
    assert all(f"{name}.left" in made.forms for name in (*second.mlp_in, second.mlp_out))
    with torch.no_grad():
        assert torch.isfinite(model.load(made)(torch.arange(3, 50)[None]).logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_keep_their_type_and_their_kept_weights(dtype, run, tiny, tmp_path):
    half = tmp_path / "half"
    lm = model.load(Checkpoint(tiny("phi3"))).to(dtype)
    lm.config.dtype = dtype
    lm.save_pretrained(half)
    pruned, made = (Checkpoint(a.path) for a in pruned_factorized_quantized(run, half))
    source = Checkpoint(half)
    for name, form in pruned.forms.items():
        old, new = model.layer(name, {}, source), model.layer(name, pruned.forms, pruned)
        mask = mask_of(new) if form.pattern else torch.ones_like(new.weight, dtype=torch.bool)
        assert torch.equal(new.weight, old.weight * mask), name
    floats = {made.get(n).dtype for n in made.files if not n.endswith((".codes", ".mask"))}
    assert floats == {dtype, torch.float16}  # scales are float16 whatever the model is


def test_claimed_sparsity_is_what_the_files_hold(run, tiny):
    """Also for a tied model, whose head is no weight of its own; 0.3 does not divide its rows."""
    for name in ("llama", "gpt2"):
        made = run(Wanda(sparsity=0.3, calib=Calib(**CALIB)), tiny(name))
        checkpoint = Checkpoint(made.path)
        dropped = total = 0
        for layer, form in checkpoint.forms.items():
            if layer == "lm_head" and checkpoint.head_is_embedding:
                continue
            mask = mask_of(model.layer(layer, checkpoint.forms, checkpoint))
            dropped += 0 if mask is None else int((~mask).sum())
            total += form.rows * form.cols
        assert made.stats["sparsity"] == pytest.approx(dropped / total, rel=1e-12)
