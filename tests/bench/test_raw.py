"""Raw timings: what is written is what is read, those of servers included."""

import gzip
import json
import math
from dataclasses import asdict, replace

import pytest

from optpipe.bench.pages import raw
from optpipe.bench.scenario import Cell, Objective
from optpipe.bench.serving.request import Request
from optpipe.bench.serving.serve import Served
from optpipe.bench.timed.samples import Sample, decode

PLAIN = Sample(
    arm="a", cell=Cell("single", 2, 8, 3), session=0, block=1, position=2, reason=None,
    submit_ns=5, start_ns=6, token_ns=(1_000_000_005, 2_000_000_005), cpu_s=0.5, peak_bytes=None,
    tokens_hash="f", device_s=(0.25, 0.5),
)  # fmt: skip
REQUEST = Request(sched_ns=0, submit_ns=1, start_ns=2, chunks=((3, 1), (4, 1)), end_ns=4,
                  prompt_tokens=9, new_tokens=2)  # fmt: skip
SERVED = replace(PLAIN, arm="b", reason="warmup", served=Served(
    requests=(REQUEST,), events=((1, 1), (4, -1)), tokens=(7, 8), objective=Objective(),
    cpu_s=0.1, peak_bytes=3,
))  # fmt: skip


def test_every_field_of_every_sample_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "LINES", 2)
    given = [PLAIN, SERVED, replace(PLAIN, token_ns=())]
    raw.write(given, tmp_path)
    with gzip.open(tmp_path / raw.SAMPLES, "rt", encoding="ascii") as stream:
        found = [json.loads(line) for line in stream]
    wanted = [{**asdict(sample), "cell": sample.cell._asdict()} for sample in given]
    assert found == json.loads(json.dumps(wanted))
    assert found[1]["served"]["requests"][0]["chunks"] == [[3, 1], [4, 1]]
    assert [decode(record) for record in found] == given


def test_points_of_a_file_are_those_of_memory(tmp_path):
    given = [PLAIN, SERVED, replace(PLAIN, token_ns=())]
    raw.write(given, tmp_path)
    assert raw.read(tmp_path) == raw.points(given)
    one, two = raw.points(given)
    assert one == {"arm": "a", "session": 0, "residence": 0, "block": 1, "part": 0, "reason": None,
                   "cell": ("single", 2, 8, 3), "e2e_s": 2.0}  # fmt: skip
    assert two["reason"] == "warmup"
    assert raw.read(tmp_path / "none") == []


def test_a_number_that_is_not_finite_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        raw.write([replace(PLAIN, cpu_s=math.nan)], tmp_path)
