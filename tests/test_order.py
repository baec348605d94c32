"""Every stage refuses what the declared order refuses, with the reason, and takes all else."""

import contextlib
import random
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from optpipe import order
from optpipe.calibrate import Calib
from optpipe.config import build, data_dir
from optpipe.errors import InputError
from optpipe.linear import Form
from optpipe.lowrank.svd import Svd
from optpipe.pipeline import check, run
from optpipe.prune.magnitude import Magnitude
from optpipe.quant.rtn import Rtn
from optpipe.recover.blockwise import Blockwise
from optpipe.recover.distill import Distill
from optpipe.residual.qera import Qera
from optpipe.source import HuggingFace
from optpipe.structure.depth import Depth
from optpipe.structure.width import Width
from optpipe.transform.rotate import Rotate
from optpipe.transform.smoothquant import SmoothQuant

CALIB = Calib(source="random", samples=4, tokens=32)
NAME = "model.layers.0.mlp.up_proj"
STATES = {
    "dense": {NAME: Form(rows=64, cols=64)},
    order.FACTOR: {
        f"{NAME}.right": Form(rows=32, cols=64),
        f"{NAME}.left": Form(rows=64, cols=32),
    },
    order.PRUNED: {NAME: Form(rows=64, cols=64, pattern="2:4")},
    order.QUANTIZED: {NAME: Form(rows=64, cols=64, bits=4, group_size=32)},
    order.CORRECTED: {
        NAME: Form(rows=64, cols=64, pattern="row"),
        f"{NAME}.residual.right": Form(rows=4, cols=64),
        f"{NAME}.residual.left": Form(rows=64, cols=4),
    },
}
STEPS = {
    "structure": [Width(calib=CALIB), Depth(calib=CALIB)],
    "factorize": [Svd(rank_multiple=4)],
    "prune": [Magnitude()],
    "rotate": [Rotate()],
    "fold": [SmoothQuant(calib=CALIB)],
    "quantize": [Rtn(group_size=32)],
    "correct": [Qera(rank=4, calib=CALIB)],
}
CASES = [
    (step, stage, state)
    for step, stages in STEPS.items()
    for stage in stages
    for state in STATES
    # a layer of floats, dense or factorized, has nothing to correct
    if not (step == "correct" and state in ("dense", order.FACTOR))
]


def test_every_step_is_here():
    assert STEPS.keys() == order.REASONS.keys()


@pytest.mark.parametrize(("step", "stage", "state"), CASES)
def test_a_stage_refuses_what_the_order_refuses_and_nothing_else(step, stage, state):
    layers, reasons = STATES[state], order.REASONS[step]
    found = {what for n, form in layers.items() for what, _ in order.states(n, form, layers)}
    if not (refused := found & reasons.keys()):
        assert stage.plan(layers)
        return
    with pytest.raises(ValueError, match=r"layer '.*' is .* already.*; ") as error:
        stage.plan(layers)
    assert any(str(error.value).endswith(reasons[what]) for what in refused)


@pytest.mark.parametrize("stage", [Blockwise(calib=CALIB), Distill(calib=CALIB)])
@pytest.mark.parametrize("state", STATES)
def test_recovery_takes_every_form_and_leaves_it(stage, state):
    assert stage.plan(STATES[state]) == STATES[state]


SMALL = {"group_size": 16, "rank_multiple": 32, "keep": 0.9, "multiple": 32, "share": 0.5,
         "tokens": 16, "rank": 2, "mlp": 0.34}  # fmt: skip
TEXT = {"source": "random", "samples": 2, "tokens": 8}
FILES = sorted(data_dir("conf").glob("*/*.yaml"))
KINDS = [
    *("structure/width", "structure/depth", "recover/blockwise", "prune/magnitude", "lowrank/svd"),
    *("transform/rotate", "transform/smoothquant", "quant/rtn", "quant/int8", "residual/qera"),
    *("cache/static",),
]
"""One method of each kind, of those that are alike in what they refuse and need."""


def methods():
    """Every stage that makes a torch model, by group and name, with sizes that suit a tiny one."""
    for file in FILES:
        node = OmegaConf.load(file)
        if "_target_" not in node or file.parent.name in ("model", "export", "build", "eval"):
            continue
        whole = OmegaConf.create({"calib": TEXT, "stage": node})
        for key in SMALL.keys() & node.keys():
            whole.stage[key] = SMALL[key]
        yield f"{file.parent.name}/{file.stem}", build(whole.stage)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A model of two blocks, a store for all pairs, and the stages."""
    store, folder = (tmp_path_factory.mktemp(name) for name in ("store", "two"))
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=160, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return HuggingFace(path=str(folder)), store, dict(methods())


def test_methods_are_all_here():
    stages = dict(methods())
    assert len(stages) >= 22 and set(KINDS) <= stages.keys()
    assert all(stage.produces == "hf" for stage in stages.values())


def outcome(ground, first, second):
    """The steps of two stages that may follow each other, else why they may not."""
    source, store, stages = ground
    ordered = {first: stages[first], f"{second}, then": stages[second]}
    if first.startswith("residual/"):  # which needs something to correct
        ordered = {"prune/magnitude": stages["prune/magnitude"], **ordered}
    try:
        return check(ordered, source, store)
    except InputError as error:
        return str(error)


def test_every_pair_of_methods_fits_or_is_refused_with_a_reason_that_names_the_second(ground):
    names = [*ground[2]]
    pairs = {(a, b): outcome(ground, a, b) for a in names for b in names}
    refused = {pair: why for pair, why in pairs.items() if isinstance(why, str)}
    for (first, second), why in refused.items():
        assert why.startswith((f"stage '{second}, then'", f"stage '{first}': ")), (first, why)
        assert re.search(r"layer '|; |pip install", why), why  # what of the model, or what to do
    assert len(refused) < 0.6 * len(pairs)
    for pair in (("prune/wanda", "quant/gptq"), ("quant/rtn", "residual/qera")):
        assert pair not in refused
    for pair in (pair[::-1] for pair in [("prune/wanda", "quant/gptq"), *EARLIER]):
        assert pair in refused


EARLIER = [
    ("transform/rotate", "prune/magnitude"),
    ("lowrank/svd", "prune/magnitude"),
    ("structure/width", "lowrank/svd"),
    ("quant/rtn", "residual/qera"),
]


def test_pairs_that_are_not_refused_run_and_verify(ground):
    ran = made(ground, KINDS)
    assert len(ran) > 50 and {first for first, _ in ran} == set(KINDS) - {"cache/static"}


@pytest.mark.slow
@pytest.mark.long
def test_all_pairs_that_are_not_refused_run_and_verify(ground):
    assert len(made(ground, ground[2])) > 200


def made(ground, names):
    """Run all pairs that are not refused, each first stage once; the pairs."""
    source, store, _ = ground
    baseline, ran = source.prepare(store), []
    for first, second in product(names, repeat=2):
        if not isinstance(steps := outcome(ground, first, second), str):
            *_, last = run(steps, baseline)
            assert last.stats["verified"] and last.lineage[-1] == f"{second}, then"
            ran.append((first, second))
    return ran


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(24))
def test_whatever_longer_chain_is_taken_runs_and_verifies(seed, ground):
    """Stages drawn at random, each on some layers, as long as they may follow; then an export."""
    source, store, stages = ground
    draw, chain = random.Random(seed), {}
    exports = [build(OmegaConf.load(f)) for f in FILES if f.parent.name == "export"]
    for stage in [*draw.choices([*stages.values()], k=60), *draw.sample(exports, len(exports))]:
        if hasattr(stage, "targets"):
            stage = replace(stage, targets=[draw.choice(["*", "*.mlp.*", "*.0.*", "*down_proj"])])
        longer = {**chain, f"{len(chain)} {type(stage).__name__}": stage}
        if stage.produces == "hf" and (stage.last or len(chain) == 5):
            continue
        with contextlib.suppress(InputError):
            check(longer, source, store)
            chain = longer
    *_, last = run(check(chain, source, store), source.prepare(store))
    assert last.stats["verified"] and last.format != "hf" and len(last.lineage) > 1


def test_on_other_layers_every_order_is_fine(tiny, tmp_path):
    stages = {
        "quant": Rtn(group_size=32, targets=["*.q_proj"]),
        "prune": Magnitude(targets=["*.k_proj"]),
        "lowrank": Svd(rank_multiple=4, targets=["*.up_proj"]),
    }
    assert len(check(stages, HuggingFace(path=str(tiny())), tmp_path)) == 3
