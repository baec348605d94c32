"""What a server did and what the user's tasks said, in every kind of report."""

import csv
import io

import pytest
import reports

from optpipe.bench.pages import about, flat, html, rates, room, schema, served, tables, tasks
from optpipe.evaluate import mcnemar


def under_load(found):
    """The last cell of every artifact becomes that of a server."""
    for number, artifact in enumerate(found["artifacts"]):
        cell = artifact["cells"][-1]
        cell |= {
            "scenario": "server", "arrivals": "poisson", "rate_per_s": 12.5,
            "slo": {"ttft_s": 0.5, "tpot_s": 0.05, "e2e_s": None, "share": 0.9},
            "goodput_per_s": 11.25 + number, "good_share": 0.875, "failed": 2.0,
            "ttft_sched_s": 0.125, "icl_max_s": 0.0625, "requests_per_s": 12.0,
            "slo_kept": {
                "requests": 96, "ttft_s": {"share": 0.875, "at_least": 0.77}, "e2e_s": None,
                "tpot_s": {"share": 1.0, "at_least": 0.95}, "good": {"share": 0.5, "at_least": 0.4},
                "reasons": {"e2e_s": "no such limit"},
            },
        }  # fmt: skip
        cell["speedup"]["goodput_per_s"] = reports.interval(1.0 + number / 10) | {
            "verdict": None, "reason": "a secondary metric: an interval, no verdict",
        }  # fmt: skip
        cell["percentiles"] = {"ttft_sched_s": {
            "p50": 0.1, "p95": 0.1875, "p99": None, "reasons": {"p99": "2 of 96 requests failed"},
        }}  # fmt: skip
    told = {"user_tokens_per_s": 31.25, "user_e2e_tokens_per_s": 28.75, "icl_max_s": 0.0875,
            "total_tokens_per_s": 777.0, "prefill_tokens_per_s": 4321.0,
            "requests_per_s": 1.125}  # fmt: skip
    first, last = (found["artifacts"][1]["cells"][at] for at in (0, -1))
    first |= {**told, "decode_tokens_per_s": 250.0}
    last["steady_tokens_per_s"] = 125.0
    return found


def evaluated(found):
    for artifact in found["artifacts"]:
        told = {"metrics": {"acc": {"value": 0.75, "stderr": 0.0217, "reasons": {}}},
                "documents": 400, "correct": {"acc": [1.0] * 300}}  # fmt: skip
        told["metrics"]["f1"] = {"value": 0.5, "stderr": 0.01, "reasons": {}}
        change = {"acc": {"became_right": 4, "became_wrong": 14, "mcnemar_p": mcnemar(4, 14)}}
        artifact["evaluation"] = {
            "tasks": {"next_line": told}, "changes": {"next_line": change}, "reasons": {},
        }  # fmt: skip
    return found


@pytest.fixture
def report():
    return evaluated(under_load(reports.report()))


def test_the_report_with_a_server_and_tasks_keeps_the_schema(report):
    schema.check(report)


def test_every_number_of_a_server_is_in_the_text_and_on_the_page(report):
    ((title, rows),) = served.tables(report)
    assert "poisson arrivals at 12.5 a second" in title and "TTFT 500 ms, TPOT 50 ms" in title
    assert len(rows) == len(report["artifacts"])
    assert rows[1][1:9] == [
        "12.2", "1.10\u00d7 [1.04, 1.17]", "87.5 %", "87.5 / 100 / \u2013", "125", "188",
        "0.500", "\u2013",
    ]  # fmt: skip
    assert rows[1][9:] == ["12.0", "2.00"]
    report["artifacts"][0]["cells"][-1]["reasons"]["rate_per_s"] = "the time budget ended it"
    goodput = report["artifacts"][1]["cells"][-1]["speedup"]["goodput_per_s"]
    goodput["verdict"] = "INVALID"
    ((_, (_, row, *_)),) = served.tables(report)
    assert row[2].endswith("] INVALID"), "its interval is not shown as if it were one"
    del goodput["verdict"]
    ((hurried, _),) = served.tables(report)
    assert "at 12.5 a second (it may bear more: the time budget ended it), at most" in hurried
    del report["artifacts"][0]["cells"][-1]["reasons"]["rate_per_s"]
    text, page = tables.markdown(report), html.page(report, [])
    assert ">4321<" in page, "a rate of the first cell"
    for there in (title, *rows[1][:4]):
        assert there in text and there in page
    assert "needs 30 blocks" in text and "needs 30 blocks" in page


def test_rates_and_gaps_are_in_the_text(report):
    first, *_, last = [rows[1][1:] for _, rows in rates.tables(report)]
    gap = report["artifacts"][1]["cells"][0]["percentiles"]["itl_s"]["p50"] * 1e3
    shown = ["31.2", "28.8", "250", "777", "4321", "1.12", f"{gap:.2f}", "\u2013", "\u2013", "87.5"]
    assert [*first] == shown and last[2] == "125"
    assert f"| {' | '.join(shown)} |" in tables.markdown(report)


def test_starts_and_room_are_in_the_text_and_on_the_page(report):
    one = report["artifacts"][1]
    cell = one["cells"][0]
    asked = {key: cell[key] for key in ("scenario", "batch", "prompt_tokens", "new_tokens")}
    one |= {
        "made_s": 12.5, "host_bytes": 432_100_000, "device_bytes": None,
        "reasons": {"device_bytes": "it runs on the CPU"},
        "cold": {"starts": 2, "import_s": 3.25, "load_s": 0.75, "first_request_s": 0.625,
                 "each_load_s": [0.5, 1.0], "each_first_request_s": [0.625], "request": asked,
                 "reasons": {}},
        "kv_cache": {"bytes_per_token": 4096, "capacity_tokens": 1_234_567, "room_bytes": 10**10,
                     "reasons": {}},
    }  # fmt: skip
    max(one["cells"], key=lambda c: c["prompt_tokens"] + c["new_tokens"])["max_sequences"] = 7654
    schema.check(report)
    warm = f"{cell['e2e_s']:.3f}"
    assert room.starts(report)[1][1:] == ("12.5", "3.25", "0.750", "0.625", "2", warm)
    shown = ("29.0", "29.0", "432.1", "\u2013", "4,096", "1,234,567", "7,654")
    assert room.memory(report)[1][1:] == shown
    assert f"| {' | '.join(shown)} |" in tables.markdown(report)
    assert all(f">{number}<" in about.ready(report) for number in ("1,234,567", "0.625"))
    stream = io.StringIO()
    flat.write(report, stream)
    row = [*csv.DictReader(io.StringIO(stream.getvalue()))][len(reports.CELLS)]
    assert [row[k] for k in ("made_s", "first_request_s", "starts", "kv_bytes_per_token")] == [
        "12.5", "0.625", "2", "4096",
    ]  # fmt: skip


def test_a_run_without_a_server_or_tasks_has_no_such_section():
    plain = reports.report()
    text, page = tables.markdown(plain), html.page(plain, [])
    assert not [*served.tables(plain)] and not [*tasks.rows(plain)]
    assert "Server," not in text and "Under load" not in page and "Tasks" not in text


def test_tasks_show_flips_and_their_test(report):
    rows = [row for row in tasks.rows(report) if row[2] == "acc"]
    assert rows[1][1:] == ["next_line", "acc", "0.7500", "0.0217", "400", "4", "14", "0.031"]
    rows = [row for row in tasks.rows(report) if row[2] == "f1"]
    assert rows[1][-3:] == ["\u2013"] * 3
    text, page = tables.markdown(report), html.page(report, [])
    assert "| next_line | acc | 0.7500 |" in text and "to wrong" in page


def test_a_spreadsheet_has_both(report):
    stream = io.StringIO()
    flat.write(report, stream)
    rows = [*csv.DictReader(io.StringIO(stream.getvalue()))]
    first, last = rows[0], rows[len(reports.CELLS) - 1]
    assert last["goodput_per_s"] == "11.25" and last["goodput_per_s_speedup"] == "1.0"
    assert last["failed"] == "2.0" and first["failed"] == ""
    assert last["kept_ttft_s"] == "0.875" and first["kept_ttft_s"] == last["kept_e2e_s"] == ""
    assert {row["next_line.acc"] for row in rows} == {"0.75"}


def test_a_run_that_was_killed_and_went_on_says_so_first():
    found = reports.report()
    found["run"]["design"]["resumed"] = [{"after_blocks": 17, "pause_s": 41.4}]
    schema.check(found)
    for page in (tables.markdown(found), html.page(found, ())):
        assert 0 < page.index("killed after 17 blocks of all cells and went on 41 s later") < (
            page.index("prefill" if page[0] == "<" else "## single"))  # fmt: skip


def test_facts_of_many_layers_and_blocks_are_told_by_their_range():
    found = reports.report()
    layers = {f"layers.{i}": i for i in range(200)}
    found["artifacts"][1]["stats"] = {
        "layer_bits": layers, "layer_formats": dict.fromkeys(layers, "fp8"),
        "block_error": [i / 7 for i in range(32)], "kept_blocks": [0, 1, 2, 3, 5], "seed": 0,
    }  # fmt: skip
    told = "layer_bits 0 to 199 in 200 layers, layer_formats 200 layers, block_error 0 to 4.429 in "
    assert f"| {told}32 values, kept_blocks [0, 1, 2, 3, 5], seed 0 |" in tables.markdown(found)
