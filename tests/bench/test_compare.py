"""Comparing two reports, and the command line for reports: exit codes, one line for a mistake."""

import copy
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import types

import pytest
import reports

from optpipe.bench import __main__ as command
from optpipe.bench.pages import compare, schema


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """csv FOLDER | head: the pipe is closed before all is written."""
    folder = reports.save(reports.report(cells=2), tmp_path / "a")
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-m", "optpipe.bench", "csv", str(folder)]
    done = subprocess.run(call, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


@pytest.fixture
def runs(tmp_path):
    """runs(**changes of the second run) -> folders of two reports; its engine is twice as fast."""

    def make(**changes):
        before = reports.report(cells=2)
        after = copy.deepcopy(before)
        engine = after["artifacts"][-1]
        engine["cells"][0] = reports.cell(reports.CELLS[0], 13.6, 8.7e6)
        engine["key"], engine["bytes"] = "other", 4_000_000
        del after["artifacts"][2]
        after["run"] |= changes
        return reports.save(before, tmp_path / "a"), reports.save(after, tmp_path / "b")

    return make


MACHINE = reports.report()["run"]["machine"]


def call(capsys, *arguments):
    code = command.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def read(folder):
    return json.loads((folder / "report.json").read_text())


def test_within_one_environment_ratios_and_intervals_are_held_against_each_other(runs):
    found = compare.compare(*map(read, runs()))
    assert found["controlled"] and found["note"].startswith("not interleaved")
    assert found["only_before"] == ["prune"] and found["only_after"] == []
    engine = found["artifacts"][-1]
    assert not engine["same_key"] and engine["bytes"] == [8_700_000, 4_000_000]
    tpot = engine["cells"][0]["metrics"]["tpot_s"]
    assert tpot["ratio"] == pytest.approx(2) and tpot["change"] == "better over its baseline"
    rate = engine["cells"][0]["metrics"]["tokens_per_s"]
    assert rate["ratio"] == pytest.approx(rate["after"] / rate["before"]) and rate["ratio"] > 1
    other = engine["cells"][1]["metrics"]["tpot_s"]
    assert other["ratio"] == 1 and other["change"] == "intervals overlap"
    back = compare.compare(*map(read, reversed(runs())))
    tpot = back["artifacts"][-1]["cells"][0]["metrics"]["tpot_s"]
    assert tpot["ratio"] == pytest.approx(0.5) and tpot["change"] == "worse over its baseline"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threads": 4}, "threads"),
        ({"versions": {"optpipe": "0.1.0", "torch": "2.14.0"}}, "torch"),
        ({"machine": {**MACHINE, "cpu": "other"}}, "machine.cpu"),
        ({"machine": {**MACHINE, "governor": "powersave"}}, "machine.governor"),
        ({"machine": {**MACHINE, "environment": {"OMP_NUM_THREADS": "1"}}}, "machine.environment"),
        ({"machine": {**MACHINE, "gpus": [{"name": "a", "driver": "1"}]}}, "machine.gpus"),
        ({"seed": 7}, "seed"),
    ],
)
def test_across_environments_there_is_no_verdict(runs, capsys, changes, named):
    folders = runs(**changes)
    found = compare.compare(*map(read, folders))
    assert not found["controlled"] and found["differences"] == [named]
    changed = [metric["change"] for artifact in found["artifacts"]
               for cell in artifact["cells"] for metric in cell["metrics"].values()]  # fmt: skip
    assert changed and set(changed) == {None}
    code, out, _ = call(capsys, "compare", *folders)
    assert code == 0 and out.startswith("uncontrolled: the two runs differ in ")
    lines = [line for line in out.splitlines() if "TPOT" in line]
    assert lines and all(line.endswith("uncontrolled") for line in lines)
    assert "better over" not in out


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_invalid_in_either_run_is_not_better(runs, capsys, side):
    folders = runs()
    file = folders[side] / "report.json"
    report = json.loads(file.read_text())
    told = {"verdict": "INVALID", "reason": "token_count: 1 of 32"}
    report["artifacts"][-1]["cells"][0]["speedup"]["tpot_s"] |= told
    file.write_text(json.dumps(report))
    tpot = compare.compare(*map(read, folders))["artifacts"][-1]["cells"][0]["metrics"]["tpot_s"]
    assert (tpot["change"], tpot["invalid"]) == (None, told["reason"])
    code, out, _ = call(capsys, "compare", *folders)
    [line, *_] = [line for line in out.splitlines() if "0.500 ms -> 0.250 ms" in line]
    assert code == 0 and line.endswith(": INVALID (token_count: 1 of 32)")


def test_the_same_as_json(runs, capsys):
    folders = runs()
    code, out, _ = call(capsys, "compare", *folders, "--json")
    assert code == 0 and json.loads(out) == compare.compare(*map(read, folders))
    code, out, _ = call(capsys, "compare", *folders)
    assert "3.500 ms" not in out and "0.500 ms -> 0.250 ms, 2.000x" in out
    assert "over its baseline 6.80\u00d7 [6.40, 7.22] -> 13.60\u00d7 [12.81, 14.44]" in out


def test_bad_input_is_one_line_and_exit_code_2(runs, capsys, tmp_path):
    good, bad = runs()
    for content, named in (
        ('{"schema": "other/1"}', "'optpipe.report/1' was expected"),
        ("{", "cannot read"),
        (None, "there is no report.json in"),
    ):
        (bad / "report.json").unlink()
        if content is not None:
            (bad / "report.json").write_text(content)
        for arguments in (("compare", good, bad), ("csv", bad), ("html", bad)):
            code, out, err = call(capsys, *arguments)
            assert code == 2 and out == "" and err.count("\n") == 1
            assert err.startswith("error: ") and named in err, err
        (bad / "report.json").touch()
    with pytest.raises(SystemExit) as wrong:
        call(capsys, "compair")
    assert wrong.value.code == 2


def test_timings_that_are_none_are_one_line_and_exit_code_2(runs, capsys):
    folder, _ = runs()
    file = folder / "samples.jsonl.gz"
    whole = file.read_bytes()
    for content in (whole[:-20], b"not compressed", gzip.compress(b"{}\n"), gzip.compress(b"[")):
        file.write_bytes(content)
        code, out, err = call(capsys, "html", folder)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"error: cannot read '{file}': ")


def test_a_cell_that_one_run_did_not_measure_is_said_to_be_so(runs):
    before, after = map(read, runs())
    for key in compare.SPEEDS:
        after["artifacts"][0]["cells"][1][key] = None
    lines = [*compare.text(compare.compare(before, after))]
    assert lines.count("    nothing that both have measured") == 1


def test_schema_csv_and_html(runs, capsys):
    folder, _ = runs()
    code, out, _ = call(capsys, "schema")
    assert code == 0 and json.loads(out) == schema.load()
    code, out, _ = call(capsys, "html", folder)
    assert code == 0 and out.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    code, out, _ = call(capsys, "csv", folder)
    rows = [*csv.DictReader(io.StringIO(out))]
    assert code == 0 and len(rows) == 7 * 2
    assert rows[-2]["name"] == "prune+lowrank+quant+export+build"
    assert float(rows[-2]["tpot_s"]) == pytest.approx(0.0005)
    assert float(rows[-2]["tpot_s_speedup_low"]) < 6.8 and rows[-2]["tpot_s_verdict"] == "FASTER"
    assert rows[-2]["peak_bytes_speedup"] == rows[-2]["goodput_per_s"] == ""


@pytest.mark.parametrize(("error", "code"), [(0.02, 0), (-0.021, 1)])
def test_selftest_fails_above_two_percent(monkeypatch, capsys, error, code):
    fake = types.ModuleType("optpipe.bench.timed.selftest")
    fake.LIMITS = {"ttft_error": 0.05, "tpot_error": 0.02}
    fake.selftest = lambda: {"ttft_error": 0.001, "tpot_error": error}
    monkeypatch.setitem(sys.modules, "optpipe.bench.timed.selftest", fake)
    found, out, err = call(capsys, "selftest")
    assert found == code and "ttft_error 0.100%; verdicts of a run are INVALID beyond 5%" in out
    assert ("off by 2.1%" in err) == bool(code)
