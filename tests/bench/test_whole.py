"""Whole runs: a server among the scenarios, and a sweep over scenarios from the command line."""

import csv
import gzip
import io
import json
import sys
from contextlib import suppress
from dataclasses import replace

import fakes
import pytest
import transformers

from optpipe import cli
from optpipe.bench import cold
from optpipe.bench import run as run_module
from optpipe.bench.__main__ import main as bench_main
from optpipe.bench.bottlenecks.ceilings import Ceilings
from optpipe.bench.bottlenecks.physics import Physics
from optpipe.bench.fidelity.quality import QualityConfig
from optpipe.bench.pages import schema
from optpipe.bench.run import run
from optpipe.bench.scenario import Objective, Scenario, Serving
from optpipe.bench.timed.journal import opened
from optpipe.bench.timed.measure import BenchConfig
from optpipe.bench.worker import Arm
from optpipe.errors import TimingError

PLANS = {"baseline": {"prefill_s": 0.004, "decode_s": 0.002}, "quick": {"prefill_s": 0.002}}


@pytest.fixture
def sleeping(monkeypatch):
    """run() with runners that sleep for the times their artifacts' stats name."""

    def arms(artifacts, bench):
        return [
            Arm(name=a.name, artifact=replace(a, stats={"capacity": 2048, **a.stats}),
                dtype="float32", threads=1, find=fakes.find)
            for a in artifacts
        ]  # fmt: skip

    cpu = Ceilings(bandwidth=((1, 1e9),), flops_per_s={})
    nothing = Physics(costs={}, host_s={}, ceilings={"cpu": cpu}, devices={})
    monkeypatch.setattr(run_module, "arms", arms)
    monkeypatch.setattr(run_module, "survey", lambda *_: nothing)  # fakes have no weights to count


def test_a_run_with_a_server_reports_goodput_and_queue_of_every_arm(
    sleeping, tmp_path, monkeypatch
):
    """Processes, a queue and real clocks."""
    monkeypatch.setattr(cold, "SHARE", 100.0)  # time for a third start however busy the machine
    made = [
        fakes.fake_artifact(tmp_path / name, *([name] if name != "baseline" else []), **plan)
        for name, plan in PLANS.items()
    ]
    bench = BenchConfig(
        blocks=3, warmup=2, warmup_s=0, dtypes=["float32"], threads=1, budget_s=9,
        quality=QualityConfig(windows=2, cache=str(tmp_path / "kept")),
        journal=str(tmp_path / "journals"),
    )  # fmt: skip
    serving = Serving(requests=6, rate_per_s=40.0, objective=Objective(ttft_s=2.0, tpot_s=None))
    scenarios = {
        "single": Scenario(prompt_tokens=[8], new_tokens=3),
        "server": Scenario(batch=[2], prompt_tokens=[8], new_tokens=3, serving=serving),
    }
    out, journals, surveyed = tmp_path / "out", tmp_path / "journals", run_module.survey

    def survey(*given):
        [file] = journals.iterdir()
        with opened(bench.journal, lambda: json.loads(file.read_text().splitlines()[0])) as second:
            assert second.stream is None, "all is timed, but it is another's until the report is"
        return surveyed(*given)

    monkeypatch.setattr(run_module, "survey", survey)
    with suppress(TimingError):  # where others disturb it, and that is said
        run(made, bench, scenarios, out, {"command": ["optpipe"], "overrides": []})
    assert [*journals.iterdir()] == [], "it is whole: nobody has to go on with it"
    found = json.loads((out / "report.json").read_text())
    schema.check(found)
    for artifact in found["artifacts"]:
        starts, cell = artifact["cold"], artifact["cells"][1]
        # to be judged, and twice to be timed, the baseline beside itself
        assert len(starts["each_first_request_s"]) == (5 if artifact["name"] == "baseline" else 3)
        assert starts["request"]["scenario"] == "single" and starts["first_request_s"] > 0.001
        kept = cell["slo_kept"]
        assert kept["requests"] == 6 * cell["blocks"] and kept["tpot_s"] is None
        assert kept["ttft_s"]["share"] == kept["good"]["share"] == 1 > kept["good"]["at_least"]
        assert cell["scenario"] == "server" and cell["rate_per_s"] == 40.0
        assert 0 < cell["blocks"] <= 6, "others may disturb some"
        assert cell["good_share"] == 1.0 and cell["failed"] == 0 and cell["goodput_per_s"] > 10
        assert cell["queue_s"] >= 0 and cell["ttft_sched_s"] > 0.001
        assert cell["percentiles"]["ttft_sched_s"]["samples"] == 6 * cell["blocks"]
    goodput = found["artifacts"][1]["cells"][1]["speedup"]["goodput_per_s"]
    assert 0.7 < goodput["ratio"] < 2 and goodput["processes"] in (1, 2), "both keep up"
    assert goodput["reasons"]["ci"].endswith("paired blocks; a bootstrap needs 30")
    assert {one["check"] for one in found["run"]["preflight"]} >= {"load", "self-test"}
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "## Server, server: poisson arrivals at 40 a second" in text and "Under load" in page
    with gzip.open(out / "samples.jsonl.gz", "rt") as stream:
        served = [s for line in stream if (s := json.loads(line))["served"]]
    timed = [s for s in served if s["reason"] is None]
    assert len(timed) == 3 * cell["blocks"], "two arms and the baseline once more"
    assert all(len(s["served"]["requests"]) == 6 for s in served)
    assert len([*(tmp_path / "kept").glob("*/*.npy")]) == 2


@pytest.fixture
def small(tmp_path):
    """A random model of one block with 1024 tokens of context."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=1024, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sweep_over_scenarios_has_one_report_of_all_its_cells(
    small, sleeping, tmp_path, monkeypatch, capsys
):
    """The command line, two jobs: a request alone, and prompts of three lengths alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "optpipe", "-m", "recipe=baseline", "model=hf", f"model.path={small}",
        "scenario=single,prefill_only", "calib=random", "bench.blocks=3",
        "bench.warmup=2", "bench.warmup_s=0", "bench.threads=1", "bench.dtypes=[float32]",
        "bench.quality.windows=2", "bench.budget_s=9", "hydra.sweep.dir=out",
    ])  # fmt: skip
    assert cli.main() in (cli.OK, cli.BAD_TIMING), "others may disturb it"
    capsys.readouterr()
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    schema.check(found)
    assert [job["report"] for job in found["run"]["jobs"]] == [True, True]
    cells = [cell["scenario"] for cell in found["artifacts"][0]["cells"]]
    assert cells == ["single", *["prefill_only"] * 3]
    assert len(found["artifacts"]) == 2, "the baseline in each job"
    assert [[c["blocks"] > 0 for c in a["cells"]] for a in found["artifacts"]] == [
        [True, False, False, False], [False, True, True, True]]  # fmt: skip
    assert "prefill_only" in (tmp_path / "out" / "report.md").read_text()
    assert bench_main(["csv", "out"]) == 0
    assert len([*csv.DictReader(io.StringIO(capsys.readouterr().out))]) == 2 * 4
    assert bench_main(["compare", "out/0", "out/1"]) == 0
    assert "not interleaved" in capsys.readouterr().out
    references = [*(tmp_path / "outputs" / "store" / "references").glob("*/*.npy")]
    assert len(references) == 2, "the second job did not score its baseline again"
