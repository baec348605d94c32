"""The schema of a report accepts what runs write, and nothing that lies or is misspelt."""

import copy
import json

import pytest
import reports
from jsonschema import Draft202012Validator

from optpipe.bench.pages import schema


def put(path, value):
    """A change of a report: the value at a path of keys, which must exist unless it is new."""

    def change(report):
        *parents, last = path
        for key in parents:
            report = report[key]
        report[last] = value

    return change


CELL = ("artifacts", 1, "cells", 0)
QUALITY = ("artifacts", 1, "quality")
LIES = {
    "a missing time is 0": (put((*CELL, "ttft_s"), 0), "ttft_s"),
    "a missing ratio is 0": (put((*CELL, "speedup", "tpot_s", "ratio"), 0), "tpot_s.ratio"),
    "a missing KL is 0": (
        put(("artifacts", 0, "quality", "reasons"), {"kl_mean": "not finite"}),
        "kl_mean: 0, though",
    ),
    "null without a reason": (put((*CELL, "ttft_s"), None), "ttft_s: null without a reason"),
    "an empty reason": (put(("artifacts", -1, "cells", 4, "reasons"), {"tpot_s": ""}), "tpot_s"),
    "no reasons at all": (put(("artifacts", -1, "cells", 4, "reasons"), {}), "tpot_s: null"),
    "unknown verdict": (put((*CELL, "speedup", "tpot_s", "verdict"), "BETTER"), "BETTER"),
    "no verdict, no reason": (put((*CELL, "speedup", "tpot_s", "verdict"), None), "verdict: null"),
    "misspelt key": (put((*CELL, "ttft_ms"), 1.0), "ttft_ms"),
    "misspelt metric": (put((*CELL, "speedup", "TPOT"), {}), "TPOT"),
    "half an interval": (put((*CELL, "speedup", "tpot_s", "ci"), [1.0]), "ci"),
    "a string for a number": (put(("artifacts", 0, "bytes"), "29"), "bytes"),
    "perplexity below 1": (put((*QUALITY, "perplexity"), 0.0), "perplexity"),
    "agreement above 1": (put((*QUALITY, "top1_agreement"), 1.5), "top1_agreement"),
    "unknown bottleneck": (put((*CELL, "bottleneck", "class"), "cpu"), "class"),
    "unknown tier": (put((*QUALITY, "tier"), "good"), "tier"),
    "other schema": (put(("schema",), "optpipe.report/2"), "optpipe.report/1"),
    "no artifacts": (put(("artifacts",), []), "artifacts"),
    "no versions": (lambda report: report["run"].pop("versions"), "versions"),
}


@pytest.fixture(scope="module")
def whole():
    return reports.report()


def test_the_schema_is_one_and_accepts_a_report_with_every_field(whole):
    Draft202012Validator.check_schema(schema.load())
    assert list(schema.problems(json.loads(json.dumps(whole)))) == []


@pytest.mark.parametrize("lie", LIES)
def test_a_report_that_lies_is_refused_and_the_place_named(whole, lie):
    change, named = LIES[lie]
    broken = copy.deepcopy(whole)
    change(broken)
    with pytest.raises(ValueError, match=r"not a report of 'optpipe.report/1'"):
        schema.check(broken)
    assert any(named in problem for problem in schema.problems(broken))


def leaves(node, path=()):
    """The path of everything in a report that holds nothing further."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in children:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def without_reasons(node):
    """The same with every reason taken away."""
    if isinstance(node, list):
        return [without_reasons(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: without_reasons(value) for key, value in node.items() if key != "reason"}
    return {**kept, "reasons": {}} if "reasons" in node else kept


def test_every_null_needs_its_reason(whole):
    """With all reasons gone every null is found, but those that are settings of the user."""
    bare = without_reasons(whole)
    nulls = [path for path, value in leaves(bare) if value is None and "bench" not in path]
    assert len(nulls) > 50
    assert len([*schema.unexplained(bare)]) == len(nulls)
    assert [*schema.unexplained(whole)] == []


def test_whatever_number_is_lost_is_noticed():
    """Each number of an artifact in turn becomes null, and nobody says why."""
    (artifact,) = reports.report(cells=1)["artifacts"][-1:]
    numbers = [path for path, value in leaves(artifact) if isinstance(value, int | float)]
    numbers = [path for path in numbers if isinstance(path[-1], str)]  # no end of an interval
    assert len(numbers) > 50
    for path in numbers:
        broken = copy.deepcopy(artifact)
        put(path, None)(broken)
        assert [*schema.unexplained(broken)], path


def test_a_server_may_have_no_limit_on_the_whole_of_a_request():
    """The objective is what the user set: a null there needs no reason."""
    built = reports.report()
    limits = {"ttft_s": 0.5, "tpot_s": 0.05, "e2e_s": None, "share": 0.9}
    served = {"arrivals": "poisson", "rate_per_s": 40.0, "goodput_per_s": 38.0, "slo": limits}
    built["artifacts"][0]["cells"][0] |= served
    schema.check(built)
