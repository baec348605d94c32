"""T16 on the real demo engine in real processes: planted sleeps come back as they were planted."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import planted
import pytest
from simulated import built, speedups

import optpipe.demo
from optpipe.bench.outcome import Outcome
from optpipe.bench.policy import BenchConfig
from optpipe.bench.resident import reside
from optpipe.bench.scenario import Cell, Scenario
from optpipe.bench.timed.blocks import Session
from optpipe.bench.timed.residences import Residences
from optpipe.bench.timed.samples import AGAIN, Measured
from optpipe.bench.worker import Arm
from optpipe.build.ort import Ort
from optpipe.export.onnx import Onnx
from optpipe.quant.rtn import Rtn

CELL = Cell("single", 1, 8, 51)
STEP_S = 0.02
"""Many times what a step takes on a quiet machine: on a busy one, too, it is over by then. And as a
second a request: at a load of 9 the first and the last token came up to 40 ms late."""
SCALES = {"baseline": 1.0, AGAIN: 1.0, "same": 1.0, "quick": 0.9, "slow": 1.3}


@pytest.fixture
def engine(run):
    """The demo model in int4 on ONNX Runtime."""
    folder = Path(optpipe.demo.__file__).parent
    return run(Ort(), run(Onnx(), run(Rtn(bits=4, group_size=32), folder)))


def planted_arm(engine, name, scale):
    lineage = () if name.startswith("baseline") else (name,)
    artifact = replace(engine, lineage=lineage, stats={"step_s": STEP_S * scale})
    return Arm(name=name, artifact=artifact, dtype="float32", threads=1, find=planted.find)


def timed(arms):
    """The report of these arms, the baseline resident twice."""
    named = [arm for arm in arms if arm.name != AGAIN]
    outcome = Outcome(
        arms=named,
        cells=[CELL],
        sessions=[[arm.name for arm in arms]],
        left_out={},
        bench=BenchConfig(blocks=12, budget_s=180, warmup_s=1, threads=1),
        measured=Measured(scenarios={"single": Scenario(prompt_tokens=[8], new_tokens=51)}),
    )

    @contextmanager
    def start():
        with reside(arms, lambda *what: None) as residents:
            assert not residents.broken
            outcome.loaded = residents.loaded
            # who sleeps is not disturbed by those who work: no block is void
            yield Session(
                number=0,
                workers=residents.workers,
                loaded=residents.loaded,
                meter=lambda: None,
            )

    Residences(outcome=outcome, number=0, start=start, progress=lambda *what: None).run()
    return built(outcome)


@pytest.mark.long
@pytest.mark.slow
def test_a_ranking_planted_in_the_demo_engine_is_recovered(engine):
    """Every ratio is as planted, within its interval widened by the resolution of the run."""
    report = timed([planted_arm(engine, name, scale) for name, scale in SCALES.items()])
    resolution = report["run"]["design"]["resolution"][0]["tpot_s"]["half_width"]
    entry = {name: speedups(report, name)["single", "tpot_s"] for name in ("same", "quick", "slow")}
    said = {name: [of[key] for key in ("verdict", "ratio", "ci")] for name, of in entry.items()}
    assert entry["quick"]["verdict"] == "FASTER" and entry["slow"]["verdict"] == "SLOWER", said
    assert entry["same"]["verdict"] in ("EQUIVALENT", "INCONCLUSIVE"), said
    assert resolution < 0.03, said
    for name, of in entry.items():
        low, high = of["ci"]
        assert low - resolution <= 1 / SCALES[name] <= high + resolution, (name, said, resolution)
        assert of["ratio"] == pytest.approx(1 / SCALES[name], rel=0.02), said
