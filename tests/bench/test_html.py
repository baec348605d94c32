"""report.html: complete, alone, readable by a parser, and honest about what is missing."""

import gzip
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import reports

from optpipe.bench.pages import bounds, charts, curves, figure, html, publish, raw
from optpipe.bench.pages.view import DASH, names, parent, three_digits

VOID = {"meta", "br", "hr", "img", "link", "input"}
CHARTS = [
    "Time to first token, ms", "Time per output token, ms", "Size on disk, MB",
    "KL divergence, nats", "Speed-up: single", "Speed-up: batch", "Speed-up: one_token",
    "Speed against divergence", "Throughput over batch: batch", "Roofline of this machine",
    "Drift: single", "Drift: batch",
]  # fmt: skip
HOSTILE = "<script>alert('$x^2$ & \"y\"')</script>"


class Page(HTMLParser):
    """Checks that tags nest; keeps text, identifiers, attributes and the rows of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.tags, self.words, self.refs = [], [], [], [], []
        self.rows = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.refs += [v for k, v in given.items() if k in ("href", "src", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.rows and {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def folder_of(found, tmp_path):
    return reports.save(found, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report with every field, and its page as text."""
    found = reports.report()
    folder = reports.save(found, tmp_path_factory.mktemp("whole"))
    return found, html.page(found, raw.read(folder))


def test_the_page_parses_and_loads_nothing(whole):
    _, text = whole
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    assert all(ref.startswith("#") for ref in page.refs)
    assert {ref[1:] for ref in page.refs} <= {*page.ids}, "a reference into nowhere"
    used = {*re.findall(r"url\(#([^)]+)\)", text)}
    assert used <= {*page.ids} and not re.search(r"url\((?!#)", text)
    assert len(text) < 1_000_000


def test_every_chart_is_there_with_a_title_and_words_for_those_who_cannot_see(whole):
    _, text = whole
    page = Page(text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4 + 5 + 1 + 1 + 1 + 5
    titles = [re.search(r"<title [^>]*>(.*?)</title>", svg).group(1) for svg in drawings]
    for wanted in CHARTS:
        assert any(title.startswith(wanted) for title in titles), wanted
    assert len({*titles}) == len(titles)
    for svg in drawings:
        assert (
            'role="img"' in svg and len(re.search(r"<desc [^>]*>(.*?)</desc>", svg).group(1)) > 20
        )
    assert len({*page.ids}) == len(page.ids), "identifiers of two charts clash"


def test_colours_of_charts_follow_the_theme(whole):
    _, text = whole
    style, body = re.search(r"<style>(.*?)</style>(.*)", text, re.DOTALL).groups()
    assert not re.search(r"#[0-9a-f]{6}\b", body), "a colour that a dark page cannot change"
    for variable in {*re.findall(r"var\(--(\w+)\)", body)}:
        assert style.count(f"--{variable}:") == 2, "one value for light, one for dark"


def test_the_headline_holds_the_numbers_of_the_report(whole):
    found, text = whole
    rows = {row[0]: row for row in Page(text).rows[:8]}
    assert rows["artifact"] == ["artifact", "MB", "perplexity", "KL", "TTFT ms", "TPOT ms",
                                "verdict"]  # fmt: skip
    best = rows["7 + build"]
    assert best[1] == "8.7" and best[2] == f"{found['artifacts'][6]['quality']['perplexity']:.3f}"
    assert best[5].startswith("0.500") and "6.80\u00d7 [6.40, 7.22]" in best[5]
    assert "faster" in best[6] and "TPOT single" in best[6]
    assert "slower" in rows["5 + quant"][6] and rows["1 baseline"][6] == "baseline"
    whole_text = " ".join(Page(text).words)
    assert "python -m optpipe recipe=int4_ort quant.bits=4" in whole_text
    assert "2.13.0" in whole_text and "abacus" in whole_text
    assert "7 + build \u2013 the fastest within its tier" in whole_text


def test_what_was_predicted_stands_beside_what_came_true(whole):
    _, text = whole
    row = ["1 baseline", "decode", "4-bit weights", "5 + quant", "2.60", "0.80", "1.50", "42%"]
    assert row in Page(text).rows
    assert ["1 baseline", "decode", bounds.ALL, "7 + build"] in [r[:4] for r in Page(text).rows]


@pytest.mark.trust  # T13
def test_what_is_missing_is_a_dash_with_its_reason_and_never_0(tmp_path):
    found = reports.report(cells=1)
    lost = found["artifacts"][3]
    why = "its kernel is unhappy"
    for cell in lost["cells"]:
        numbers = [key for key in cell if key.endswith("_s") or key == "peak_bytes"]
        cell |= dict.fromkeys(numbers) | {"bottleneck": None, "blocks": 0}
        cell["reasons"] = dict.fromkeys([*numbers, "bottleneck"], why)
        cell["speedup"] = {key: reports.nothing(why) for key in cell["speedup"]}
    lost["quality"] |= {"perplexity": None, "kl_mean": None,
                        "reasons": {"perplexity": why, "kl_mean": why}}  # fmt: skip
    publish.publish(found, folder_of(found, tmp_path))
    page = Page((tmp_path / "run" / "report.html").read_text())
    row = next(row for row in page.rows if row[0] == "4 + lowrank")
    assert row == ["4 + lowrank", "27.0", DASH, DASH, DASH, DASH, DASH]
    for row in (row for row in page.rows if row and row[0] == "4 + lowrank"):
        assert not {"0", "0.0", "0.00", "nan", "None"} & {*row}, row
    assert [row[2] for row in page.rows if row[0] == why and "TTFT" in row[1]] == ["4 + lowrank"]


def test_a_bare_report_of_one_artifact_says_what_there_is_not(tmp_path):
    found = reports.report()
    found["artifacts"] = found["artifacts"][:1]
    (only,) = found["artifacts"]
    only["cells"] = only["cells"][:1]
    for key in ("bottleneck", "percentiles"):
        del only["cells"][0][key]
    for key in ("ceilings", "invalid_reasons"):
        del found["run"][key]
    for key in ("resolution", "instrument"):
        del found["run"]["design"][key]
    del found["recommendation"], only["crossover"]
    text = html.page(found, [])
    words = " ".join(Page(text).words)
    for line in ("nothing to compare", "no bottleneck analysis", "no raw timings",
                 "No scenario of this run sweeps"):  # fmt: skip
        assert line in words


def test_names_are_text_whatever_they_hold(tmp_path):
    found = reports.report(cells=1)
    found["artifacts"][2]["stage"] = found["run"]["recipe"] = HOSTILE
    found["run"]["command"].append(HOSTILE)
    found["artifacts"][2]["cells"][0]["reasons"]["ttft_s"] = HOSTILE
    text = html.page(found, [])
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert sum(HOSTILE in word for word in page.words) >= 4


def test_a_long_name_is_cut_in_the_middle():
    assert figure.shorten("a" * 30 + "b" * 30, 21) == "a" * 10 + "\u2026" + "b" * 10
    assert figure.shorten("short", 5) == "short"


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.2), (0.1, 10), (1e-6, 1e6), (3, 4), (9, 11), (2.05, 2.6)]
)
def test_a_log_axis_has_a_few_round_ticks(low, high):
    found = figure.ticks(low, high)
    assert 1 <= len(found) <= 7 and found == sorted(found)
    assert all(low <= tick <= high for tick in found)


DIGITS = {0: "0", 12345.6: "12346", 123.4: "123", 12.34: "12.3", 0.5: "0.500", -1.5: "-1.50",
          0.00123: "0.00123", 1.2e-5: "1.2e-05"}  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), DIGITS.items())
def test_numbers_have_three_digits(value, shown):
    assert three_digits(value) == shown


def test_dominated_points_are_those_that_something_beats_in_both():
    points = [("a", 0.0, 1.0), ("b", 0.1, 2.0), ("c", 0.1, 1.5), ("d", 0.2, 2.0), ("e", 0.3, 3.0)]
    beaten = [name for name, kl, gain in points if curves._beaten(kl, gain, points)]
    assert beaten == ["c", "d"]


def test_every_stage_is_held_against_the_artifact_it_was_made_from():
    found = reports.report()
    by_name = {artifact["name"]: artifact for artifact in found["artifacts"]}
    assert parent(found, by_name["prune"])["name"] == "baseline"
    assert parent(found, by_name["prune+lowrank"])["name"] == "prune"
    assert parent(found, by_name["baseline"]) is None
    bars = [name for name, a in zip(names(found), found["artifacts"], strict=True)
            if not charts.is_reference(found, a)]  # fmt: skip
    assert "2 baseline-bfloat16" not in bars and len(bars) == 6


def test_points_on_one_spot_share_a_mark(whole):
    _, text = whole
    svg = re.search(r"<title [^>]*>Speed against divergence.*?</svg>", text, re.DOTALL).group(0)
    marks = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "0" in marks and "1" in marks and "7" in marks


def test_reading_timings_stops_at_a_limit(tmp_path, monkeypatch):
    folder = folder_of(reports.report(), tmp_path)
    with gzip.open(folder / "samples.jsonl.gz", "rt") as stream:
        assert len(raw.read(folder)) == len(stream.readlines())
    monkeypatch.setattr(raw, "MOST", 10)
    assert len(raw.read(folder)) == 10


class Pixels:
    """Axes on which a unit is a pixel."""

    transData = property(lambda self: self)

    def transform(self, point):
        return np.array(point, dtype=float)

    def inverted(self):
        return self


def test_marks_of_near_points_are_joined_beside_the_last_of_them():
    points = [(0, 0, "4"), (12, 2, "5"), (0, 1, "10"), (60, 0, "2"), (3, 30, "7")]
    assert [*figure.joined(Pixels(), points)] == [(12, 2, "4, 5, 10"), (3, 30, "7"), (60, 0, "2")]
