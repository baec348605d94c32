"""The report of a sweep: every artifact of every job once, each against its own baseline."""

import copy
import json

import pytest
import reports
from test_pages import under_load

from optpipe.bench.__main__ import main as bench_main
from optpipe.bench.pages import charts, merge, schema
from optpipe.bench.pages.merge import Job


def job_report(gain, key, cells=1):
    """A run of quant and build after the shared baseline and prune."""
    made = [
        reports.artifact([], 1, 0.0, 29e6),
        reports.artifact(["prune"], 1.02, 0.004, 29e6),
        reports.artifact(["prune", "quant"], 0.6, 0.02, 8e6, key=key),
        reports.artifact(["prune", "quant", "build"], gain, 0.02, 8.7e6, key=f"{key}-engine"),
    ]
    for artifact in made:
        del artifact["crossover"]
    found = reports.report(made, cells)
    for artifact in made:
        for cell in artifact["cells"]:
            for entry in cell["bottleneck"]["phase"].values():
                for remedy in (entry or {}).get("remedies", ())[:1]:
                    remedy["artifact"] = "prune+quant"
    return found


@pytest.fixture
def sweep(tmp_path):
    """sweep(reports by what their jobs set) -> its jobs; None: that job failed."""

    def make(given):
        jobs = []
        for number, (override, found) in enumerate(given.items()):
            folder = tmp_path / str(number)
            folder.mkdir()
            if found is not None:
                reports.save(found, folder)
            overrides = ("recipe=mine", *override.split())
            jobs.append(Job(folder=folder, overrides=overrides, code=0 if found else 4))
        assert merge.merge(jobs, tmp_path) == any(given.values())
        return json.loads((tmp_path / "report.json").read_text())

    return make


def test_artifacts_of_all_jobs_are_in_one_report_of_the_same_kind(sweep, tmp_path):
    three, four = job_report(4.0, "three"), job_report(8.0, "four")
    four["artifacts"][0]["cells"][0]["tpot_s"] *= 1.5  # measured again, on a slower minute
    four["run"]["preflight"] = [{"check": "load", "found": "9", "wanted": "2", "passed": False}]
    four["run"]["design"]["resolution"][0]["tpot_s"]["half_width"] = 0.5
    found = sweep({"quant.bits=3": three, "quant.bits=4": four})
    schema.check(found)
    names = [artifact["name"] for artifact in found["artifacts"]]
    assert names[:2] == ["baseline", "prune"]
    assert names[2:4] == ["quant.bits=3 prune+quant", "quant.bits=3 prune+quant+build"]
    assert names[4:] == ["quant.bits=4 prune+quant", "quant.bits=4 prune+quant+build"]
    base, prune, *_, last = found["artifacts"]
    assert base["jobs"] == prune["jobs"] == ["quant.bits=3", "quant.bits=4"]
    assert base["cells"][0]["tpot_s"] == three["artifacts"][0]["cells"][0]["tpot_s"]
    assert last["cells"][0]["speedup"] == four["artifacts"][3]["cells"][0]["speedup"]
    assert last["label"] == "quant.bits=4 + build"
    assert charts.names(found)[5] == "6 quant.bits=4 + build"
    remedy = last["cells"][0]["bottleneck"]["phase"]["decode"]["remedies"][0]
    assert remedy["artifact"] == "quant.bits=4 prune+quant"
    run = found["run"]
    assert run["overrides"] == ["recipe=mine"] and run["duration_s"] == 122.0
    assert run["recipe"] == "int4_ort" and run["stages"] == reports.STAGES
    assert run["design"]["resolution"] == three["run"]["design"]["resolution"]
    assert [one["check"] for one in run["preflight"]] == ["quant.bits=4: load"]
    assert [job["name"] for job in run["jobs"]] == ["quant.bits=3", "quant.bits=4"]
    assert "one after the other" in run["design"]["timing"]
    assert [pick["scenario"] for pick in found["recommendation"]] == [
        "single, quant.bits=3", "single, quant.bits=4"]  # fmt: skip
    assert found["recommendation"][1]["artifact"] == "quant.bits=4 prune+quant+build"
    text = (tmp_path / "report.md").read_text()
    assert "quant.bits=3 + build" in text and "quant.bits=4 + build" in text
    page = (tmp_path / "report.html").read_text()
    assert "6 quant.bits=4 + build" in page
    drift = page[page.index("<h2>Drift") :]
    assert [drift.count(f"<summary>quant.bits={bits}</summary>") for bits in (3, 4)] == [1, 1]
    assert drift.count("44 iterations of 4 arms") == 2, "the timings of each job, apart"
    assert (
        bench_main(["html", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page
    )


def test_jobs_of_other_scenarios_and_without_advice_are_merged_too(sweep, tmp_path):
    """A cell of each job alone, one of them a server; every job has a baseline of its own."""
    single, served = job_report(4.0, "a", cells=1), under_load(job_report(4.0, "a", cells=1))
    for found, name in ((single, "single"), (served, "server")):
        found["recommendation"] = []
        found["run"]["scenarios"] = {name: {}}
        point = {key: found["artifacts"][0]["cells"][0][key] for key in merge.CELL}
        for key in ("prompts", "resolution"):
            entries = found["run"]["design"][key][:1]
            found["run"]["design"][key] = [{**entry, **point} for entry in entries]
    found = sweep({"scenario=single": single, "scenario=server": served})
    schema.check(found)
    assert found["recommendation"] == [] and len(found["artifacts"]) == 8
    assert [[c["blocks"] for c in a["cells"]] for a in found["artifacts"]] == [[8, 0]] * 4 + [
        [0, 8]] * 4  # fmt: skip
    assert [c["scenario"] for c in found["run"]["design"]["resolution"]] == ["single", "server"]
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "poisson arrivals at 12.5 a second" in text and "Under load" in page


def test_what_jobs_do_not_share_is_not_said_of_all(sweep, tmp_path):
    one, two = job_report(4.0, "a"), job_report(8.0, "b")
    two["run"] |= {"recipe": "int8_ort", "stages": ["quant"]}
    found = sweep({"recipe=int4_ort": one, "recipe=int8_ort": two})
    schema.check(found)
    assert not {"recipe", "stages"} & {*found["run"]}
    assert (
        "<h1>optpipe: benchmark, a sweep of 2 jobs</h1>" in (tmp_path / "report.html").read_text()
    )


def test_an_endpoint_is_not_merged_with_what_it_serves(sweep):
    jobs = {name: job_report(4.0, "a", cells=1) for name in ("x=1", "x=2")}
    for report in jobs.values():
        served = {**report["artifacts"][-1], "name": "endpoint", "role": "endpoint"}
        report["artifacts"].append(served)
    alone = len(next(iter(jobs.values()))["artifacts"])
    found = sweep(jobs)
    assert len(found["artifacts"]) == alone
    assert [a["role"] for a in found["artifacts"]][-2:] == ["artifact", "endpoint"]


def test_every_stage_is_held_against_that_of_its_own_job(sweep):
    found = sweep({"quant.bits=3": job_report(4.0, "a"), "quant.bits=4": job_report(8.0, "b")})
    last = found["artifacts"][-1]
    assert charts.parent(found, last)["name"] == "quant.bits=4 prune+quant"
    assert charts.parent(found, charts.parent(found, last))["name"] == "prune"


def test_the_same_artifact_measured_in_another_way_is_another_row(sweep):
    one, two = job_report(4.0, "a"), job_report(4.0, "a")
    two["run"]["threads"] = 1
    found = sweep({"bench.threads=2": one, "bench.threads=1": two})
    assert len(found["artifacts"]) == 8
    assert found["artifacts"][4]["name"] == "bench.threads=1 baseline"


def test_cells_that_only_one_job_has_are_null_with_a_reason_in_the_others(sweep):
    found = sweep({"scenario=a": job_report(4.0, "a", 1), "scenario=b": job_report(4.0, "b", 2)})
    schema.check(found)
    assert {len(artifact["cells"]) for artifact in found["artifacts"]} == {2}
    lost = found["artifacts"][2]["cells"][1]
    assert lost["tpot_s"] is None and lost["reasons"]["tpot_s"] == merge.OTHER_JOB
    assert found["artifacts"][-1]["cells"][1]["tpot_s"] > 0


def test_a_job_that_failed_is_named_and_stops_nothing(sweep):
    found = sweep({"quant.bits=3": job_report(4.0, "a"), "quant.bits=5": None})
    assert len(found["artifacts"]) == 4
    good, bad = found["run"]["jobs"]
    assert good["report"] and not bad["report"] and "exit code 4" in bad["reason"]
    assert bad["name"] == "quant.bits=5" and bad["folder"] == "1"


def test_no_report_at_all_writes_nothing(tmp_path):
    jobs = [Job(folder=tmp_path / str(n), overrides=("a=1",), code=2) for n in range(2)]
    assert not merge.merge(jobs, tmp_path) and not [*tmp_path.iterdir()]


def test_jobs_are_called_by_what_sets_them_apart():
    def labels(*overrides):
        return merge.labels([Job(folder=None, overrides=o, code=0) for o in overrides])

    assert labels(("a=1", "b=1"), ("a=1", "b=2")) == ["b=1", "b=2"]
    assert labels(("a=1",), ("a=1",)) == ["(job 0)", "(job 1)"]
    assert labels(("a=1", "b=1"), ("a=1",)) == ["b=1 (job 0)", "(job 1)"]


def test_merging_changes_no_report_it_reads(sweep, tmp_path):
    given = job_report(4.0, "a")
    before = copy.deepcopy(given)
    sweep({"quant.bits=3": given, "quant.bits=4": job_report(8.0, "b")})
    assert json.loads((tmp_path / "0" / "report.json").read_text()) == json.loads(
        json.dumps(before)
    )
