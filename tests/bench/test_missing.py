"""An artifact that this machine cannot run costs the run nothing but its own numbers."""

import pytest
from fakes import fake_artifact, find

from optpipe.artifact import Artifact
from optpipe.bench import report
from optpipe.bench.backend import BACKENDS, NOT_DRIVEN
from optpipe.bench.fidelity import gate
from optpipe.bench.run import ONLY_REQUESTS, _valid, _whole, measure_arms
from optpipe.bench.scenario import Scenario, Serving
from optpipe.bench.timed.measure import BenchConfig
from optpipe.bench.worker import Arm
from optpipe.errors import TimingError

WHY = "package 'vllm' is not installed"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of a baseline, an arm that cannot run here, and one that is an endpoint."""
    folder = tmp_path_factory.mktemp("arms")
    given = [
        Arm(name=name, artifact=fake_artifact(folder / name, *lineage, **plan), dtype="float32",
            threads=1, find=find, endpoint=name == "served")
        for name, lineage, plan in (
            ("baseline", [], {}), ("b", ["b"], {"missing": WHY, "fault": "die_loading"}),
            ("served", ["c"], {}),
        )
    ]  # fmt: skip
    load = Serving(rate_per_s=200, requests=2)
    scenarios = {
        "single": Scenario(prompt_tokens=[4], new_tokens=2),
        "server": Scenario(prompt_tokens=[4], new_tokens=2, serving=load),
    }
    bench = BenchConfig(blocks=1, processes=1, max_processes=1, warmup=2, warmup_s=0, budget_s=9)
    return measure_arms(given, bench, scenarios, lambda *_: None)


def test_it_is_never_loaded_and_the_report_says_why(found):
    assert found.left_out == {"b": f"not benchmarked: {WHY}"}
    assert found.judged.scored.keys() == {"baseline"}
    assert "b" not in {sample.arm for sample in found.measured.samples}
    built = report.build(found, {"bench": {}})
    entry = next(a for a in built["artifacts"] if a["name"] == "b")
    assert entry["bytes"] == 1000 and entry["reasons"]["load_s"] == f"not benchmarked: {WHY}"
    _whole(found)  # no StageError: nothing broke
    gate.check(built, BenchConfig().quality, [])


def test_an_endpoint_is_timed_in_server_cells_alone_and_not_judged(found):
    timed = {s.cell.scenario for s in found.measured.samples if s.arm == "served"}
    assert timed == {"server"}
    entry = report.build(found, {"bench": {}})["artifacts"][2]
    assert entry["role"] == entry["stage"] == "endpoint" and entry["dtype"] == "float32"
    assert entry["quality"]["reasons"]["tier"] == report.NO_LOGITS
    told = {cell["scenario"]: cell["reasons"].get("tpot_s") for cell in entry["cells"]}
    assert told["single"] == ONLY_REQUESTS
    assert told["server"] in (None, "no block was run"), "the only one is lost if others disturb it"


@pytest.mark.parametrize("format", [*NOT_DRIVEN])
def test_formats_that_no_runtime_here_opens_say_so_too(format, tmp_path):
    artifact = Artifact(path=tmp_path, format=format, key="k")
    arm = Arm(name="a", artifact=artifact, dtype="float32", threads=1)
    assert arm.missing() == NOT_DRIVEN[format]
    assert format not in BACKENDS


def test_a_verdict_that_is_invalid_changes_the_exit_code():
    """Exit code 5 is that of TimingError; a verdict of any other kind raises nothing."""
    entry = {"verdict": "SLOWER", "reason": "unstable: the machine was disturbed"}
    cell = {"scenario": "single", "speedup": {"tpot_s": entry, "bytes": {"ratio": 2.0}}}
    found = {"artifacts": [{"name": "engine", "cells": [cell]}]}
    _valid(found)
    entry["verdict"] = "INVALID"
    with pytest.raises(TimingError, match="'engine', single, tpot_s: INVALID: unstable"):
        _valid(found)
