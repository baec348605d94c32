"""T16 on the real demo model in real processes: planted sleeps come back as they were planted."""

from pathlib import Path

import planted
import pytest
from simulated import built, speedups

import optpipe.demo
from optpipe.artifact import Artifact
from optpipe.bench.outcome import Outcome
from optpipe.bench.policy import BenchConfig
from optpipe.bench.resident import reside
from optpipe.bench.scenario import Cell, Scenario
from optpipe.bench.timed.blocks import Session
from optpipe.bench.timed.measure import measure
from optpipe.bench.timed.samples import AGAIN, Measured
from optpipe.bench.worker import Arm

CELL = Cell("single", 1, 8, 6)
STEP_S = 0.03
SCALES = {"baseline": 1.0, AGAIN: 1.0, "same": 1.0, "quick": 0.9, "slow": 1.3}


def planted_arm(name, scale):
    lineage = () if name.startswith("baseline") else (name,)
    demo, stats = Path(optpipe.demo.__file__).parent, {"step_s": STEP_S * scale}
    artifact = Artifact(path=demo, format="hf", key="k", lineage=lineage, stats=stats)
    return Arm(name=name, artifact=artifact, dtype="float32", threads=1, find=planted.find)


@pytest.mark.long
@pytest.mark.slow
def test_a_ranking_planted_in_the_demo_model_is_recovered():
    arms = [planted_arm(name, scale) for name, scale in SCALES.items()]
    config = BenchConfig(warmup_s=1, budget_s=20, threads=1)
    found = Measured(scenarios={"single": Scenario(prompt_tokens=[8], new_tokens=6)})
    with reside(arms, lambda *what: None) as residents:
        assert not residents.broken
        session = Session(
            number=0, workers=residents.workers, loaded=residents.loaded, budget_s=config.budget_s
        )
        measure(session, [CELL], config, found, lambda *what: None)
    names = [name for name in SCALES if name != AGAIN]
    outcome = Outcome(
        arms=[arm for arm in arms if arm.name != AGAIN], cells=[CELL], sessions=[names],
        left_out={}, bench=config, measured=found,
        loaded={name: residents.loaded[name] for name in names},
    )  # fmt: skip
    report = built(outcome)
    entry = {name: speedups(report, name)["single", "tpot_s"] for name in names[1:]}
    said = {
        name: (of["verdict"], of["ratio"], of["ci"], of["reason"]) for name, of in entry.items()
    }
    assert entry["quick"]["verdict"] == "FASTER" and entry["slow"]["verdict"] == "SLOWER", said
    assert entry["same"]["verdict"] in ("EQUIVALENT", "INCONCLUSIVE"), said
    for name in names[1:]:
        assert entry[name]["ratio"] == pytest.approx(1 / SCALES[name], rel=0.06), said
