"""Every stage refuses what the declared order refuses, with the reason, and takes all else."""

import pytest

from optpipe import order
from optpipe.cache.static import KvCache
from optpipe.calibrate import Calib
from optpipe.errors import InputError
from optpipe.linear import Form
from optpipe.lowrank.svd import Svd
from optpipe.pipeline import check
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


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (Rtn(group_size=32), Magnitude(), "prune before that"),
        (Magnitude(), Rotate(), "a rotation would fill its zeros"),
        (Magnitude(), Svd(rank_multiple=4), "two factors would lose its mask"),
        (Svd(rank_multiple=4), Width(calib=CALIB), "structured pruning comes before"),
    ],
)
def test_a_run_in_the_wrong_order_is_refused_before_any_work(first, second, reason, tiny, tmp_path):
    stages = {"first": first, "second": second}
    with pytest.raises(InputError, match=f"stage 'second': layer .*; .*{reason}"):
        check(stages, HuggingFace(path=str(tiny())), tmp_path)
    assert not any(tmp_path.iterdir())


def test_on_other_layers_every_order_is_fine(tiny, tmp_path):
    stages = {
        "quant": Rtn(group_size=32, targets=["*.q_proj"]),
        "prune": Magnitude(targets=["*.k_proj"]),
        "lowrank": Svd(rank_multiple=4, targets=["*.up_proj"]),
    }
    assert len(check(stages, HuggingFace(path=str(tiny())), tmp_path)) == 3


@pytest.mark.parametrize("then", [Depth(), Rtn(), Blockwise(), Rotate()])
def test_nothing_follows_what_measured_the_cache(tiny, tmp_path, then):
    stages = {"cache": KvCache(calib=Calib(source="random", samples=2, tokens=16)), "then": then}
    with pytest.raises(InputError, match="put 'cache' after all others"):
        check(stages, HuggingFace(path=str(tiny())), tmp_path)
